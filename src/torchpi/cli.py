"""The command line: each command is a function here, its `--help` is its docstring."""

import json
import pathlib
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from torchpi.arrays import read_npy, read_npz

PolicyPath = Annotated[str, tyro.conf.arg(metavar="PATH")]


def infer(
    policy: PolicyPath,
    inputs: pathlib.Path,
    out: pathlib.Path,
    num_steps: int = 10,
    seed: int = 0,
    noise: pathlib.Path | None = None,
    config: str | None = None,
    embodiment: str | None = None,
    normalization: Literal["z_score", "quantile"] | None = None,
    norm_stats: pathlib.Path | None = None,
    asset_id: str | None = None,
    tokenizer: pathlib.Path | None = None,
    default_prompt: str | None = None,
    device: str | None = None,
    json: bool = False,
) -> None:
    """Run a policy on one observation.

    The observation is an .npz file with the robot's own keys, nested ones joined with '.', for example
    images.cam_high, state and prompt (a 0-d string). The result is an .npz file with `actions` [H, a].

    Args:
        policy: a policy folder, an openpi checkpoint, or "demo".
        inputs: the observation, an .npz file.
        out: where the actions go, an .npz file.
        num_steps: Euler steps from noise to actions.
        seed: of the noise.
        noise: an .npy file [H, action_dim] to use as noise instead.
        config: for checkpoints that do not say their horizon and prompt format: a preset's name or a JSON file.
        embodiment: for checkpoints that do not say their robot: aloha, droid, libero, … or a JSON file.
        normalization: for checkpoints that do not say theirs; π₀ was trained with z_score, π₀.₅ with quantile.
        norm_stats: a norm_stats.json, instead of the checkpoint's own.
        asset_id: which of the checkpoint's assets/<id>/norm_stats.json.
        tokenizer: a SentencePiece model or tokenizer.json, instead of the policy's own.
        default_prompt: for observations without a prompt.
        device: for example cuda or cpu; by default cuda where there is one.
        json: print the shape, the file and the timing as one JSON document.
    """
    import torch

    from torchpi.policy import load_policy

    observation = read_npz(inputs)
    loaded = load_policy(
        policy,
        config=config,
        embodiment=embodiment,
        normalization=normalization,
        norm_stats=norm_stats,
        asset_id=asset_id,
        tokenizer=tokenizer,
        default_prompt=default_prompt,
        device=device,
    )
    generator = torch.Generator(loaded.model.device).manual_seed(seed)
    start = None if noise is None else read_npy(noise)
    result = loaded.infer(observation, noise=start, num_steps=num_steps, generator=generator)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("wb") as file:  # an open file, because np.savez appends .npz to names without it
        np.savez(file, actions=result["actions"])
    horizon, dims = result["actions"].shape
    if json:
        _print_json({"out": str(out), "shape": [horizon, dims], "policy_timing": result["policy_timing"]})
    else:
        milliseconds = result["policy_timing"]["infer_ms"]
        print(f"{horizon} actions of {dims} dimensions in {milliseconds:.0f} ms, written to {out}")


def demo(out: pathlib.Path = pathlib.Path("torchpi_demo.png")) -> None:
    """Show the way from camera frames, a state and an instruction to an action chunk.

    Three frames of a simulated robot at a drawer go through the embedded policy, which is untrained for now.

    Args:
        out: where the plot of the chunk goes.
    """
    from torchpi.demo import run_demo

    run_demo(out)


def trace(
    target: Annotated[str, tyro.conf.Positional],
    batch: int = 4,
    max_token_len: int | None = None,
    action_horizon: int | None = None,
    action_dim: int | None = None,
    compare: str | None = None,
    html: pathlib.Path | None = None,
    inputs: pathlib.Path | None = None,
    config: str | None = None,
    device: str | None = None,
    json: bool = False,
) -> None:
    """Walk the whole way, from the raw input to the loss and to the actions, and print every tensor.

    A preset (pi05, pi0, …) is walked at its full size without memory for its weights: shapes and dtypes. A policy, or
    "demo", is walked with its weights and an observation: ranges of values as well.

    Args:
        target: a preset's name, the path of a policy or checkpoint, or "demo".
        batch: samples in the batch.
        max_token_len: prompt tokens; by default the target's.
        action_horizon: actions in a chunk; by default the target's.
        action_dim: width of state and actions inside the model; by default the target's.
        compare: a second target, printed side by side.
        html: write the walk as a page of its own, with diagrams and plots.
        inputs: an .npz file: a robot's observation, or a batch in the model's own terms.
        config: for checkpoints that do not say their horizon and prompt format: a preset's name or a JSON file.
        device: where a policy runs.
        json: print one JSON document, a list of {"step", "name", "shape", "dtype", …}.
    """
    from torchpi.trace import run_trace

    run_trace(
        target,
        batch=batch,
        max_token_len=max_token_len,
        action_horizon=action_horizon,
        action_dim=action_dim,
        compare=compare,
        html=html,
        as_json=json,
        inputs=inputs,
        config=config,
        device=device,
    )


def bench(
    what: Annotated[Literal["all", "model", "train", "load"], tyro.conf.Positional] = "all",
    config: str = "mid",
    policy: str | None = None,
    batch: int = 1,
    cameras: int = 3,
    prompt_tokens: int = 60,
    num_steps: int = 10,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "cpu",
    compile: bool = False,
    repeats: int = 5,
    json: bool = False,
) -> None:
    """Measure beside the floor that this machine allows.

    In one run: the peak of a large matmul and of a large copy, then sampling, one training step, or loading. The
    floor of each operation is the larger of FLOPs / peak and bytes / bandwidth; the table says how it adds up.

    Args:
        what: model (sample_actions), train (one step), load (time and memory of loading --policy); all: the first two.
        config: mid (47 M parameters), a preset's name, or a JSON file. The weights are random.
        policy: for load: a policy folder or checkpoint.
        batch: samples at once.
        cameras: cameras of the observation.
        prompt_tokens: real tokens of the prompt; sampling drops the padding behind them.
        num_steps: Euler steps.
        dtype: of the matmuls; weights follow it in sampling, and stay float32 in training.
        device: cpu or cuda.
        compile: run the three stacks through torch.compile.
        repeats: timed runs, whose median counts.
        json: print one JSON document.
    """
    from torchpi.bench import bench_config, run_bench, run_bench_load

    if what == "load":
        if policy is None:
            raise ValueError("bench load needs --policy, a policy folder or checkpoint")
        run_bench_load(policy, dtype=dtype, as_json=json)
        return
    run_bench(
        [what] if what != "all" else ["model", "train"],
        config=bench_config(config),
        batch=batch,
        num_cameras=cameras,
        prompt_tokens=prompt_tokens,
        num_steps=num_steps,
        dtype=dtype,
        device=device,
        compiled=compile,
        repeats=repeats,
        as_json=json,
    )


COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": demo,
    "trace": trace,
    "bench": bench,
    "infer": infer,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; a user's mistake ends with one line on stderr and exit status 1."""
    warnings.showwarning = _show_warning
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="torchpi", description="π₀ and π₀.₅ in plain PyTorch.", args=argv, sort_subcommands=False
        )
    except (ValueError, KeyError, OSError) as error:
        # str() of a KeyError quotes its message.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(1) from None


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _print_json(document: Any) -> None:
    print(json.dumps(document))


if __name__ == "__main__":
    main()

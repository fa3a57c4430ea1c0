"""The command line: each command is a function here, its `--help` is its docstring."""

import json
import pathlib
import sys
import warnings
import zipfile
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import tyro

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

    observation = _read_npz(inputs)
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
    start = None if noise is None else _read_array(noise)
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


COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": demo,
    "infer": infer,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; a user's mistake ends with one line on stderr and exit status 1."""
    warnings.showwarning = _show_warning
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="torchpi", description="π₀ and π₀.₅ in plain PyTorch.", args=argv, sort_subcommands=False
        )
    except (ValueError, KeyError, FileNotFoundError) as error:
        # str() of a KeyError quotes its message.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(1) from None


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _print_json(document: Any) -> None:
    print(json.dumps(document))


def _read_npz(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (zipfile.BadZipFile, ValueError, EOFError, AttributeError) as error:
        raise ValueError(f"{path} is not an .npz file of plain arrays, or is damaged: {error}") from error


def _read_array(path: pathlib.Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not an .npy file of a plain array, or is damaged: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} holds several arrays; expected an .npy file with one")
    return array


if __name__ == "__main__":
    main()

"""Commands that run a policy: demo, infer, trace."""

import pathlib
from typing import Annotated

import numpy as np
import tyro

from torchpi.arrays import read_npy, read_npz
from torchpi.cli.common import Checkpoint, CheckpointOptions, print_json, split_names

PolicyPath = Annotated[str, tyro.conf.arg(metavar="PATH")]


def demo(
    out: pathlib.Path = pathlib.Path("torchpi_demo"),
    episodes: int = 3,
    tasks: str | None = None,
    instruction: str | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> None:
    """Show the embedded policy at work: a simulated arm opens drawers and doors.

    Prints what the policy is and how it comes from images and words to actions, runs episodes in the simulator, and
    writes a video per task and a page with everything. Where nothing can be rendered, it says what to install, and the
    policy sees packaged camera frames instead.

    Args:
        out: the folder of the videos and of index.html.
        episodes: per task.
        tasks: of Meta-World by name, separated by commas; by default those that the policy was trained on.
        instruction: tell the policy this instead, in the task that --tasks names, or in the first one.
        seed: of episodes and noise.
        workers: processes; by default as many as the CPU's cores and the memory allow.
    """
    from torchpi.demo.run import run_demo

    run_demo(
        out,
        episodes=episodes,
        tasks=None if tasks is None else split_names(tasks),
        instruction=instruction,
        seed=seed,
        workers=workers,
    )


def infer(
    policy: PolicyPath,
    inputs: pathlib.Path,
    out: pathlib.Path,
    num_steps: int = 10,
    seed: int = 0,
    noise: pathlib.Path | None = None,
    device: str | None = None,
    json: bool = False,
    checkpoint: Checkpoint = CheckpointOptions(),
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
        device: for example cuda or cpu; by default cuda where there is one.
        json: print the shape, the file and the timing as one JSON document.
        checkpoint: what the checkpoint does not say itself.
    """
    import torch

    from torchpi.policy import load_policy

    observation = read_npz(inputs)
    loaded = load_policy(policy, device=device, **checkpoint.given())
    generator = torch.Generator(loaded.model.device).manual_seed(seed)
    start = None if noise is None else read_npy(noise)
    result = loaded.infer(observation, noise=start, num_steps=num_steps, generator=generator)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("wb") as file:  # an open file, because np.savez appends .npz to names without it
        np.savez(file, actions=result["actions"])
    horizon, dims = result["actions"].shape
    if json:
        print_json({"out": str(out), "shape": [horizon, dims], "policy_timing": result["policy_timing"]})
    else:
        milliseconds = result["policy_timing"]["infer_ms"]
        print(f"{horizon} actions of {dims} dimensions in {milliseconds:.0f} ms, written to {out}")


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

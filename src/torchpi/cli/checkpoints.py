"""Commands about checkpoints: convert, doctor, compare."""

import pathlib
from typing import Annotated, Literal

import tyro

from torchpi.cli.common import Checkpoint, CheckpointOptions, print_json


def convert(
    source: Annotated[str, tyro.conf.Positional],
    target: Annotated[pathlib.Path, tyro.conf.Positional],
    to: Literal["torchpi", "openpi-jax", "openpi-pytorch", "lerobot"],
    dtype: Literal["float32", "bfloat16"] | None = None,
    action_dim: int | None = None,
    action_horizon: int | None = None,
    max_token_len: int | None = None,
    max_shard_gb: float = 5.0,
    overwrite: bool = False,
    check: bool = True,
    json: bool = False,
    checkpoint: Checkpoint = CheckpointOptions(),
) -> None:
    """Write a checkpoint in another format.

    Every array of SOURCE is written, folded or named. TARGET is complete or not there. Afterwards it is read back, and
    its arrays and the actions sampled from them are compared with the source's.

    Args:
        source: a policy folder, or a checkpoint of openpi (JAX or PyTorch) or LeRobot; a folder, hf://… or gs://….
        target: a new folder.
        to: the format.
        dtype: of the arrays; by default the source's.
        action_dim: another width of actions and state: weights are cut, or extended by zeros.
        action_horizon: another number of actions in a chunk.
        max_token_len: another number of prompt tokens.
        max_shard_gb: a policy folder's weights are written in shards of this size; other systems read one file only.
        overwrite: replace a target that is there.
        check: read the target back and compare; takes about as long as the conversion.
        json: print the report as one JSON document.
        checkpoint: what the checkpoint does not say itself.
    """
    import torch

    from torchpi.convert import convert, print_conversion

    sizes = {"action_dim": action_dim, "action_horizon": action_horizon, "max_token_len": max_token_len}
    result = convert(
        source,
        target,
        to,
        dtype=None if dtype is None else getattr(torch, dtype),
        sizes={field: value for field, value in sizes.items() if value is not None},
        max_shard_bytes=int(max_shard_gb * 1e9),
        overwrite=overwrite,
        check=check,
        **checkpoint.given(),
    )
    if json:
        print_json(result.to_dict())
    else:
        print_conversion(result)


def doctor(
    policy: Annotated[str, tyro.conf.Positional],
    observation: pathlib.Path | None = None,
    device: str | None = None,
    json: bool = False,
    checkpoint: Checkpoint = CheckpointOptions(),
) -> int:
    """Show what a policy is, and what would make a robot misbehave.

    Checks weights and statistics; with an observation also its state, prompt and cameras, the actions that come out,
    and what the policy reads: how far the chunk moves when a camera is black, cameras are swapped, the instruction is
    another one or the state is its mean. The exit status is 1 where something is wrong.

    Args:
        policy: a policy folder, a checkpoint, hf://…, gs://…, or "demo".
        observation: an .npz file with the robot's own keys, as for infer.
        device: for example cuda or cpu; by default cuda where there is one.
        json: print one JSON document.
        checkpoint: what the checkpoint does not say itself.
    """
    from torchpi.doctor import run_doctor

    load = checkpoint.given() | ({} if device is None else {"device": device})
    return run_doctor(policy, observation=observation, as_json=json, **load)


def compare(
    a: Annotated[str, tyro.conf.Positional],
    b: Annotated[str, tyro.conf.Positional],
    observation: pathlib.Path,
    tolerance: float | None = None,
    device: str | None = None,
    json: bool = False,
    checkpoint: Checkpoint = CheckpointOptions(),
) -> int:
    """Walk two policies stage by stage, and name the first stage in which they differ.

    The same observation and noise go through both: prompt, images, state, image tokens, cache, velocity, chunk, and
    actions in the robot's units. The exit status is 1 if they differ.

    Args:
        a: a policy, as for doctor.
        b: another one.
        observation: an .npz file with the robot's own keys, as for infer.
        tolerance: how far two stages may be apart, in parts of their scale.
        device: for example cuda or cpu; by default cuda where there is one.
        json: print one JSON document.
        checkpoint: what the checkpoint does not say itself.
    """
    from torchpi.compare import TOLERANCE, run_compare

    return run_compare(
        a,
        b,
        observation=observation,
        as_json=json,
        tolerance=TOLERANCE if tolerance is None else tolerance,
        device=device,
        **checkpoint.given(),
    )

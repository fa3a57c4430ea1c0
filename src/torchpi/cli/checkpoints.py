"""Commands for checkpoints: convert, quantize, doctor, compare."""

import dataclasses
import pathlib
from typing import Annotated, ClassVar, Literal

import tyro

from torchpi.cli.common import (
    Checkpoint,
    CheckpointOptions,
    EpisodeOptions,
    Episodes,
    Json,
    LoadModel,
    PolicyOptions,
    PolicyPath,
)
from torchpi.ui.format import print_json


@dataclasses.dataclass(frozen=True)
class Convert:
    """Convert a checkpoint to another format.

    Every array of SOURCE is written, folded into another, or listed in an error. Statistics are adapted to the target
    format's normalization. TARGET is written atomically, then read back: its arrays, and actions sampled with the
    target's own preprocessing, are compared with the source's.
    """

    source: Annotated[str, tyro.conf.Positional]
    """Policy folder, or checkpoint of openpi (JAX or PyTorch) or LeRobot: a folder, hf://… or gs://…."""
    target: Annotated[pathlib.Path, tyro.conf.Positional]
    """New folder."""
    to: Literal["torchpi", "openpi-jax", "openpi-pytorch", "lerobot"]
    """Target format."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the arrays; by default unchanged. Rounding is reported."""
    action_dim: int | None = None
    """New width of actions and state; weights are truncated or extended with zeros."""
    action_horizon: int | None = None
    """New number of actions in a chunk."""
    max_token_len: int | None = None
    """New number of prompt tokens."""
    max_shard_gb: float = 5.0
    """Maximum size of a weight shard in GB, for the torchpi format; the other formats have a single weight file."""
    overwrite: bool = False
    """Replace an existing target."""
    check: bool = True
    """Read the target back and compare it; takes about as long as the conversion."""
    json: bool = False
    """Print the report as one JSON document."""
    checkpoint: Checkpoint = CheckpointOptions()

    def run(self) -> None:
        import torch

        from torchpi.convert import convert

        sizes = {name: getattr(self, name) for name in ("action_dim", "action_horizon", "max_token_len")}
        result = convert(
            self.source,
            self.target,
            self.to,
            dtype=None if self.dtype is None else getattr(torch, self.dtype),
            sizes={field: value for field, value in sizes.items() if value is not None},
            max_shard_bytes=int(self.max_shard_gb * 1e9),
            overwrite=self.overwrite,
            check=self.check,
            **self.checkpoint.given(),
        )
        if self.json:
            print_json(dataclasses.asdict(result))
        else:
            print(result)


@dataclasses.dataclass(frozen=True)
class Quantize:
    """Quantize a policy's weight matrices, and write it as a policy folder.

    fp8 is for GPUs of compute capability 8.9 or higher: weights and activations of the large matmuls have 8 bits, and
    activation scales are calibrated on a dataset of the robot. int8 is for CPUs and needs no dataset. To measure the
    loss in quality, run eval on both policies. A quantized policy can't be trained or converted.
    """

    policy: PolicyPath
    to: Literal["fp8", "int8"]
    """Number format."""
    out: Annotated[pathlib.Path, tyro.conf.arg(aliases=["-o"])]
    """Output folder."""
    dataset: str | None = None
    """For fp8: LeRobot dataset of the policy's robot, a folder or hf://org/name."""
    num_observations: int = 64
    """Number of frames to calibrate on, spread evenly over the episodes and within each."""
    seed: int = 0
    """Random seed for frames and noise."""
    overwrite: bool = False
    """Replace an existing policy folder."""
    json: bool = False
    """Print one JSON document: the quantized layers and their scales."""
    episodes: Episodes = EpisodeOptions()
    load: LoadModel = PolicyOptions()

    def run(self) -> None:
        from torchpi.evaluation.quantization import quantize_policy

        quantization = quantize_policy(
            self.policy,
            self.out,
            self.to,
            dataset=self.dataset,
            num_observations=self.num_observations,
            seed=self.seed,
            overwrite=self.overwrite,
            load=self.load.given(),
            **self.episodes.episode_args(self.dataset),
        )
        if self.json:
            print_json({"out": str(self.out), **dataclasses.asdict(quantization)})
        else:
            print(f"{len(quantization.input_scales)} matrices in {self.to}, written to {self.out}")


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Find problems in a policy that would make a robot misbehave, and describe the policy.

    It checks weights and statistics, and whether a dataset fits them. With an observation, it also checks state,
    prompt, cameras and predicted actions, and measures how much the chunk changes when an input is changed: a black
    camera, swapped cameras, another instruction, the mean state. The exit status is 1 if there is a problem.
    """

    policy: PolicyPath
    inputs: pathlib.Path | None = None
    """Observation, an .npz file with the robot's own keys, as for infer."""
    dataset: str | None = None
    """LeRobot dataset of the policy's robot, a folder or hf://org/name; its images are not read."""
    json: Json = False
    episodes: Episodes = EpisodeOptions()
    load: LoadModel = PolicyOptions()
    aliases: ClassVar = {"--observation": "--inputs"}

    def run(self) -> int:
        from torchpi.inspect.commands import run_doctor

        dataset_args = self.episodes.episode_args(self.dataset)
        dataset = None if self.dataset is None else {"path": self.dataset, **dataset_args}
        load = self.load.given()
        return run_doctor(self.policy, observation=self.inputs, dataset=dataset, as_json=self.json, **load)


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare two policies stage by stage, and name the first stage that differs.

    Both policies get the same observation and noise. The compared stages are prompt, images, state, image tokens, KV
    cache, velocity, chunk, and actions in the robot's units. The exit status is 1 if any of them differ.
    """

    a: PolicyPath
    b: PolicyPath
    inputs: pathlib.Path
    """Observation, an .npz file with the robot's own keys, as for infer."""
    tolerance: float | None = None
    """Largest allowed difference of a stage, relative to its largest value; by default 1e-4."""
    json: Json = False
    load: LoadModel = PolicyOptions()
    aliases: ClassVar = {"--observation": "--inputs"}

    def run(self) -> int:
        from torchpi.inspect.commands import TOLERANCE, run_compare

        return run_compare(
            self.a,
            self.b,
            observation=self.inputs,
            as_json=self.json,
            tolerance=TOLERANCE if self.tolerance is None else self.tolerance,
            **self.load.given(),
        )

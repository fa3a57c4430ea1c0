"""Commands about checkpoints: convert, doctor, compare."""

import dataclasses
import pathlib
from typing import Annotated, ClassVar, Literal

import tyro

from torchpi.cli.common import Checkpoint, CheckpointOptions, EpisodeOptions, Episodes, LoadModel, PolicyOptions
from torchpi.ui.format import print_json


@dataclasses.dataclass(frozen=True)
class Convert:
    """Write a checkpoint in another format.

    Every array of SOURCE is written, folded or named. Statistics are rewritten where TARGET normalizes otherwise. It is
    complete or not there. Afterwards it is read back: its arrays, and the actions that are sampled by its own rules,
    are compared with the source's.
    """

    source: Annotated[str, tyro.conf.Positional]
    """A policy folder, or a checkpoint of openpi (JAX or PyTorch) or LeRobot; a folder, hf://… or gs://…."""
    target: Annotated[pathlib.Path, tyro.conf.Positional]
    """A new folder."""
    to: Literal["torchpi", "openpi-jax", "openpi-pytorch", "lerobot"]
    """The format."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the arrays; by default each keeps its own. What is rounded is reported."""
    action_dim: int | None = None
    """Another width of actions and state: weights are cut, or extended by zeros."""
    action_horizon: int | None = None
    """Another number of actions in a chunk."""
    max_token_len: int | None = None
    """Another number of prompt tokens."""
    max_shard_gb: float = 5.0
    """Size of the shards in GB that a policy folder's weights are written in; other systems read one file only."""
    overwrite: bool = False
    """Replace a target that exists."""
    check: bool = True
    """Read the target back and compare; takes about as long as the conversion."""
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
    """Write a policy with quantized matrices, as a policy folder.

    fp8 is for GPUs of compute capability 8.9 or higher: weights and activations of the large matmuls have 8 bits, with
    scales of the activations that are calibrated on a dataset of the robot. int8 is for a CPU and needs no dataset.
    The loss of quality is judged by the task: run eval on both. A quantized policy can't be trained or converted.
    """

    policy: Annotated[str, tyro.conf.Positional]
    """A policy folder, a checkpoint, hf://…, gs://…, or "demo"."""
    to: Literal["fp8", "int8"]
    """The number format."""
    out: Annotated[pathlib.Path, tyro.conf.arg(aliases=["-o"])]
    """The folder to write."""
    dataset: str | None = None
    """For fp8: a LeRobot dataset of the policy's robot, a folder or hf://org/name."""
    num_observations: int = 64
    """Frames of the dataset to calibrate on, spread evenly over the episodes and the time in each."""
    seed: int = 0
    """Seed of the frames and the noise."""
    overwrite: bool = False
    """Replace a policy folder that is there."""
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
            **self.episodes.reading_of(self.dataset),
        )
        if self.json:
            print_json({"out": str(self.out), **dataclasses.asdict(quantization)})
        else:
            print(f"{len(quantization.input_scales)} matrices in {self.to}, written to {self.out}")


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Describe a policy, and find what would make a robot misbehave.

    Checks weights and statistics; with a dataset whether it fits them; with an observation also its state, prompt and
    cameras, the actions that result, and the policy's inputs: how far the chunk moves when a camera is black, cameras
    are swapped, the instruction is another one or the state is its mean. The exit status is 1 if something is wrong.
    """

    policy: Annotated[str, tyro.conf.Positional]
    """A policy folder, a checkpoint, hf://…, gs://…, or "demo"."""
    inputs: pathlib.Path | None = None
    """An observation, an .npz file with the robot's own keys, as for infer."""
    dataset: str | None = None
    """A LeRobot dataset of the policy's robot, a folder or hf://org/name; its images are not read."""
    json: bool = False
    """Print one JSON document."""
    episodes: Episodes = EpisodeOptions()
    load: LoadModel = PolicyOptions()
    aliases: ClassVar = {"--observation": "--inputs"}

    def run(self) -> int:
        from torchpi.inspect.commands import run_doctor

        reading, options = self.episodes.reading_of(self.dataset), self.load.given()
        data = {"path": self.dataset, **reading} if self.dataset is not None else None
        return run_doctor(self.policy, observation=self.inputs, dataset=data, as_json=self.json, **options)


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare two policies stage by stage, and name the first stage in which they differ.

    Both get the same observation and noise: prompt, images, state, image tokens, cache, velocity, chunk, and actions in
    the robot's units are compared. The exit status is 1 if they differ.
    """

    a: Annotated[str, tyro.conf.Positional]
    """A policy, as for doctor."""
    b: Annotated[str, tyro.conf.Positional]
    """Another one."""
    inputs: pathlib.Path
    """An observation, an .npz file with the robot's own keys, as for infer."""
    tolerance: float | None = None
    """Largest difference of two stages, relative to their scale."""
    json: bool = False
    """Print one JSON document."""
    load: LoadModel = PolicyOptions()
    aliases: ClassVar = {"--observation": "--inputs"}

    def run(self) -> int:
        from torchpi.inspect.commands import TOLERANCE, run_compare

        tolerance = TOLERANCE if self.tolerance is None else self.tolerance
        load = self.load.given()
        return run_compare(self.a, self.b, observation=self.inputs, as_json=self.json, tolerance=tolerance, **load)

"""Parts that several commands share: options of a checkpoint, renamed options, lists of names."""

import dataclasses
import pathlib
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import tyro

from torchpi.errors import UsageError


@runtime_checkable
class Command(Protocol):
    """A command: a frozen dataclass of its arguments, whose docstrings are the help.

    Optional class variables: `renamed` maps an option that is refused to what replaces it, `aliases` a former name
    that is still read to the present one.
    """

    def run(self) -> int | None:
        """Run it; the exit status, None for 0."""


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """Settings that a checkpoint does not state itself, or that overrule it: arguments of `load_policy`."""

    config: str | None = None
    """For a checkpoint that does not state its horizon and prompt format: a preset's name or a JSON file."""
    lora_alpha: tuple[float, float] | None = None
    """Of the backbone and the action expert in a JAX LoRA checkpoint; needed unless the ranks are openpi's."""
    embedding: Literal["embed_tokens", "lm_head"] | None = None
    """The name that counts, in a PyTorch checkpoint that stores the embedding under both, differently."""
    embodiment: str | None = None
    """For a checkpoint that does not state its robot: aloha, droid, libero, … or a JSON file."""
    normalization: Literal["z_score", "quantile"] | None = None
    """For a checkpoint that does not state it; π₀ was trained with z_score, π₀.₅ with quantile."""
    norm_stats: pathlib.Path | None = None
    """A norm_stats.json, instead of the checkpoint's own."""
    asset_id: str | None = None
    """Selects one of the checkpoint's assets/<id>/norm_stats.json."""
    tokenizer: str | None = None
    """A SentencePiece model or tokenizer.json, instead of the policy's own."""
    default_prompt: str | None = None
    """For observations without a prompt."""
    preprocessing: Literal["openpi", "lerobot", "lerobot_0.4"] | None = None
    """As which program to resize images and to write the state into the prompt, for a LeRobot checkpoint that does not
    state its version; lerobot is 0.5 and later."""
    verify: bool = True
    """Compare the weights files with their checksums, where there are any."""

    def given(self) -> dict[str, Any]:
        """The options that were given, by name."""
        values = ((field, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {field.name: value for field, value in values if value != field.default}


@dataclasses.dataclass(frozen=True)
class PolicyOptions(CheckpointOptions):
    """The same, and the device."""

    device: str | None = None
    """For example cuda or cpu; by default cuda if there is one."""
    emulate_fp8: bool = False
    """Compute a policy that is quantized to fp8 in float32, with the same rounding, as on a CPU; for GPUs without."""


@dataclasses.dataclass(frozen=True)
class SamplingOptions(PolicyOptions):
    """The same, and the engine."""

    engine: Literal["auto", "eager", "compiled", "graph"] | None = None
    """By what actions are sampled: the plain model (eager), through torch.compile (compiled), or as CUDA graphs
    (graph); by default (auto) graphs on a CUDA device, and otherwise eager."""


@dataclasses.dataclass(frozen=True)
class FrameOptions:
    """Settings of a dataset that is read: arguments of `LeRobotDataset`."""

    rename: tuple[str, ...] = ()
    """LeRobot's names for columns and cameras that the dataset calls otherwise, OLD=NEW: state=observation.state
    actions=action. Columns that have to be joined: joint_position+gripper_position=observation.state."""
    fps: float | None = None
    """Frames per second to read the dataset at, where the robot acts at another rate than it was recorded with."""
    tolerance_s: float | None = None
    """Seconds by which timestamps and frames of videos may be off their times; by default a quarter of a frame."""

    def reading(self) -> dict[str, Any]:
        """The arguments of `LeRobotDataset`."""
        from torchpi.data.rename import parse_rename

        return {"rename": parse_rename(self.rename), "fps": self.fps, "tolerance_s": self.tolerance_s}


@dataclasses.dataclass(frozen=True)
class EpisodeOptions(FrameOptions):
    """The same, and which episodes with which instruction."""

    select: str | None = None
    """Of the dataset only these episodes, for example "0:40,57,100:" or "task:open the *"; both: "0:40; task:open the
    *"."""
    prompt: str | None = None
    """The instruction of all frames of the dataset, in place of their tasks."""

    def reading_of(self, dataset: str | None) -> dict[str, Any]:
        """The arguments of `LeRobotDataset`; none without a dataset, to which these options belong."""
        from torchpi.data import select_episodes

        if dataset is None:
            refuse_changed(self, belongs_to="--dataset")
            return {}
        episodes = None if self.select is None else select_episodes(dataset, self.select)
        return {**self.reading(), "episodes": episodes, "prompt": self.prompt}


Frames = Annotated[FrameOptions, tyro.conf.arg(name="")]
Episodes = Annotated[EpisodeOptions, tyro.conf.arg(name="")]
Checkpoint = Annotated[CheckpointOptions, tyro.conf.arg(name="")]
LoadModel = Annotated[PolicyOptions, tyro.conf.arg(name="")]
Load = Annotated[SamplingOptions, tyro.conf.arg(name="")]


def split_names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def refuse_changed(options: Any, *, belongs_to: str) -> None:
    """Refuse options that are not at their default, though they have no effect here."""
    fields = [field for field in dataclasses.fields(options) if getattr(options, field.name) != field.default]
    if fields:
        changed = ", ".join(f"--{field.name.replace('_', '-')}" for field in fields)
        raise UsageError(f"{changed} can only be given with {belongs_to}.")

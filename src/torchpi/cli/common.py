"""Options that several commands share, and helpers to read them."""

import dataclasses
import pathlib
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import tyro

from torchpi.errors import UsageError


@runtime_checkable
class Command(Protocol):
    """A command: a frozen dataclass of its arguments, whose docstrings are the help texts.

    Optional class variables: `renamed` maps a refused option to its replacement, `aliases` maps a former option name,
    which still works, to the present one.
    """

    def run(self) -> int | None:
        """Run the command and return its exit status; None means 0."""


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """Arguments of `load_policy` that complete or override the settings stored in a checkpoint."""

    config: str | None = None
    """Model config, if the checkpoint states no action horizon or prompt format: a preset name or a JSON file."""
    lora_alpha: tuple[float, float] | None = None
    """LoRA alpha of backbone and action expert, for a JAX LoRA checkpoint whose ranks are not openpi's."""
    embedding: Literal["embed_tokens", "lm_head"] | None = None
    """Token embedding to use if a PyTorch checkpoint stores two different ones."""
    embodiment: str | None = None
    """Robot, if the checkpoint does not state it: aloha, droid, libero, …, or a JSON file."""
    normalization: Literal["z_score", "quantile"] | None = None
    """Normalization, if the checkpoint does not state it: z_score for openpi's π₀, quantile for its π₀.₅."""
    norm_stats: pathlib.Path | None = None
    """norm_stats.json to use instead of the checkpoint's statistics."""
    asset_id: str | None = None
    """ID of the statistics to use, from the checkpoint's assets/<id>/norm_stats.json."""
    tokenizer: str | None = None
    """SentencePiece model or tokenizer.json to use instead of the policy's tokenizer."""
    default_prompt: str | None = None
    """Prompt for observations that have none."""
    preprocessing: Literal["openpi", "lerobot", "lerobot_0.4"] | None = None
    """Preprocessing, if a LeRobot checkpoint does not state its version; lerobot means 0.5 or later."""
    verify: bool = True
    """Verify the checksums of the weight files, if the checkpoint has any."""

    def given(self) -> dict[str, Any]:
        """Options that differ from their defaults, by name."""
        values = ((field, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {field.name: value for field, value in values if value != field.default}


@dataclasses.dataclass(frozen=True)
class PolicyOptions(CheckpointOptions):
    """Checkpoint options, and the device."""

    device: str | None = None
    """Device, such as cuda or cpu; by default cuda if available."""
    emulate_fp8: bool = False
    """Emulate an fp8 policy in float32 with the same rounding, on a device without fp8 matmuls."""


@dataclasses.dataclass(frozen=True)
class SamplingOptions(PolicyOptions):
    """Policy options, and the inference engine."""

    engine: Literal["auto", "eager", "compiled", "graph"] | None = None
    """Inference engine: the plain model (eager), torch.compile (compiled) or CUDA graphs (graph).
    By default (auto) graph on a CUDA device, and eager elsewhere."""


@dataclasses.dataclass(frozen=True)
class FrameOptions:
    """Arguments of `LeRobotDataset` for reading frames."""

    rename: tuple[str, ...] = ()
    """Rename columns and cameras to LeRobot's names, as OLD=NEW: state=observation.state actions=action.
    Join columns with +: joint_position+gripper_position=observation.state."""
    fps: float | None = None
    """Frames per second to resample the dataset to, if the robot is controlled at another rate.
    The nearest frames are read, and actions converted. By default the recorded rate, which must be control_hz."""
    tolerance_s: float | None = None
    """Maximum error of timestamps and video frame times in seconds; by default a quarter of the frame interval."""

    def dataset_args(self) -> dict[str, Any]:
        """Arguments of `LeRobotDataset`."""
        from torchpi.data.rename import parse_rename

        return {"rename": parse_rename(self.rename), "fps": self.fps, "tolerance_s": self.tolerance_s}


@dataclasses.dataclass(frozen=True)
class EpisodeOptions(FrameOptions):
    """Frame options, episode selection, and prompt."""

    select: str | None = None
    """Use only these episodes, such as "0:40,57,100:", "task:open the *", or both: "0:40; task:open the *"."""
    prompt: str | None = None
    """Prompt for all frames, instead of the dataset's task texts."""

    def episode_args(self, dataset: str | None) -> dict[str, Any]:
        """Arguments of `LeRobotDataset`. Without a dataset, none; the options are then refused."""
        from torchpi.data import select_episodes

        if dataset is None:
            refuse_changed(self, belongs_to="--dataset")
            return {}
        episodes = None if self.select is None else select_episodes(dataset, self.select)
        return {**self.dataset_args(), "episodes": episodes, "prompt": self.prompt}


PolicyPath = Annotated[
    str, tyro.conf.Positional, tyro.conf.arg(help='Policy folder, checkpoint, hf://… or gs://… address, or "demo".')
]
Json = Annotated[bool, tyro.conf.arg(help="Print one JSON document.")]
Frames = Annotated[FrameOptions, tyro.conf.arg(name="")]
Episodes = Annotated[EpisodeOptions, tyro.conf.arg(name="")]
Checkpoint = Annotated[CheckpointOptions, tyro.conf.arg(name="")]
LoadModel = Annotated[PolicyOptions, tyro.conf.arg(name="")]
Load = Annotated[SamplingOptions, tyro.conf.arg(name="")]


def split_names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def refuse_changed(options: Any, *, belongs_to: str) -> None:
    """Raise a UsageError if any option differs from its default, because it would have no effect here."""
    changed = [field.name for field in dataclasses.fields(options) if getattr(options, field.name) != field.default]
    if changed:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        raise UsageError(f"{names} can only be given with {belongs_to}.")

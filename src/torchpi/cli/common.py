"""Parts that several commands share: options of a checkpoint, renamed options, lists of names."""

import dataclasses
import pathlib
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import tyro


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
    """Of the backbone and the action expert in a JAX LoRA checkpoint; by default openpi's, 16 32."""
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

    def given(self) -> dict[str, Any]:
        """The options that were given, by name."""
        return {name: value for name, value in vars(self).items() if value is not None and value is not False}


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


Checkpoint = Annotated[CheckpointOptions, tyro.conf.arg(name="")]
LoadModel = Annotated[PolicyOptions, tyro.conf.arg(name="")]
Load = Annotated[SamplingOptions, tyro.conf.arg(name="")]


def split_names(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]

"""What several commands share: options of a checkpoint, lists in one word, JSON on stdout."""

import dataclasses
import json
import pathlib
from typing import Annotated, Any, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """What a checkpoint does not say itself, or what shall overrule it: arguments of `load_policy`."""

    config: str | None = None
    """For checkpoints that do not say their horizon and prompt format: a preset's name or a JSON file."""
    lora_alpha: tuple[float, float] | None = None
    """Of the backbone and the action expert in a JAX LoRA checkpoint; by default openpi's, 16 32."""
    embodiment: str | None = None
    """For checkpoints that do not say their robot: aloha, droid, libero, … or a JSON file."""
    normalization: Literal["z_score", "quantile"] | None = None
    """For checkpoints that do not say theirs; π₀ was trained with z_score, π₀.₅ with quantile."""
    norm_stats: pathlib.Path | None = None
    """A norm_stats.json, instead of the checkpoint's own."""
    asset_id: str | None = None
    """Which of the checkpoint's assets/<id>/norm_stats.json."""
    tokenizer: str | None = None
    """A SentencePiece model or tokenizer.json, instead of the policy's own."""
    default_prompt: str | None = None
    """For observations without a prompt."""

    def given(self) -> dict[str, Any]:
        """Those that were given, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


Checkpoint = Annotated[CheckpointOptions, tyro.conf.arg(name="")]


def split_names(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def print_json(document: Any) -> None:
    print(json.dumps(document))

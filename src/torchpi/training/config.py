"""A training recipe: everything that decides a run, as one JSON document."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from torchpi.assets import assets


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How far images are changed; 0 switches a change off."""

    crop: float = 0.95
    """Share of the image's side that a crop keeps; 1 switches it off."""
    degrees: float = 5.0
    """Rotation in ±degrees."""
    brightness: float = 0.3
    """Change of the value in ±shares."""
    contrast: float = 0.4
    """Steepness of the value's curve, in (-1, 1)."""
    saturation: float = 0.5
    """Change of the saturation in ±shares."""
    hue: float = 0.1
    """Change of the hue in ±turns."""
    color_probability: float = 0.5
    """Share of the images whose colours are changed."""

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ValueError(f"augmentation.crop must be in (0, 1], got {self.crop}")
        for name in ("brightness", "contrast", "saturation", "hue", "color_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augmentation.{name} must be in [0, 1], got {getattr(self, name)}")
        if self.contrast == 1 or not 0 <= self.degrees <= 180:
            raise ValueError(
                f"augmentation.contrast must be below 1 and degrees in [0, 180], got {self.contrast}, {self.degrees}"
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A recipe. The defaults are openpi's; RUN/train.json holds a run's own, and is a recipe like any other."""

    dataset: str = ""
    """Folder of a LeRobot dataset."""
    embodiment: str = ""
    """Whose cameras, state and actions these are: a name (metaworld, aloha, …) or a JSON file."""
    model: str = "pi05"
    """The model's sizes: a preset's name or a JSON file. The weights begin at random."""
    tokenizer: str | None = None
    """A SentencePiece model or tokenizer.json; by default the packaged one, which is made for the tiny presets."""
    norm_stats: str | None = None
    """A norm_stats.json; by default computed from the episodes that are trained on."""

    num_steps: int = 30_000
    """Updates of the weights."""
    batch_size: int = 32
    """Samples per update."""
    num_draws: int = 1
    """Draws of noise and time per sample; they share the pass over images and prompt, which is most of the work."""
    learning_rate: float = 2.5e-5
    """Peak of the schedule."""
    warmup_steps: int = 1000
    """Updates until the peak."""
    decay_steps: int | None = None
    """Update at which the cosine reaches `final_learning_rate`; by default num_steps."""
    final_learning_rate: float = 2.5e-6
    """Where the schedule ends."""
    weight_decay: float = 1e-10
    """AdamW's, on all weights."""
    max_grad_norm: float = 1.0
    """Gradients are scaled to at most this global norm."""
    ema_decay: float = 0.99
    """Of the moving average of the weights, which is what the policy is saved with; 0: the weights themselves."""
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    """Of the images."""
    state_noise: float = 0.0
    """Standard deviation of noise on the normalized state, whose range is [-1, 1]."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the matmuls; weights, gradients' sums and the optimizer are float32."""

    seed: int = 0
    """Of everything that is drawn."""
    holdout: float = 0.02
    """Share of the episodes that are not trained on but measured; at least one, unless it is 0."""
    holdout_samples: int = 256
    """Samples of the held-out episodes that are measured."""
    eval_every: int = 1000
    """Updates between measurements of the held-out loss."""
    save_every: int = 1000
    """Updates between checkpoints."""
    keep: int = 2
    """Checkpoints that are kept, the newest ones."""
    log_every: int = 50
    """Updates between lines in metrics.jsonl."""
    workers: int = 1
    """Processes that prepare samples; 0: this one does."""
    device: str = "cpu"
    """Where the model is trained."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "num_draws", "holdout_samples", "eval_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)}")
        for name in ("warmup_steps", "state_noise", "weight_decay", "workers", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.log_every < 1 or self.max_grad_norm <= 0 or self.learning_rate <= 0:
            raise ValueError("log_every, max_grad_norm and learning_rate must be positive")
        if not 0 <= self.ema_decay < 1 or not 0 <= self.holdout < 1:
            raise ValueError(f"ema_decay and holdout must be in [0, 1), got {self.ema_decay}, {self.holdout}")

    def to_json(self) -> str:
        """The document that `from_json` reads."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, path: str | pathlib.Path) -> "TrainConfig":
        """Read a recipe; fields that it leaves out have their defaults.

        Args:
            path: a JSON file, or the name of a packaged recipe.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not JSON, or has unknown fields or values that can't be.
        """
        packaged = {file.stem: file for file in sorted((assets() / "recipes").glob("*.json"))}
        file = packaged.get(str(path), pathlib.Path(path))
        if not file.is_file():
            raise FileNotFoundError(f"there is no recipe {path}; packaged recipes are {', '.join(packaged)}")
        try:
            return cls._from_dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            raise ValueError(f"recipe {file}: {error}") from error

    @classmethod
    def _from_dict(cls, values: Any) -> "TrainConfig":
        _require_known(values, cls, "a recipe")
        augmentation = values.get("augmentation", {})
        _require_known(augmentation, Augmentation, "augmentation")
        return cls(**{**_floats(values, cls), "augmentation": Augmentation(**_floats(augmentation, Augmentation))})


def _floats(values: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The values with integers as floats where the field is one: JSON has a single kind of number."""
    floats = {field.name for field in dataclasses.fields(kind) if field.type is float}
    return {name: float(value) if name in floats and type(value) is int else value for name, value in values.items()}


def _require_known(values: Any, kind: type, what: str) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} must be a JSON object, found {values!r}")
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{what} has unknown fields {', '.join(unknown)}; known are {', '.join(sorted(known))}")

"""Model configs as frozen dataclasses, and presets by name.

The sizes of the published models are those of openpi's `gemma.get_config` and SigLIP's So400m/14.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

from torchpi.errors import ConfigError, listed
from torchpi.schema import parse, read_json_object

# Default of fields that depend on pi05 (openpi: max_token_len = 200 if pi05 else 48). __post_init__ replaces it. It
# can't be None, which means "unset" (see Pi0Config).
_FOLLOWS_VARIANT: Any = "follows pi05"


# Far larger than in any model, so that an untrusted file can't exhaust memory.
MAX_SIZES: Mapping[str, int] = {
    "action_dim": 4096, "action_horizon": 4096, "max_token_len": 16_384, "vocab_size": 1 << 22, "image_size": 4096,
    "width": 65_536, "depth": 512, "mlp_dim": 1 << 19, "num_heads": 1024, "num_kv_heads": 1024, "head_dim": 8192,
    "patch": 1024,
}  # fmt: skip


def _require_types(config: Any) -> None:
    """Raise a ConfigError unless each field has its type, and integers are positive and at most `MAX_SIZES`."""
    for field in dataclasses.fields(config):
        value, where = getattr(config, field.name), f"{type(config).__name__}.{field.name}"
        if value is None and field.type in (int | None, bool | None):
            continue
        if field.type in (int, int | None) and (isinstance(value, bool) or not isinstance(value, int) or value <= 0):
            raise ConfigError(f"{where} must be a positive integer, got {value!r}.")
        if field.name in MAX_SIZES and value > MAX_SIZES[field.name]:
            raise ConfigError(f"{where} must be at most {MAX_SIZES[field.name]}, got {value}.")
        if field.type in (bool, bool | None) and not isinstance(value, bool):
            raise ConfigError(f"{where} must be true or false, got {value!r}.")
        if get_origin(field.type) is Literal and value not in get_args(field.type):
            raise ConfigError(f"{where} must be {listed(map(repr, get_args(field.type)), 'or')}, got {value!r}.")


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """Sizes of a Gemma stack: the backbone or the action expert."""

    width: int
    """D (backbone) or d (expert): width of the residual stream."""
    depth: int
    """Number of layers."""
    mlp_dim: int
    """Hidden width of the GeGLU feed-forward."""
    num_heads: int
    """Q: number of query heads."""
    num_kv_heads: int
    """G: number of key/value heads, a divisor of num_heads."""
    head_dim: int
    """K: width of a head; even, because RoPE rotates pairs of dimensions."""

    def __post_init__(self) -> None:
        _require_types(self)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads}).")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for RoPE, got {self.head_dim}.")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the SigLIP vision tower."""

    width: int
    """Width of the ViT."""
    depth: int
    """Number of encoder layers."""
    mlp_dim: int
    """Hidden width of the MLP."""
    num_heads: int
    """Number of attention heads, a divisor of width."""
    patch: int = 14
    """Side of a square patch in pixels."""
    position: Literal["learned", "sincos2d"] = "learned"
    """Position embedding: learned (as in the published weights) or fixed 2-D sinusoidal."""

    def __post_init__(self) -> None:
        _require_types(self)
        if self.width % self.num_heads:
            raise ConfigError(f"vision width ({self.width}) must be a multiple of num_heads ({self.num_heads}).")
        if self.position == "sincos2d" and self.width % 4:
            raise ConfigError(f"sincos2d needs a vision width that is a multiple of 4, got {self.width}.")


GEMMA_VARIANTS: Mapping[str, GemmaConfig] = {
    "gemma_2b": GemmaConfig(width=2048, depth=18, mlp_dim=16_384, num_heads=8, num_kv_heads=1, head_dim=256),
    "gemma_300m": GemmaConfig(width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256),
    "tiny_backbone": GemmaConfig(width=128, depth=4, mlp_dim=512, num_heads=4, num_kv_heads=1, head_dim=64),
    "tiny_expert": GemmaConfig(width=128, depth=4, mlp_dim=512, num_heads=4, num_kv_heads=1, head_dim=64),
}
VISION_VARIANTS: Mapping[str, VisionConfig] = {
    "so400m/14": VisionConfig(width=1152, depth=27, mlp_dim=4304, num_heads=16, patch=14),
    "tiny/16": VisionConfig(width=128, depth=4, mlp_dim=512, num_heads=4, patch=16),
}


_Part = TypeVar("_Part", GemmaConfig, VisionConfig)


def _variant(value: str | _Part, variants: Mapping[str, _Part], field: str) -> _Part:
    kind = type(next(iter(variants.values())))
    if isinstance(value, kind):
        return value
    if not isinstance(value, str):
        raise ConfigError(f"{field} must be a variant's name or a {kind.__name__}, got {value!r}.")
    if value not in variants:
        raise ConfigError(f"{field}: unknown variant {value!r}; variants are {', '.join(variants)}.")
    return variants[value]


@dataclasses.dataclass(frozen=True)
class Pi0Config:
    """Sizes and input format of a π₀ or π₀.₅ model.

    `action_horizon`, `max_token_len` and `discrete_state_input` are None (unset) if a checkpoint does not say them; an
    openpi JAX checkpoint does not. Code that needs one of them calls `require`.
    """

    pi05: bool = False
    """True for π₀.₅ (time through AdaRMSNorm, state in the prompt), False for π₀ (state token, time mixed into the
    action tokens)."""
    paligemma_variant: str | GemmaConfig = "gemma_2b"
    """Backbone, as variant name or sizes."""
    action_expert_variant: str | GemmaConfig = "gemma_300m"
    """Action expert, as variant name or sizes; depth, heads and head_dim must equal the backbone's."""
    action_dim: int = 32
    """A: width of state and actions in the model; narrower ones are padded with zeros."""
    action_horizon: int | None = 50
    """H: number of actions in a chunk."""
    max_token_len: int | None = _FOLLOWS_VARIANT
    """L: number of prompt tokens after padding or cutting; by default 200 for π₀.₅, 48 for π₀."""
    discrete_state_input: bool | None = _FOLLOWS_VARIANT
    """The prompt contains the state as text; by default True for π₀.₅ only (pi05_libero is an exception)."""
    siglip_variant: str | VisionConfig = "so400m/14"
    """Vision tower, as variant name or sizes."""
    vocab_size: int = 257_152
    """Number of rows of the token embedding."""
    image_size: int = 224
    """Side of the model's square images in pixels, a multiple of the patch size."""

    def __post_init__(self) -> None:
        if self.max_token_len is _FOLLOWS_VARIANT:
            object.__setattr__(self, "max_token_len", 200 if self.pi05 else 48)
        if self.discrete_state_input is _FOLLOWS_VARIANT:
            object.__setattr__(self, "discrete_state_input", self.pi05)
        _require_types(self)
        backbone, expert = self.paligemma, self.action_expert
        for field in ("depth", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(backbone, field) != getattr(expert, field):
                raise ConfigError(
                    f"Backbone and action expert share keys and values, so {field} must be equal, "
                    f"got {getattr(backbone, field)} and {getattr(expert, field)}."
                )
        if expert.width % 2:
            raise ConfigError(f"The action expert's width must be even for the time embedding, got {expert.width}.")
        if self.image_size % self.siglip.patch:
            raise ConfigError(f"image_size ({self.image_size}) must be a multiple of the patch ({self.siglip.patch}).")

    @property
    def paligemma(self) -> GemmaConfig:
        return _variant(self.paligemma_variant, GEMMA_VARIANTS, "paligemma_variant")

    @property
    def action_expert(self) -> GemmaConfig:
        return _variant(self.action_expert_variant, GEMMA_VARIANTS, "action_expert_variant")

    @property
    def siglip(self) -> VisionConfig:
        return _variant(self.siglip_variant, VISION_VARIANTS, "siglip_variant")

    @property
    def variant(self) -> str:
        return "π₀.₅" if self.pi05 else "π₀"

    @property
    def num_patches(self) -> int:
        """P: number of patch tokens per camera."""
        return (self.image_size // self.siglip.patch) ** 2

    @property
    def state_in_prompt(self) -> bool:
        """True if the prompt contains the state as text; the variant decides if `discrete_state_input` is unset."""
        return self.pi05 if self.discrete_state_input is None else self.discrete_state_input

    @property
    def chunk_shape(self) -> tuple[int, int]:
        """Shape [H, A] of a normalized chunk and its noise; raises a ValueError if the horizon is unset."""
        return self.require("action_horizon"), self.action_dim

    def require(self, field: Literal["action_horizon", "max_token_len", "discrete_state_input"]) -> Any:
        """Return a field that may be unset, or raise a ConfigError."""
        value = getattr(self, field)
        if value is None:
            raise ConfigError(
                f"The model's {field} is not set: this checkpoint does not say it, but this call needs it. Load it "
                f'with config=: a Pi0Config, a JSON file such as {{"{field}": …}}, or the name of a preset '
                f"({', '.join(PRESETS)})."
            )
        return value

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON values, which `from_dict` reads; variants are written as sizes."""
        sizes = {name: value for name, value in vars(self).items() if not name.endswith("_variant")}
        return sizes | {part: dataclasses.asdict(getattr(self, part)) for part in _PARTS}

    @classmethod
    def from_dict(cls, values: Any, base: "Pi0Config | None" = None, *, where: str = "model config") -> "Pi0Config":
        """Build a config from the JSON object of `to_dict`, or part of it.

        Args:
            values: JSON object; paligemma, action_expert and siglip may be partial too, or a variant's name.
            base: config that supplies absent fields; by default this class's defaults.
            where: name of the document, for messages.

        Raises:
            ValueError: unknown field, wrong type, or sizes that don't fit together; the message names the field.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where} must be an object, found {type(values).__name__}.")
        changes = {name: value for name, value in values.items() if name not in _NOT_SIZES}
        base = base or cls(pi05=changes.get("pi05") is True)
        document = base.to_dict()
        for name, value in changes.items():
            if name in _PARTS and isinstance(value, Mapping):
                document[name] = {**document[name], **value}
            elif name in _PARTS and isinstance(value, str):
                document[name] = dataclasses.asdict(_variant(value, _PARTS[name], f"{where}: {name}"))
            else:
                document[name] = value
        for part in _PARTS.keys() - changes.keys():
            if f"{part}_variant" in values:  # ignored beside the sizes, but not instead of them
                raise ConfigError(
                    f"{where}: '{part}_variant' is not read; write {part!r} instead, with a variant's name or an "
                    "object of sizes."
                )
        parsed = vars(parse(_Document, document, where))
        fields = {f"{name}_variant" if name in _PARTS else name: parsed[name] for name in changes}
        try:
            return dataclasses.replace(base, **fields)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error

    @classmethod
    def from_json(cls, path: str | pathlib.Path) -> "Pi0Config":
        """Read a JSON config file; see `from_dict` for its contents and errors."""
        return cls.from_dict(read_json_object(path), where=str(path))


@dataclasses.dataclass(frozen=True)
class _Document:
    """The schema of `Pi0Config.to_dict`."""

    pi05: bool
    action_dim: int
    action_horizon: int | None
    max_token_len: int | None
    discrete_state_input: bool | None
    vocab_size: int
    image_size: int
    paligemma: GemmaConfig
    action_expert: GemmaConfig
    siglip: VisionConfig


_PARTS: Mapping[str, Mapping[str, Any]] = {
    "paligemma": GEMMA_VARIANTS,
    "action_expert": GEMMA_VARIANTS,
    "siglip": VISION_VARIANTS,
}
# Ignored: written beside the sizes by tools that make such files, and known more reliably from the weights.
_NOT_SIZES = frozenset({"dtype", "num_params", "paligemma_variant", "action_expert_variant", "lora", "num_lora_params"})

_PI0, _PI05 = Pi0Config(), Pi0Config(pi05=True)
# Size of the embedded demo policy, which a laptop CPU can train within an hour.
_TINY = Pi0Config(
    pi05=True,
    paligemma_variant="tiny_backbone",
    action_expert_variant="tiny_expert",
    siglip_variant="tiny/16",
    action_dim=8,
    action_horizon=16,
    max_token_len=64,
    vocab_size=1024,
    image_size=96,
)
PRESETS: Mapping[str, Pi0Config] = {
    "pi0": _PI0,
    "pi05": _PI05,
    "tiny": _TINY,
    "tiny_pi0": dataclasses.replace(_TINY, pi05=False, discrete_state_input=False),
    # Published checkpoints; their arrays don't contain horizon and prompt format, which are from openpi's configs.
    "pi0_base": _PI0,
    "pi05_base": _PI05,
    "pi0_aloha_towel": _PI0,
    "pi0_aloha_tupperware": _PI0,
    "pi0_aloha_pen_uncap": _PI0,
    "pi0_aloha_sim": _PI0,
    "pi0_droid": dataclasses.replace(_PI0, action_horizon=10),
    "pi05_droid": dataclasses.replace(_PI05, action_horizon=15),
    "pi05_libero": dataclasses.replace(_PI05, action_horizon=10, discrete_state_input=False),
}


def preset(name: str) -> Pi0Config:
    if name not in PRESETS:
        raise ConfigError(f"Unknown preset {name!r}; presets are {', '.join(PRESETS)}.")
    return PRESETS[name]


Finetune = Literal["full", "frozen_vision", "expert", "lora", "lora_strict"]
"""Selection of the trainable parameters, see `model.lora.trainable_parameters`."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Position, rank and scale of the LoRA matrices. The defaults are openpi's gemma_2b_lora and gemma_300m_lora."""

    backbone_rank: int = 16
    """Rank in the backbone; 0: no LoRA there."""
    backbone_alpha: float = 16.0
    """The backbone's attention update is scaled by alpha / rank."""
    expert_rank: int = 32
    """Rank in the action expert; 0: no LoRA there."""
    expert_alpha: float = 32.0
    """The expert's attention update is scaled by alpha / rank."""
    attention: bool = True
    """Add LoRA to query, key, value and output projections."""
    feed_forward: bool = True
    """Add LoRA to the feed-forward layers."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if name.endswith("_rank") and not (is_number and isinstance(value, int) and value >= 0):
                raise ConfigError(f"LoraConfig.{name} must be a non-negative integer, got {value!r}.")
            if name.endswith("_alpha") and not (is_number and value > 0):
                raise ConfigError(f"LoraConfig.{name} must be a positive number, got {value!r}.")
            if name in ("attention", "feed_forward") and not isinstance(value, bool):
                raise ConfigError(f"LoraConfig.{name} must be true or false, got {value!r}.")
        if not (self.backbone_rank or self.expert_rank) or not (self.attention or self.feed_forward):
            raise ConfigError(f"{self} adds no LoRA; set at least one rank, and attention or feed_forward.")

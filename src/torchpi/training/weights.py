"""The initial weights of a run, and the selection of the trained ones."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from torchpi.checkpoints.adapter import digest
from torchpi.checkpoints.checkpoint import Checkpoint, open_checkpoint
from torchpi.checkpoints.layout import cast
from torchpi.checkpoints.lora import DEFAULT_ALPHA
from torchpi.checkpoints.npz import DRAWN, draw_action_weights
from torchpi.checkpoints.sizes import read_config
from torchpi.config import PRESETS, Pi0Config
from torchpi.devices import has_bfloat16
from torchpi.errors import TrainingError
from torchpi.model.lora import add_lora, attach_lora, is_lora, lora_config, trainable_parameters
from torchpi.model.pi0 import Pi0
from torchpi.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class InitReport:
    """The origin of a run's weights."""

    source: str
    """Address of the checkpoint, or "random"."""
    loaded: tuple[str, ...] = ()
    """Parameters loaded from the checkpoint."""
    fresh: tuple[str, ...] = ()
    """Parameters initialized at random."""
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Unused arrays of the checkpoint, each with the reason."""
    adapted: str = ""
    """Description of the sizes that were cut or extended."""
    frozen_sha256: str = ""
    """SHA-256 of the frozen weights; empty if they are on "meta"."""


def with_dtype(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The recipe with the dtype of the matmuls; if it states none, bfloat16 if the device supports it, else float32."""
    return config if config.model.dtype else config.replace(dtype="bfloat16" if has_bfloat16(device) else "float32")


def open_init(config: TrainConfig) -> Checkpoint | None:
    """Open the initial checkpoint and read its headers; None if the model is trained from scratch."""
    init, requested = config.model.init, config.model.config
    if init is None:
        return None
    try:
        checkpoint = open_checkpoint(init, config=requested, adapt=config.model.adapt and requested is not None)
    except ValueError as error:
        if not config.model.adapt and requested is not None:
            error.add_note("To cut or extend weights of another action_dim, set adapt (--adapt).")
        raise
    checkpoint.require_full_precision("trained")
    checkpoint.lora(_init_alpha(config, checkpoint))
    return checkpoint


def model_config(config: TrainConfig, init: Checkpoint | None) -> Pi0Config:
    """The model's sizes, from the initial checkpoint or the recipe."""
    if init is not None:
        return _with_horizon(init)
    requested = config.model.config
    if requested is None:
        raise TrainingError(
            "Say which weights to start from (--init, for example gs://openpi-assets/checkpoints/pi05_base), or the "
            f"sizes of a model that is trained from scratch (--model: {', '.join(PRESETS)}, or a JSON file)."
        )
    sizes = read_config(requested)
    return sizes if isinstance(sizes, Pi0Config) else Pi0Config.from_dict(sizes, where=requested)


def _with_horizon(init: Checkpoint) -> Pi0Config:
    """The sizes of an initial checkpoint; an error if action_horizon is unknown, as for openpi's JAX checkpoints."""
    if init.config.action_horizon is not None:
        return init.config
    unknown = {"action_horizon": None, "max_token_len": None, "discrete_state_input": None}
    known_sizes = init.config.to_dict() | unknown
    matching = [name for name, sizes in PRESETS.items() if sizes.to_dict() | unknown == known_sizes]
    presets = f"the preset that it was trained with (of {', '.join(matching)}), or " if matching else ""
    raise TrainingError(
        f"{init.address} does not state its action_horizon, which training needs, nor max_token_len and "
        f"discrete_state_input. State them with the model's sizes (--model): {presets}a JSON file such as "
        '{"action_horizon": 50}.'
    )


def build_model(
    config: TrainConfig, sizes: Pi0Config, init: Checkpoint | None = None, *, skeleton: bool
) -> tuple[Pi0, InitReport]:
    """Build the model before its first update, from scratch or from `init`, with LoRA matrices if they are trained.

    Each weight is read directly in the dtype in which it is kept, so that memory never holds a second set of weights.

    Args:
        skeleton: leave the weights on "meta".
    """
    model, report = Pi0(sizes, device="meta"), InitReport("random")
    if config.model.trains_lora:
        attach_lora(model, config.model.lora)
    freeze(model, config)
    if not skeleton:
        model, report = _fill(config, model, init)
    assert config.model.dtype is not None, "call with_dtype first"
    model.compute_dtype_override = getattr(torch, config.model.dtype)
    model.train()
    fresh = tuple(name for name, _ in model.named_parameters() if name not in report.loaded)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    sha256 = "" if skeleton else digest(frozen, model.get_parameter)
    return model, dataclasses.replace(report, fresh=fresh, frozen_sha256=sha256)


def _fill(config: TrainConfig, planned: Pi0, init: Checkpoint | None) -> tuple[Pi0, InitReport]:
    """Make a model with weights; its dtypes and trainable parameters are those of `planned`, which is on "meta"."""
    narrow_dtypes = {name: p.dtype for name, p in planned.named_parameters() if p.dtype is not torch.float32}
    if init is None:
        model, report = Pi0(planned.config, device="meta").to_empty(device="cpu"), InitReport("random")
        model.init_weights(torch.Generator().manual_seed(config.seed))
    else:
        model, report = _load(config, init, narrow_dtypes)
    if config.model.trains_lora and lora_config(model) is None:
        add_lora(model, config.model.lora, torch.Generator("cpu").manual_seed(config.seed))
    cast(model, narrow_dtypes)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(planned.get_parameter(name).requires_grad)
    return model, report


def _init_alpha(config: TrainConfig, init: Checkpoint) -> tuple[float, float] | None:
    """The alphas of the LoRA in the initial weights, if the recipe states them."""
    lora = config.model.lora
    trained = (lora.backbone_alpha, lora.expert_alpha)
    if config.model.lora_alpha is None and init.folded and trained != DEFAULT_ALPHA:
        return trained  # recipes older than lora_alpha use the alphas of the trained LoRA for both
    return config.model.lora_alpha


def _load(config: TrainConfig, init: Checkpoint, dtypes: Mapping[str, torch.dtype]) -> tuple[Pi0, InitReport]:
    # If LoRA is trained, training continues with the checkpoint's LoRA; otherwise it is folded into the weights.
    alpha, keep_lora = _init_alpha(config, init), config.model.trains_lora and bool(init.folded)
    if keep_lora and (stored := init.lora(alpha)) != config.model.lora:
        raise TrainingError(
            f"{init.address} has {stored}, the recipe {config.model.lora}: use the same, or fold it into the weights "
            "first with torchpi convert."
        )
    random = DRAWN if init.is_paligemma else ()
    # Weights that PaliGemma lacks are drawn in float32: the random numbers depend on the dtype.
    dtypes = {name: dtype for name, dtype in dtypes.items() if not name.startswith(random)}
    model = init.model(dtypes=dtypes, lora_alpha=alpha, lora="keep" if keep_lora else "fold")
    if init.is_paligemma:
        draw_action_weights(model, config.seed)
    loaded = tuple(name for name, _ in model.named_parameters() if not name.startswith(random))
    return model, InitReport(init.address, loaded, left_out=init.dropped, adapted="; ".join(init.notes))


def freeze(model: Pi0, config: TrainConfig) -> None:
    """Freeze the parameters that are not trained, and convert them to `frozen_dtype`."""
    is_trained, unused = trainable_parameters(model, config.model.finetune), without_gradient(model)
    frozen_dtype = getattr(torch, config.model.frozen_dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained[name] and name not in unused)
        if not is_trained[name]:
            parameter.data = parameter.data.to(frozen_dtype)


def without_gradient(model: Pi0) -> frozenset[str]:
    """Names of the parameters that the loss does not depend on.

    The action expert reads the keys and values of the backbone's last layer, and nothing after them.
    """
    last = f"backbone.layers.{len(model.backbone.layers) - 1}."
    unused = ("backbone.final_norm.", *(f"{last}{part}." for part in ("attention.out", "pre_ffw_norm", "feed_forward")))
    return frozenset(name for name, _ in model.named_parameters() if name.startswith(unused))


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """A row of the table of parameters."""

    part: str
    trainable: int
    frozen: int
    without_gradient: int
    """Parameters that the recipe trains, but the loss does not depend on."""
    dtype: str
    """Dtypes of the parameters, separated by commas."""


def parameter_table(model: Pi0, config: TrainConfig) -> list[ParameterCount]:
    """Count the trained and frozen parameters in each part of the model."""
    is_trained = trainable_parameters(model, config.model.finetune)
    rows: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        if is_lora(name):
            part += " LoRA"
        row = rows.setdefault(part, {"trainable": 0, "frozen": 0, "without_gradient": 0, "dtype": set()})
        if parameter.requires_grad:
            row["trainable"] += parameter.numel()
        else:
            row["without_gradient" if is_trained[name] else "frozen"] += parameter.numel()
        row["dtype"].add(str(parameter.dtype).removeprefix("torch."))
    return [ParameterCount(part, **{**row, "dtype": ", ".join(sorted(row["dtype"]))}) for part, row in rows.items()]

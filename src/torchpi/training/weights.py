"""The initial weights of a run, and which of them are trained."""

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
    """The address, or "random"."""
    loaded: tuple[str, ...] = ()
    """Parameters out of the checkpoint."""
    fresh: tuple[str, ...] = ()
    """Parameters that were drawn."""
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Arrays of the checkpoint that no computation reads, and why."""
    adapted: str = ""
    """Sizes that were cut or extended."""
    frozen_sha256: str = ""
    """SHA-256 of the frozen weights; empty where they are on "meta"."""


def with_dtype(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The recipe with a dtype of the matmuls, chosen by the device where it states none."""
    return config if config.model.dtype else config.replace(dtype="bfloat16" if has_bfloat16(device) else "float32")


def open_init(config: TrainConfig) -> Checkpoint | None:
    """The headers of the initial checkpoint; None: the model is trained from scratch."""
    init, requested = config.model.init, config.model.config
    if init is None:
        return None
    try:
        checkpoint = open_checkpoint(init, config=requested, adapt=config.model.adapt and requested is not None)
    except ValueError as error:
        if not config.model.adapt and requested is not None:
            error.add_note("Weights of another action_dim are cut or extended on request: adapt (--adapt).")
        raise
    checkpoint.require_full_precision("trained")
    checkpoint.lora(_init_alpha(config, checkpoint))
    return checkpoint


def model_config(config: TrainConfig, init: Checkpoint | None) -> Pi0Config:
    """The model's sizes: of the initial checkpoint, or of the recipe."""
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
    """The sizes of an initial checkpoint, or an error that says how to state what a JAX checkpoint does not."""
    if init.config.action_horizon is not None:
        return init.config
    unsaid = {"action_horizon": None, "max_token_len": None, "discrete_state_input": None}
    own = init.config.to_dict() | unsaid
    fitting = [name for name, sizes in PRESETS.items() if sizes.to_dict() | unsaid == own]
    presets = f"the preset that it was trained as, of {', '.join(fitting)}, or " if fitting else ""
    raise TrainingError(
        f"{init.address} does not say its action_horizon, which training needs, nor max_token_len and "
        f"discrete_state_input. State them with the model's sizes (--model): {presets}a JSON file such as "
        '{"action_horizon": 50}.'
    )


def build_model(
    config: TrainConfig, sizes: Pi0Config, init: Checkpoint | None = None, *, skeleton: bool
) -> tuple[Pi0, InitReport]:
    """The model before the first update: from scratch or out of `init`, with LoRA where it is trained.

    Each weight is read straight into the dtype in which it is kept, so that no second set of them is ever in memory.

    Args:
        skeleton: leave the weights on "meta".
    """
    model, report = Pi0(sizes, device="meta"), InitReport("random")
    if config.model.trains_lora:
        attach_lora(model, config.model.lora)
    freeze(model, config)
    if not skeleton:
        model, report = _fill(config, model, init)
    assert config.model.dtype is not None, "with_dtype chooses it"
    model.compute_dtype_override = getattr(torch, config.model.dtype)
    model.train()
    fresh = tuple(name for name, _ in model.named_parameters() if name not in report.loaded)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    sha256 = "" if skeleton else digest(frozen, model.get_parameter)
    return model, dataclasses.replace(report, fresh=fresh, frozen_sha256=sha256)


def _fill(config: TrainConfig, planned: Pi0, init: Checkpoint | None) -> tuple[Pi0, InitReport]:
    """The weights of a model whose dtypes and trainable parameters are planned on "meta"."""
    narrow = {name: p.dtype for name, p in planned.named_parameters() if p.dtype is not torch.float32}
    if init is None:
        model, report = Pi0(planned.config, device="meta").to_empty(device="cpu"), InitReport("random")
        model.init_weights(torch.Generator().manual_seed(config.seed))
    else:
        model, report = _load(config, init, narrow)
    if config.model.trains_lora and lora_config(model) is None:
        add_lora(model, config.model.lora, torch.Generator("cpu").manual_seed(config.seed))
    cast(model, narrow)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(planned.get_parameter(name).requires_grad)
    return model, report


def _init_alpha(config: TrainConfig, init: Checkpoint) -> tuple[float, float] | None:
    """The alphas of the initial weights' LoRA, where the recipe states them."""
    stated, lora = config.model.lora_alpha, config.model.lora
    trained = (lora.backbone_alpha, lora.expert_alpha)
    # Those of the LoRA that is trained are both's, in recipes from before lora_alpha.
    return trained if stated is None and init.folded and trained != DEFAULT_ALPHA else stated


def _load(config: TrainConfig, init: Checkpoint, narrow: Mapping[str, torch.dtype]) -> tuple[Pi0, InitReport]:
    # LoRA in the checkpoint is trained on where LoRA is trained, and a part of the weights elsewhere.
    alpha, keep = _init_alpha(config, init), config.model.trains_lora and bool(init.folded)
    if keep and (stored := init.lora(alpha)) != config.model.lora:
        raise TrainingError(
            f"{init.address} has {stored}, the recipe {config.model.lora}: use the same, or fold it into the weights "
            "first with torchpi convert."
        )
    drawn = DRAWN if init.is_paligemma else ()
    dtypes = {name: dtype for name, dtype in narrow.items() if not name.startswith(drawn)}  # draws differ by the dtype
    model = init.model(dtypes=dtypes, lora_alpha=alpha, lora="keep" if keep else "fold")
    if init.is_paligemma:
        draw_action_weights(model, config.seed)
    loaded = tuple(name for name, _ in model.named_parameters() if not name.startswith(drawn))
    return model, InitReport(init.address, loaded, left_out=init.dropped, adapted="; ".join(init.notes))


def freeze(model: Pi0, config: TrainConfig) -> None:
    """Freeze the parameters that are not trained, and bring them to their dtype."""
    changed, unused = trainable_parameters(model, config.model.finetune), without_gradient(model)
    frozen_dtype = getattr(torch, config.model.frozen_dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(changed[name] and name not in unused)
        if not changed[name]:
            parameter.data = parameter.data.to(frozen_dtype)


def without_gradient(model: Pi0) -> frozenset[str]:
    """The parameters that the loss does not depend on: it reads the keys and values of the backbone's last layer, and
    nothing behind them.
    """
    last = f"backbone.layers.{len(model.backbone.layers) - 1}."
    behind = ("backbone.final_norm.", *(f"{last}{part}." for part in ("attention.out", "pre_ffw_norm", "feed_forward")))
    return frozenset(name for name, _ in model.named_parameters() if name.startswith(behind))


@dataclasses.dataclass(frozen=True)
class Part:
    """A row of the table of parameters."""

    part: str
    trainable: int
    frozen: int
    without_gradient: int
    """Trained according to the recipe, but the loss does not depend on them."""
    dtype: str
    """Dtype of the frozen parameters, or of all where none is frozen."""


def parameter_table(model: Pi0, config: TrainConfig) -> list[Part]:
    """Trained and frozen parameters of each part of the model."""
    changed = trainable_parameters(model, config.model.finetune)
    rows: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        part = f"{name.split('.')[0]}{' LoRA' if is_lora(name) else ''}"
        count = rows.setdefault(part, {"trainable": 0, "frozen": 0, "without_gradient": 0, "dtype": set()})
        kind = "trainable" if parameter.requires_grad else "without_gradient" if changed[name] else "frozen"
        count[kind] += parameter.numel()
        count["dtype"].add(str(parameter.dtype).removeprefix("torch."))
    return [Part(part, **{**count, "dtype": ", ".join(sorted(count["dtype"]))}) for part, count in rows.items()]

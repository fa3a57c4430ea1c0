"""A checkpoint, opened once: its format, the sizes of its model, everything around the model, and the weights."""

import contextlib
import dataclasses
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

import torch

from torchpi.checkpoints import folder, lerobot, openpi, peft
from torchpi.checkpoints.adapter import WEIGHTS as ADAPTER_WEIGHTS
from torchpi.checkpoints.adapter import Adapter, is_adapter, merge_adapter, read_adapter
from torchpi.checkpoints.address import existing_folder, published_name
from torchpi.checkpoints.formats import Format, probe
from torchpi.checkpoints.layout import Rounding, StoredArrays, Table, load_arrays, own_table
from torchpi.checkpoints.lora import lora_pairs, stored_lora
from torchpi.checkpoints.npz import NpzArrays, draw_action_weights
from torchpi.checkpoints.openpi_layout import jax_config, jax_table, lora_table, paligemma_table
from torchpi.checkpoints.openpi_torch import EmbeddingChoice, TorchArrays, torch_config, torch_table
from torchpi.checkpoints.safetensors_files import SafetensorsArrays, require_intact
from torchpi.checkpoints.sizes import ConfigLike, add_stated, overrule, read_config, stated_heads, stated_sizes
from torchpi.checkpoints.sizes import adapt as adapt_model
from torchpi.checkpoints.spec import PolicySpec
from torchpi.config import PRESETS, Pi0Config
from torchpi.devices import usable_device
from torchpi.engine.quantize import Quantization
from torchpi.errors import CheckpointError, MissingFileError
from torchpi.model.lora import LoraConfig
from torchpi.model.pi0 import Pi0
from torchpi.robots import EMBODIMENTS, get_embodiment
from torchpi.transforms.prompt import load_tokenizer

LoraChoice = Literal["fold", "keep"]
_opening: ContextVar[tuple[pathlib.Path, ...]] = ContextVar("opening", default=())
"""Folders whose bases are being opened."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers are read, and whose arrays are not."""

    address: str
    """The argument `path`."""
    root: pathlib.Path
    format: Format
    stored_config: Pi0Config
    """The sizes that the arrays have and the files beside them state; the rest is unset."""
    arrays: StoredArrays
    table: Callable[[Pi0Config], Table]
    """By the sizes, the arrays without LoRA's."""
    folded: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    """By the array that they change, the LoRA arrays of an openpi JAX checkpoint."""
    tied: str = ""
    """The array that is read as the embedding, where it has another name."""
    has_both: bool = False
    """The embedding is stored under both of its names, of which the option `embedding` chooses one."""
    dropped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Arrays that no computation reads, which are not loaded, and why."""
    document: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The config.json of the PyTorch formats."""
    policy_file: folder.PolicyFile | None = None
    """The policy.json of a policy folder."""
    quantization: Quantization | None = None
    """Of a quantized policy."""
    adapter: Adapter | None = None
    """The changes of a LoRA training, to be merged into the weights of `base`, whose arrays these are."""
    base: "Checkpoint | None" = None
    requested_config: Pi0Config | None = None
    """The sizes that `config=` asks for; None: the stored ones."""
    adapted: tuple[str, ...] = ()
    """Changes of sizes when the model is loaded, see `adapt`."""
    is_paligemma: bool = False
    """The arrays are PaliGemma's alone; what belongs to the actions is drawn."""
    overruled: tuple[str, ...] = ()
    """Statements of a file next to the arrays that `config=`, or else the arrays, overrule."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that holds the numbers of all arrays; what a LoRA training learned is float32."""
        is_half = self.adapter is None and {*self.arrays.dtypes.values()} == {torch.bfloat16}
        return torch.bfloat16 if is_half else torch.float32

    @property
    def config(self) -> Pi0Config:
        """The sizes of `model`."""
        return self.requested_config or self.stored_config

    @property
    def trained_action_dim(self) -> int:
        stated = None if self.policy_file is None else self.policy_file.trained_action_dim
        dims = (self.config.action_dim, self.stored_config.action_dim, *(() if stated is None else (stated,)))
        return 0 if self.is_paligemma else min(dims)

    def require_full_precision(self, purpose: str) -> None:
        """Refuse quantized weights where those that they were made of are needed."""
        if self.quantization is not None:
            raise CheckpointError(
                f"{self.address} is quantized to {self.quantization.kind} and can't be {purpose}; take the policy that "
                "it was made of, and quantize the result."
            )

    @property
    def notes(self) -> list[str]:
        """Messages on what is overruled and adapted."""
        adapted = [f"{self.root} was adapted: {'; '.join(self.adapted)}"] if self.adapted else []
        fresh = [f"{self.root} is PaliGemma: the action expert and the projections are drawn, and untrained"]
        return [*self.overruled, *adapted, *(fresh if self.is_paligemma else [])]

    def spec(self) -> PolicySpec:
        """Everything of a policy but the weights, as far as the checkpoint says it."""
        if self.policy_file is not None:
            return folder.read_spec(self.root, self.policy_file)
        if self.format == "lerobot":
            spec = lerobot.read_spec(self.root, self.document)
        else:
            name = published_name(self.address)
            spec = PolicySpec(
                source=str(self.root),
                embodiment=get_embodiment(name) if name in EMBODIMENTS else None,
                tokenizer=folder.tokenizer_file(self.root),
                assets=openpi.norm_stats_files(self.arrays.source.parent if self.format == "openpi-jax" else self.root),
            )
        return dataclasses.replace(spec, provenance={"source": self.address})

    def lora(self, alpha: tuple[float, float] | None, choice: LoraChoice = "fold") -> LoraConfig | None:
        """The LoRA of a JAX checkpoint, or None; an error where alpha is needed, or an option belongs to LoRA."""
        if self.folded:
            return stored_lora(self.arrays, alpha)
        if alpha is not None or choice == "keep":
            option = 'lora="keep"' if alpha is None else "lora_alpha="
            raise CheckpointError(
                f"{option} belongs to a checkpoint with LoRA weights, which openpi's JAX checkpoints may have; "
                f"{self.root} ({self.format}) has none."
            )
        return None

    def require_intact(self) -> None:
        require_intact((self.arrays.base if isinstance(self.arrays, peft.PeftArrays) else self.arrays).source)
        if self.adapter is not None:
            require_intact(self.root / ADAPTER_WEIGHTS)

    @torch.inference_mode(False)  # weights that were made in inference mode have no gradients ever after
    def model(
        self,
        *,
        dtype: torch.dtype | None = torch.float32,
        device: str | torch.device = "cpu",
        dtypes: Mapping[str, torch.dtype] | None = None,
        lora_alpha: tuple[float, float] | None = None,
        lora: LoraChoice = "fold",
        emulate_fp8: bool = False,
        rounding: Rounding | None = None,
        verify: bool = True,
    ) -> Pi0:
        """The model in eval mode, with gradients enabled; arguments as of `load_model` and `load_arrays`."""
        device = usable_device(device)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise CheckpointError(f"dtype is {dtype!r}; expected torch.float32, torch.bfloat16 or another of torch's.")
        matrices = self.lora(lora_alpha, lora)
        config = self.stored_config if self.adapted else self.config
        if self.adapter is not None and self.base is not None:
            # What was learned belongs to weights as they were in training; those are compared, too.
            is_wide = dtype is None or rounding is not None or self.adapter.base.dtype == "float32"
            wide = torch.float32 if is_wide else dtype
            base, alpha = dataclasses.replace(self.base, requested_config=config), None
            narrow = None if self.adapter.base.dtype == "float32" else dtypes
            if base.folded:  # LoRA that the adapter's training continued
                alpha = (self.adapter.lora.backbone_alpha, self.adapter.lora.expert_alpha)
            model = base.model(
                dtype=wide, device=device, dtypes=narrow, lora_alpha=alpha, lora="keep" if alpha else "fold",
                verify=verify,
            )  # fmt: skip
            merge_adapter(self.root, self.adapter, model, verify=verify)
            for name, parameter in model.named_parameters():
                own = (dtypes or {}).get(name, dtype or torch.float32)
                wide_data, parameter.data = parameter.data, parameter.data.to(own)
                if rounding is not None:
                    rounding.record(name, wide_data, parameter.data)
        else:
            table, fold = self.table(config), lora == "fold"
            if matrices is not None:
                table |= lora_table(config, matrices)
            model = load_arrays(
                self.arrays, table, config, dtype=dtype, device=device, dtypes=dtypes, lora=matrices, fold=fold,
                quantization=self.quantization, emulate_fp8=emulate_fp8, rounding=rounding,
            )  # fmt: skip
            if self.is_paligemma:
                draw_action_weights(model, seed=0)
            if verify:  # after what tells more about a file that does not fit
                self.require_intact()
        if self.adapted:
            adapt_model(model, self.config)
        model.trained_action_dim = self.trained_action_dim
        return model.eval()


def open_policy(
    path: str | pathlib.Path,
    *,
    config: ConfigLike | None = None,
    embedding: EmbeddingChoice | None = None,
    lora_alpha: tuple[float, float] | None = None,
    **requested: Any,
) -> tuple[Checkpoint, PolicySpec]:
    """The checkpoint and the spec of `load_policy`, which raises nothing else about its arguments and the headers."""
    checkpoint = open_checkpoint(path, config=config, embedding=embedding)
    checkpoint.lora(lora_alpha)
    spec = checkpoint.spec().requested(**requested).with_tokenizer(checkpoint.config.vocab_size)
    load_tokenizer(spec.tokenizer or "")
    return checkpoint, spec


def open_checkpoint(
    path: str | pathlib.Path,
    *,
    config: ConfigLike | None = None,
    adapt: bool = False,
    embedding: EmbeddingChoice | None = None,
) -> Checkpoint:
    """Read the headers of a checkpoint.

    Args:
        path: see `load_model`.
        config: sizes that the checkpoint does not say, or that overrule what it says; by default those of the published
            checkpoint whose address it is. It states the numbers of heads, which PyTorch's arrays do not.
        adapt: cut or extend the weights to `config` when the model is loaded.
        embedding: see `load_model`.
    """
    root = existing_folder(path)
    config = published_name(path) if config is None else config
    requested = None if config is None else read_config(config)
    checkpoint = _read_headers(str(path), root, requested, embedding)
    if embedding is not None and not checkpoint.has_both:
        raise CheckpointError(
            f"embedding={embedding!r} belongs to a PyTorch checkpoint that stores the embedding under two names; "
            f"{root} ({checkpoint.format}) does not. Leave it out."
        )
    if requested is None:
        if adapt:
            raise CheckpointError("adapt=True needs config=, the sizes to adapt to.")
        return checkpoint
    stored, explicit = checkpoint.stored_config, requested
    if not isinstance(explicit, Pi0Config):
        explicit = Pi0Config.from_dict(explicit, stored, where=str(config))
    if adapt:
        model = Pi0(stored, device="meta")
        model.trained_action_dim = checkpoint.trained_action_dim
        adapted = adapt_model(model, explicit)
        return dataclasses.replace(checkpoint, requested_config=explicit, adapted=tuple(adapted))
    in_file = "policy.json" if checkpoint.policy_file else "config.json" if checkpoint.document else ""
    overruled = overrule(root, stored, explicit, in_file=in_file)
    return dataclasses.replace(checkpoint, requested_config=explicit, overruled=(*checkpoint.overruled, *overruled))


def load_model(
    path: str | pathlib.Path,
    *,
    config: ConfigLike | None = None,
    adapt: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    lora_alpha: tuple[float, float] | None = None,
    lora: LoraChoice = "fold",
    embedding: EmbeddingChoice | None = None,
    emulate_fp8: bool = False,
    verify: bool = True,
) -> Pi0:
    """Load a model from a policy folder, or a checkpoint of openpi (JAX or PyTorch) or LeRobot.

    Every array is consumed or named in an error; those that no computation reads are known and left out, see
    `Checkpoint.dropped`. Sizes come from the arrays; what they do not hold (in a JAX checkpoint action_horizon,
    max_token_len and discrete_state_input) comes from `config`, or stays unset.

    Args:
        path: the folder of a checkpoint, or a file of it; for openpi's JAX also `params` itself, the folder of a
            training run with a single step, or an .npz file (PaliGemma's: the action expert is drawn);
            an address hf://… or gs://…; or "demo", the embedded policy.
        config: a Pi0Config, a dict of its fields or a JSON file (either may be partial), or the name of a preset.
        adapt: cut or extend the weights to the action_dim of `config`, and take its horizon and max_token_len.
        dtype: of the weights, and so of the computation.
        device: where the weights go.
        lora_alpha: of the backbone and the action expert in a JAX LoRA checkpoint, which does not say it; by default
            openpi's (16, 32) where the ranks are openpi's, 16 and 32, and with other ranks it must be stated.
        lora: what becomes of the LoRA weights in a JAX checkpoint: "fold" adds them to those that they change, "keep"
            attaches them to the model, in float32, to be trained on.
        embedding: the name that counts in a PyTorch checkpoint that stores the embedding under both, differently.
        emulate_fp8: compute fp8 in float32 with the same rounding, as on a CPU; for GPUs without fp8.
        verify: compare the weights files with their checksums, where there are any (torchpi writes them).

    Returns:
        The model in eval mode, with gradients enabled.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: it is in no format, or in two; arrays are missing, left over, misshapen, damaged, not `config`'s.

    Warns: what `adapt` has done; what `config` overrules in a file next to the arrays; what is not in the file.
    """
    checkpoint = open_checkpoint(path, config=config, adapt=adapt, embedding=embedding)
    for note in checkpoint.notes:
        warnings.warn(note, stacklevel=2)
    return checkpoint.model(
        dtype=dtype, device=device, lora_alpha=lora_alpha, lora=lora, emulate_fp8=emulate_fp8, verify=verify
    )


def _read_headers(
    address: str,
    root: pathlib.Path,
    requested: Pi0Config | Mapping[str, Any] | None,
    embedding: EmbeddingChoice | None = None,
) -> Checkpoint:
    kind, weights, document = probe(root)
    if kind == "torchpi":
        return _open_policy_folder(address, root)
    if peft.is_peft(root):
        return _open_peft(address, root, document, requested, embedding)
    if kind == "openpi-jax":
        arrays: StoredArrays = NpzArrays(weights) if weights.is_file() else openpi.JaxArrays(weights)
        if arrays.shapes and all(name.startswith("PaliGemma.") for name in arrays.shapes):
            return _open_paligemma(address, root, arrays, requested)
        sizes: Callable[[], Pi0Config] = partial(jax_config, arrays.shapes)
        own: dict[str, Any] = {"table": jax_table}
    else:
        stored = SafetensorsArrays(root)
        if "backbone.final_norm.scale" in stored.shapes:
            raise CheckpointError(
                f"{root} has the weights of a policy folder, but no policy.json; get all files again."
            )
        lerobot.require_readable(root, document, stored.shapes)
        arrays = ported = TorchArrays(stored, embedding)
        sizes = partial(torch_config, arrays.shapes, stated_heads(requested or {}))
        own = {"table": torch_table, "tied": ported.tied, "dropped": ported.dropped, "has_both": ported.has_both}
    try:
        from_arrays = sizes()
    except ValueError as error:
        raise CheckpointError(f"{weights}: {error}") from error
    if kind == "openpi-jax":
        own["folded"] = lora_pairs(arrays)
    file = root / "config.json"
    stated = stated_sizes(file, document, is_lerobot=kind == "lerobot")
    config, contradicted = add_stated(from_arrays, stated, file, may_contradict=requested is not None)
    return Checkpoint(address, root, kind, config, arrays, document=document, overruled=tuple(contradicted), **own)


def _open_paligemma(
    address: str, root: pathlib.Path, arrays: StoredArrays, requested: Pi0Config | Mapping[str, Any] | None
) -> Checkpoint:
    """PaliGemma's weights alone: the published file, from which a training begins."""
    if arrays.source.is_dir():
        raise CheckpointError(
            f"{root} has no action expert, as π₀-FAST has none, which is not read yet; π₀ and π₀.₅ checkpoints are."
        )
    if requested is None:
        raise CheckpointError(
            f"{root} is PaliGemma, which has no action expert: say which model begins from it, config= "
            f"with {', '.join(PRESETS)}, or a JSON file."
        )
    config = requested if isinstance(requested, Pi0Config) else Pi0Config.from_dict(requested)
    return Checkpoint(address, root, "openpi-jax", config, arrays, paligemma_table, is_paligemma=True)


@contextlib.contextmanager
def _naming_base(root: pathlib.Path, base: str) -> Iterator[None]:
    """Name the folder in errors about its base; one that leads back to the folder is an error."""
    if root.resolve() in _opening.get():
        raise CheckpointError(f"{root} holds the changes of a LoRA training to {base}, which leads back to it.")
    token = _opening.set((*_opening.get(), root.resolve()))
    try:
        yield
    except FileNotFoundError as error:
        raise MissingFileError(f"{root} holds the changes of a LoRA training to {base}: {error}") from error
    finally:
        _opening.reset(token)


def _open_peft(
    address: str,
    root: pathlib.Path,
    document: Mapping[str, Any],
    requested: Pi0Config | Mapping[str, Any] | None,
    embedding: EmbeddingChoice | None,
) -> Checkpoint:
    """An adapter of PEFT, folded into its base."""
    adapter, origin = peft.read_adapter_config(root, document)
    with _naming_base(root, origin):
        base = _read_headers(origin, existing_folder(origin), requested, embedding)
    if base.format not in ("lerobot", "openpi-pytorch"):
        raise CheckpointError(f"{root} holds an adapter of {origin}, which is {base.format}; expected LeRobot's base.")
    document, arrays = document or base.document, peft.PeftArrays(root, adapter, base.arrays)
    stated = stated_sizes(root / "config.json", document, is_lerobot=True)
    unset = dataclasses.replace(base.stored_config, action_horizon=None, max_token_len=None)
    config, overruled = add_stated(unset, stated, root / "config.json", may_contradict=requested is not None)
    return dataclasses.replace(
        base, address=address, root=root, format="lerobot", stored_config=config,
        arrays=arrays, document=document, overruled=tuple(overruled), dropped={**base.dropped, **arrays.dropped},
    )  # fmt: skip


def _open_policy_folder(address: str, root: pathlib.Path) -> Checkpoint:
    policy_file, config = folder.read_policy_file(root)
    if not is_adapter(root):
        quantization = policy_file.quantization
        arrays = SafetensorsArrays(root, quantized=quantization.dtypes if quantization else None)
        table = partial(own_table, quantization=quantization)
        return Checkpoint(
            address, root, "torchpi", config, arrays, table, policy_file=policy_file, quantization=quantization
        )
    adapter = read_adapter(root)
    with _naming_base(root, adapter.base.address):
        base = open_checkpoint(adapter.base.address, config=config, adapt=True)  # as the training may have done
    return Checkpoint(
        address, root, "torchpi", config, base.arrays, base.table, tied=base.tied, dropped=base.dropped,
        policy_file=policy_file, adapter=adapter, base=base,
    )  # fmt: skip

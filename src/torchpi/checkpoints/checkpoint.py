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
"""Adapter folders whose base is being opened, to detect cycles."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers have been read, but not its arrays."""

    address: str
    """The argument `path`."""
    root: pathlib.Path
    format: Format
    stored_config: Pi0Config
    """The sizes of the arrays, completed by the files next to them; the other fields are unset."""
    arrays: StoredArrays
    table: Callable[[Pi0Config], Table]
    """The table of arrays for given sizes, without LoRA arrays."""
    folded: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    """LoRA arrays A and B of an openpi JAX checkpoint, by the array that they update."""
    tied: str = ""
    """The array that is read as the embedding, if it is stored under another name."""
    has_both: bool = False
    """The embedding is stored under both of its names; the option `embedding` chooses one."""
    dropped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Arrays that are not loaded because no computation reads them, each with the reason."""
    document: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The config.json of the PyTorch formats."""
    policy_file: folder.PolicyFile | None = None
    """The policy.json of a policy folder."""
    quantization: Quantization | None = None
    adapter: Adapter | None = None
    """LoRA adapter to merge into the weights of `base`; `arrays` are those of `base`."""
    base: "Checkpoint | None" = None
    requested_config: Pi0Config | None = None
    """The sizes in `config=`; None: the stored ones."""
    is_adapted: bool = False
    """The model is cut or extended to `requested_config` when it is loaded."""
    is_paligemma: bool = False
    """The arrays are only PaliGemma's; the action weights are drawn at random."""
    notes: tuple[str, ...] = ()
    """Warnings for the user about contradictions, adapted sizes and untrained weights."""

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds all arrays without rounding; adapters are float32."""
        is_bfloat16 = self.adapter is None and {*self.arrays.dtypes.values()} == {torch.bfloat16}
        return torch.bfloat16 if is_bfloat16 else torch.float32

    @property
    def config(self) -> Pi0Config:
        """The sizes of `model`."""
        return self.requested_config or self.stored_config

    @property
    def trained_action_dim(self) -> int:
        if self.is_paligemma:
            return 0
        dims = [self.config.action_dim, self.stored_config.action_dim]
        if self.policy_file is not None and self.policy_file.trained_action_dim is not None:
            dims.append(self.policy_file.trained_action_dim)
        return min(dims)

    def require_full_precision(self, purpose: str) -> None:
        """Raise an error if the weights are quantized; `purpose` completes "can't be …"."""
        if self.quantization is not None:
            raise CheckpointError(
                f"{self.address} is quantized to {self.quantization.kind} and can't be {purpose}; take the policy that "
                "it was made from, and quantize the result."
            )

    def spec(self) -> PolicySpec:
        """Everything that the checkpoint states about its policy, except the weights."""
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
        """LoRA config of an openpi JAX checkpoint; None if it has no LoRA.

        Raises:
            ValueError: alpha is needed but unknown, or an option for LoRA is passed and there is none.
        """
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

    @torch.inference_mode(False)  # tensors created in inference mode can never have gradients
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
        """Load the model in eval mode, with gradients enabled; for the arguments see `load_model` and `load_arrays`."""
        device = usable_device(device)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise CheckpointError(f"dtype is {dtype!r}; expected torch.float32, torch.bfloat16 or another of torch's.")
        stored_lora_config = self.lora(lora_alpha, lora)
        config = self.stored_config if self.is_adapted else self.config
        if self.adapter is not None:
            model = self._merged_model(config, dtype, device, dtypes or {}, rounding, verify=verify)
        else:
            table = self.table(config)
            if stored_lora_config is not None:
                table |= lora_table(config, stored_lora_config)
            model = load_arrays(
                self.arrays, table, config, dtype=dtype, device=device, dtypes=dtypes, lora=stored_lora_config,
                fold=lora == "fold", quantization=self.quantization, emulate_fp8=emulate_fp8, rounding=rounding,
            )  # fmt: skip
            if self.is_paligemma:
                draw_action_weights(model, seed=0)
            if verify:  # last, since the errors above say more about files that do not belong together
                self.require_intact()
        if self.is_adapted:
            adapt_model(model, self.config)
        model.trained_action_dim = self.trained_action_dim
        return model.eval()

    def _merged_model(
        self, config: Pi0Config, dtype: torch.dtype | None, device: str | torch.device,
        dtypes: Mapping[str, torch.dtype], rounding: Rounding | None, *, verify: bool,
    ) -> Pi0:  # fmt: skip
        """Load the base, merge the adapter into it, and cast the result."""
        assert self.adapter is not None
        assert self.base is not None
        # The adapter belongs to the base weights as they were rounded in training; `merge_adapter` compares these.
        was_float32 = self.adapter.base.dtype == "float32"
        base_dtype = torch.float32 if was_float32 or dtype is None or rounding is not None else dtype
        base, alpha = dataclasses.replace(self.base, requested_config=config), None
        if base.folded:  # the adapter contains this LoRA, trained further
            alpha = (self.adapter.lora.backbone_alpha, self.adapter.lora.expert_alpha)
        model = base.model(
            dtype=base_dtype, device=device, dtypes=None if was_float32 else dtypes,
            lora_alpha=alpha, lora="keep" if alpha else "fold", verify=verify,
        )  # fmt: skip
        merge_adapter(self.root, self.adapter, model, verify=verify)
        for name, parameter in model.named_parameters():
            merged = parameter.data
            parameter.data = merged.to(dtypes.get(name, dtype or torch.float32))
            if rounding is not None:
                rounding.record(name, merged, parameter.data)
        return model


def open_policy(
    path: str | pathlib.Path,
    *,
    config: ConfigLike | None = None,
    embedding: EmbeddingChoice | None = None,
    lora_alpha: tuple[float, float] | None = None,
    **requested: Any,
) -> tuple[Checkpoint, PolicySpec]:
    """Open what `load_policy` loads, and check all of its arguments except the weights."""
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
        config: sizes that the checkpoint does not state, or that overrule what it states; by default those of the
            published checkpoint at this address. They include the numbers of heads, which are not in PyTorch's arrays.
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
    stored, changes = checkpoint.stored_config, list[str]()
    if not isinstance(requested, Pi0Config):
        requested = Pi0Config.from_dict(requested, stored, where=str(config))
    if adapt:
        model = Pi0(stored, device="meta")
        model.trained_action_dim = checkpoint.trained_action_dim
        changes = adapt_model(model, requested)
        notes = [f"{root} was adapted: {'; '.join(changes)}"] if changes else []
    else:
        stating_file = "policy.json" if checkpoint.policy_file else "config.json" if checkpoint.document else ""
        notes = overrule(root, stored, requested, in_file=stating_file)
    return dataclasses.replace(
        checkpoint, requested_config=requested, is_adapted=bool(changes), notes=(*checkpoint.notes, *notes)
    )


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

    Every array is loaded or named in an error, except those in `Checkpoint.dropped`, which no computation reads. Sizes
    come from the arrays; sizes that are in no array (action_horizon, max_token_len and discrete_state_input of a JAX
    checkpoint) come from `config`, or stay unset.

    Args:
        path: the folder of a checkpoint, or a file in it; for openpi's JAX format also the folder `params`, the folder
            of a training run with a single step, or an .npz file (PaliGemma's, with a random action expert); an
            address hf://… or gs://…; or "demo", the embedded policy.
        config: a Pi0Config, a dict of its fields or a JSON file (either may be partial), or the name of a preset.
        adapt: cut or extend the weights to the action_dim of `config`, and take its action_horizon and max_token_len.
        dtype: dtype of the weights and of the computation.
        device: device of the weights.
        lora_alpha: alphas of the backbone and the action expert for a JAX LoRA checkpoint, which does not store them;
            by default openpi's (16, 32) if the ranks are openpi's, 16 and 32; required for other ranks.
        lora: "fold" merges the LoRA weights of a JAX checkpoint into the base weights; "keep" attaches them to the
            model in float32, to continue their training.
        embedding: which array to read from a PyTorch checkpoint that stores two different ones for the embedding.
        emulate_fp8: compute fp8 in float32 with the same rounding, as on a CPU; for GPUs without fp8.
        verify: compare the weights files with their checksums, if there are any (torchpi writes them).

    Returns:
        The model in eval mode, with gradients enabled.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: the format is unknown or ambiguous; arrays are missing, left over, misshapen or damaged, or
            contradict `config`.

    Warns: about sizes that `adapt` changes, statements in files that `config` overrules, and untrained weights.
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
    format_, weights, document = probe(root)
    if format_ == "torchpi":
        return _open_policy_folder(address, root)
    if peft.is_peft(root):
        return _open_peft(address, root, document, requested, embedding)
    fields: dict[str, Any]
    if format_ == "openpi-jax":
        arrays: StoredArrays = NpzArrays(weights) if weights.is_file() else openpi.JaxArrays(weights)
        if arrays.shapes and all(name.startswith("PaliGemma.") for name in arrays.shapes):
            return _open_paligemma(address, root, arrays, requested)
        fields = {"table": jax_table}
    else:
        stored = SafetensorsArrays(root)
        if "backbone.final_norm.scale" in stored.shapes:
            raise CheckpointError(
                f"{root} has the weights of a policy folder, but no policy.json; get all files again."
            )
        lerobot.require_readable(root, document, stored.shapes)
        arrays = ported = TorchArrays(stored, embedding)
        fields = {"table": torch_table, "tied": ported.tied, "dropped": ported.dropped, "has_both": ported.has_both}
    try:
        if format_ == "openpi-jax":
            config = jax_config(arrays.shapes)
        else:
            config = torch_config(arrays.shapes, stated_heads(requested or {}))
    except ValueError as error:
        raise CheckpointError(f"{weights}: {error}") from error
    if format_ == "openpi-jax":
        fields["folded"] = lora_pairs(arrays)
    file = root / "config.json"
    stated = stated_sizes(file, document, is_lerobot=format_ == "lerobot")
    config, notes = add_stated(config, stated, file, may_contradict=requested is not None)
    return Checkpoint(address, root, format_, config, arrays, document=document, notes=tuple(notes), **fields)


def _open_paligemma(
    address: str, root: pathlib.Path, arrays: StoredArrays, requested: Pi0Config | Mapping[str, Any] | None
) -> Checkpoint:
    """Open PaliGemma's published weights, the initialization of a training from scratch."""
    if arrays.source.is_dir():
        raise CheckpointError(
            f"{root} has no action expert, like π₀-FAST checkpoints, which are not supported yet; π₀ and π₀.₅ are."
        )
    if requested is None:
        raise CheckpointError(
            f"{root} is PaliGemma, which has no action expert: choose the model to build from it with config=, one of "
            f"{', '.join(PRESETS)}, or a JSON file."
        )
    config = requested if isinstance(requested, Pi0Config) else Pi0Config.from_dict(requested)
    note = f"{root} is PaliGemma: the action expert and the projections are drawn at random, and untrained"
    return Checkpoint(address, root, "openpi-jax", config, arrays, paligemma_table, is_paligemma=True, notes=(note,))


@contextlib.contextmanager
def _opening_base(root: pathlib.Path, base: str) -> Iterator[None]:
    """Name the adapter's folder in errors about its base; a cycle of bases is an error."""
    if root.resolve() in _opening.get():
        raise CheckpointError(f"{root} is a LoRA adapter for {base}, which leads back to this adapter.")
    token = _opening.set((*_opening.get(), root.resolve()))
    try:
        yield
    except FileNotFoundError as error:
        raise MissingFileError(f"{root} is a LoRA adapter for {base}: {error}") from error
    finally:
        _opening.reset(token)


def _open_peft(
    address: str,
    root: pathlib.Path,
    document: Mapping[str, Any],
    requested: Pi0Config | Mapping[str, Any] | None,
    embedding: EmbeddingChoice | None,
) -> Checkpoint:
    """Open an adapter of PEFT, folded into its base."""
    adapter_config, base_address = peft.read_adapter_config(root, document)
    with _opening_base(root, base_address):
        base = _read_headers(base_address, existing_folder(base_address), requested, embedding)
    if base.format not in ("lerobot", "openpi-pytorch"):
        raise CheckpointError(
            f"{root} holds an adapter for {base_address}, which is {base.format}; expected a base in LeRobot's format."
        )
    document, arrays = document or base.document, peft.PeftArrays(root, adapter_config, base.arrays)
    stated = stated_sizes(root / "config.json", document, is_lerobot=True)
    config = dataclasses.replace(base.stored_config, action_horizon=None, max_token_len=None)
    config, notes = add_stated(config, stated, root / "config.json", may_contradict=requested is not None)
    return dataclasses.replace(
        base, address=address, root=root, format="lerobot", stored_config=config,
        arrays=arrays, document=document, notes=tuple(notes), dropped={**base.dropped, **arrays.dropped},
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
    with _opening_base(root, adapter.base.address):
        base = open_checkpoint(adapter.base.address, config=config, adapt=True)  # the training may have adapted it, too
    return Checkpoint(
        address, root, "torchpi", config, base.arrays, base.table, tied=base.tied, dropped=base.dropped,
        policy_file=policy_file, adapter=adapter, base=base,
    )  # fmt: skip

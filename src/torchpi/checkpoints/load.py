"""Reading weights: one entry for every format, recognised by what is in the folder, never by its name."""

import dataclasses
import pathlib
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import torch

from torchpi.assets import assets
from torchpi.checkpoints import folder, openpi
from torchpi.checkpoints.adapt import adapt as adapt_model
from torchpi.checkpoints.adapter import digest, is_adapter, load_adapter, read_adapter
from torchpi.checkpoints.layout import Arrays, Leaf, load_leaves, own_leaves
from torchpi.checkpoints.lora import DEFAULT_ALPHA, FoldedArrays, stored_lora
from torchpi.checkpoints.openpi_layout import config_from_shapes, jax_leaves, lora_leaves
from torchpi.checkpoints.openpi_torch import Heads, TorchArrays, torch_config, torch_leaves
from torchpi.checkpoints.safetensors_files import INDEX, SINGLE, SafetensorsArrays, has_weights
from torchpi.config import PRESETS, Pi0Config, preset, read_json_object
from torchpi.errors import CheckpointError, MissingFileError
from torchpi.model.lora import LoraConfig, is_lora, merge_lora
from torchpi.model.pi0 import Pi0

PUBLISHED = "gs://openpi-assets/checkpoints/"
Format = Literal["torchpi", "openpi-jax", "openpi-pytorch", "lerobot"]
LoraChoice = Literal["fold", "keep"]

# A path may name one of these instead of its folder.
_FILES_OF_FORMATS = ("policy.json", "config.json", SINGLE, INDEX, "_METADATA", "manifest.ocdbt")
_UNREAD_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".zip", ".npz", ".msgpack")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers are read, and whose arrays are not."""

    root: pathlib.Path
    format: Format
    config: Pi0Config
    """The sizes that the arrays have, and what files beside them say; the rest is unset."""
    arrays: Arrays
    leaves: Callable[[Pi0Config], dict[str, Leaf]]
    dtype: torch.dtype
    """As stored."""
    folded: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    """By the array that they change, the LoRA arrays that are folded into it."""
    lora: LoraConfig | None = None
    """The LoRA arrays that are kept beside those that they change."""
    tied: str = ""
    """The array that is read as the embedding, where it has another name."""
    dropped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Arrays that no computation reads, which are not loaded, and why."""
    document: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The config.json of the PyTorch formats."""
    adapter: pathlib.Path | None = None
    """The folder of what a LoRA training has changed, which is merged into the arrays; they are its base's."""

    def load(self, config: Pi0Config, *, dtype: torch.dtype, device: str | torch.device) -> Pi0:
        """The model, in eval mode."""
        leaves = self.leaves(config)
        if self.lora is not None:
            leaves |= lora_leaves(config, self.lora)
        if self.adapter is None:
            return load_leaves(self.arrays, leaves, config, dtype=dtype, device=device, lora=self.lora).eval()
        # What was learned belongs to weights as they were in training; those are compared, too.
        wide = torch.float32 if read_adapter(self.adapter).base["dtype"] == "float32" else dtype
        model = load_leaves(self.arrays, leaves, config, dtype=wide, device=device, lora=self.lora).eval()
        _merge_adapter(self.adapter, model)
        return model.to(dtype)


def load_model(
    path: str | pathlib.Path,
    *,
    config: Pi0Config | str | pathlib.Path | None = None,
    adapt: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    lora_alpha: tuple[float, float] | None = None,
    lora: LoraChoice = "fold",
) -> Pi0:
    """Load a model from a policy folder, or a checkpoint of openpi (JAX or PyTorch) or LeRobot.

    Every array is consumed or named in an error; those that no computation reads are known and left out, see
    `open_checkpoint`. Sizes come from the arrays; what they do not hold (in a JAX checkpoint action_horizon,
    max_token_len and discrete_state_input) comes from `config`, or stays unset.

    Args:
        path: the folder of a checkpoint, or a file of it; for openpi's JAX also `params` itself, or the folder of a
            training run with a single step; or "demo", the embedded policy.
        config: a Pi0Config, a JSON file (may be partial), or the name of a preset.
        adapt: cut or extend the weights to the action_dim of `config`, and take its action_horizon and max_token_len.
        dtype: of the weights, and so of the computation.
        device: where the weights go.
        lora_alpha: of the backbone and the action expert in a JAX LoRA checkpoint, which does not say it; by default
            openpi's, (16, 32).
        lora: what becomes of the LoRA weights in a JAX checkpoint: "fold" adds them to those that they change, "keep"
            attaches them to the model, in float32, to be trained on.

    Returns:
        The model in eval mode, with gradients enabled.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: it is in no known format, or in two; arrays are missing, left over, misshapen or unreadable; or
            `config` contradicts them.

    Warns: what `adapt` has done; what `config` overrules in a file beside the arrays.
    """
    config = published_name(path) if config is None else config
    checkpoint = open_checkpoint(existing_folder(path), config=config, lora_alpha=lora_alpha, lora=lora)
    if not adapt:
        return checkpoint.load(resolve_config(checkpoint, config), dtype=dtype, device=device)
    if config is None:
        raise CheckpointError("adapt=True needs config=, the sizes to adapt to.")
    model = checkpoint.load(checkpoint.config, dtype=dtype, device=device)
    report = adapt_model(model, _explicit(config, checkpoint.config))
    if report:
        warnings.warn(f"{checkpoint.root} was adapted: {'; '.join(report)}", stacklevel=2)
    return model


def existing_file(path: str | pathlib.Path) -> pathlib.Path:
    """The path, or what an address leads to, fetched into the cache."""
    if not str(path).startswith(("hf://", "gs://")):
        return pathlib.Path(path).expanduser()
    from torchpi.checkpoints.hub import fetch  # brings huggingface_hub

    return fetch(str(path))


def existing_folder(path: str | pathlib.Path) -> pathlib.Path:
    """The folder that holds a checkpoint; "demo" is the packaged one of the embedded policy, and what an address leads
    to is fetched into the cache.
    """
    root = assets() / "demo_policy" if str(path) == "demo" else existing_file(path)
    if not root.exists():
        hint = f"; the published one is {PUBLISHED}{path}" if str(path) in PRESETS else ""
        raise MissingFileError(f"There is no checkpoint at {root}{hint}.")
    if root.is_dir():
        return root
    if root.name in _FILES_OF_FORMATS:
        return root.parent
    if root.suffix in _UNREAD_SUFFIXES:
        raise CheckpointError(
            f"{root} is not read: a zip or pickle can run code, and nothing is ever unpickled. Give the folder of a "
            "checkpoint with safetensors or OCDBT files."
        )
    raise CheckpointError(
        f"{root} is a file; expected the folder of a checkpoint, or its {' or '.join(_FILES_OF_FORMATS)}."
    )


def published_name(path: str | pathlib.Path) -> str | None:
    """The name of a published openpi checkpoint, if the address is one's: what is in no array of it is known."""
    name = str(path).rstrip("/").removeprefix(PUBLISHED)
    return name if name in PRESETS and str(path).startswith(PUBLISHED) else None


def format_of(root: pathlib.Path) -> Format:
    """The format of the checkpoint in a folder."""
    found: list[Format] = []
    if folder.is_policy_folder(root):
        found.append("torchpi")
    if (root / "config.json").is_file() and has_weights(root):
        found.append("lerobot" if "type" in read_json_object(root / "config.json") else "openpi-pytorch")
    elif has_weights(root) and not found:
        found.append("openpi-pytorch")
    if openpi.find_params(root) is not None:
        found.append("openpi-jax")
    if len(found) > 1:
        raise CheckpointError(
            f"{root} holds checkpoints in two formats, {' and '.join(found)}; move one to a folder of its own."
        )
    if not found:
        raise CheckpointError(_unknown_format(root))
    return found[0]


def open_checkpoint(
    root: pathlib.Path,
    *,
    config: Pi0Config | str | pathlib.Path | None = None,
    lora_alpha: tuple[float, float] | None = None,
    lora: LoraChoice = "fold",
) -> Checkpoint:
    """Read the headers of the checkpoint in a folder.

    Args:
        config: is asked for the numbers of heads, which PyTorch's arrays do not say.
        lora_alpha, lora: see `load_model`.
    """
    kind = format_of(root)
    if kind == "openpi-jax":
        return _open_jax(root, lora_alpha, lora)
    if lora_alpha is not None or lora == "keep":
        option = 'lora="keep"' if lora_alpha is None else "lora_alpha="
        raise CheckpointError(f"{option} belongs to a JAX checkpoint with LoRA weights; {root} is {kind}.")
    if kind == "torchpi" and is_adapter(root):
        return _open_adapter(root, folder.read_policy_json(root).model)
    stored = SafetensorsArrays(root)
    if kind == "torchpi":
        own = folder.read_policy_json(root).model
        return Checkpoint(root, kind, own, stored, own_leaves, stored.dtype)
    document = read_json_object(root / "config.json") if (root / "config.json").is_file() else {}
    arrays = TorchArrays(stored)
    try:
        from_arrays = torch_config(arrays.shapes, _heads(config))
    except ValueError as error:
        raise CheckpointError(f"{root}: {error}") from error
    stated = _stated(root, kind, document)
    merged = _beside(root, from_arrays, stated, overruled=config is not None)
    return Checkpoint(
        root, kind, merged, arrays, torch_leaves, stored.dtype, tied=arrays.tied, dropped=arrays.dropped,
        document=document,
    )  # fmt: skip


def _open_adapter(root: pathlib.Path, config: Pi0Config) -> Checkpoint:
    """A policy folder whose weights are a base's, changed by what LoRA has learned."""
    adapter = read_adapter(root)
    address = adapter.base["address"]
    try:
        base = open_checkpoint(existing_folder(address), config=config)
        if base.folded:  # it had LoRA before, which the adapter has learned on
            alpha = (adapter.lora.backbone_alpha, adapter.lora.expert_alpha)
            base = open_checkpoint(base.root, config=config, lora_alpha=alpha, lora="keep")
    except FileNotFoundError as error:
        raise MissingFileError(f"{root} holds what a LoRA training has changed in {address}: {error}") from error
    # What was learned is float32, whatever the base is stored in.
    return dataclasses.replace(base, root=root, format="torchpi", config=config, dtype=torch.float32, adapter=root)


@torch.no_grad()
def _merge_adapter(root: pathlib.Path, model: Pi0) -> None:
    adapter = read_adapter(root)
    dtype = getattr(torch, adapter.base["dtype"])  # what was trained beside them saw them rounded
    frozen = {name: p for name, p in model.named_parameters() if name not in adapter.trained and not is_lora(name)}
    for parameter in frozen.values():
        parameter.copy_(parameter.to(dtype))
    expected = adapter.base.get("sha256")
    if expected is not None and expected != digest(frozen, lambda name: frozen[name].to("cpu", dtype)):
        raise CheckpointError(
            f"{root} holds what a LoRA training has changed in {adapter.base['address']}, but what is there now has "
            "other weights than it was trained with; bring the base back."
        )
    load_adapter(root, model)
    merge_lora(model)


def _open_jax(root: pathlib.Path, lora_alpha: tuple[float, float] | None, lora: LoraChoice) -> Checkpoint:
    params = openpi.find_params(root)
    assert params is not None
    stored = openpi.JaxArrays(params)
    arrays: Arrays = stored
    folded: Mapping[str, tuple[str, str]] = {}
    kept: LoraConfig | None = None
    if any("lora_" in name for name in stored.shapes):
        with_lora = FoldedArrays(stored, lora_alpha or DEFAULT_ALPHA)  # also checks that they are complete
        if lora == "keep":
            kept = stored_lora(stored.shapes, lora_alpha or DEFAULT_ALPHA)
        else:
            arrays, folded = with_lora, with_lora.pairs
    elif lora_alpha is not None or lora == "keep":
        option = 'lora="keep"' if lora_alpha is None else "lora_alpha="
        raise CheckpointError(f"{option} belongs to a checkpoint with LoRA weights; {params} has none.")
    try:
        from_arrays = config_from_shapes(arrays.shapes)
    except ValueError as error:
        raise CheckpointError(f"{params}: {error}") from error
    return Checkpoint(root, "openpi-jax", from_arrays, arrays, jax_leaves, stored.dtype, folded=folded, lora=kept)


def norm_stats_files(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """By asset id (which may contain '/'), the norm_stats.json files that belong to a checkpoint of openpi."""
    params = openpi.find_params(root)
    folder_of_assets = (root if params is None else params.parent) / "assets"
    files = sorted(folder_of_assets.rglob("norm_stats.json"))
    return {file.parent.relative_to(folder_of_assets).as_posix(): file for file in files}


def resolve_config(checkpoint: Checkpoint, config: Pi0Config | str | pathlib.Path | None) -> Pi0Config:
    """The checkpoint's sizes, with what `config` adds or overrules.

    Warns: about what it overrules in a policy.json.
    """
    own = checkpoint.config
    if config is None:
        return own
    explicit = _explicit(config, own)
    if checkpoint.format == "torchpi":
        if differences := _differences(explicit, own):  # a variant's name and its sizes are the same
            warnings.warn(f"{checkpoint.root}: config= overrides {differences}", stacklevel=3)
        return explicit
    not_in_arrays = {"action_horizon", "max_token_len", "discrete_state_input"}
    if own.siglip.position != "learned":
        not_in_arrays.add("image_size")
    if contradictions := _differences(explicit, own, except_for=not_in_arrays):
        raise CheckpointError(
            f"config= contradicts the checkpoint's arrays: {contradictions}. adapt=True cuts or extends action_dim."
        )
    stated = [field for field in not_in_arrays if getattr(own, field) not in (None, getattr(explicit, field))]
    if stated and checkpoint.document:
        differences = "; ".join(f"{field} {getattr(own, field)} with {getattr(explicit, field)}" for field in stated)
        warnings.warn(f"{checkpoint.root / 'config.json'}: config= overrides {differences}", stacklevel=3)
    return explicit


def _explicit(config: Pi0Config | str | pathlib.Path, base: Pi0Config) -> Pi0Config:
    if isinstance(config, Pi0Config):
        return config
    if isinstance(config, str) and config in PRESETS:
        return preset(config)
    if isinstance(config, str) and not pathlib.Path(config).is_file():
        raise CheckpointError(f"config={config!r} is neither a file nor a preset; presets are {', '.join(PRESETS)}.")
    return Pi0Config.from_json(config, base)


def _heads(config: Pi0Config | str | pathlib.Path | None) -> Heads | None:
    """The numbers of heads that a config states; None: it states none."""
    if isinstance(config, str) and config in PRESETS:
        config = preset(config)
    if isinstance(config, Pi0Config):
        return Heads(config.siglip.num_heads, config.paligemma.num_heads, config.paligemma.num_kv_heads)
    if config is None or not pathlib.Path(config).is_file():
        return None
    document = read_json_object(config)
    try:
        backbone = document["paligemma"]
        return Heads(document["siglip"]["num_heads"], backbone["num_heads"], backbone["num_kv_heads"])
    except (KeyError, TypeError):
        return None


# What the two PyTorch formats call our fields; variants' names are names of code there, and say no sizes.
_OPENPI_FIELDS = {"action_dim": "action_dim", "action_horizon": "action_horizon"}
_LEROBOT_FIELDS = {
    "action_dim": "max_action_dim",
    "action_horizon": "chunk_size",
    "max_token_len": "tokenizer_max_length",
}


def _stated(root: pathlib.Path, kind: Format, document: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields out of a config.json."""
    fields = _LEROBOT_FIELDS if kind == "lerobot" else _OPENPI_FIELDS
    stated = {ours: document[theirs] for ours, theirs in fields.items() if theirs in document}
    for field, value in stated.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"{root / 'config.json'}: {fields[field]} must be a positive integer, found {value!r}."
            )
    if kind == "lerobot":
        if document["type"] not in ("pi0", "pi05"):
            raise CheckpointError(
                f"{root / 'config.json'}: type is {document['type']!r}; pi0 and pi05 policies are read."
            )
        stated["pi05"] = stated["discrete_state_input"] = document["type"] == "pi05"
        resolution = document.get("image_resolution")
        if resolution:
            if not isinstance(resolution, list) or len(set(resolution)) != 1:
                raise CheckpointError(
                    f"{root / 'config.json'}: image_resolution is {resolution}; only squares are read."
                )
            stated["image_size"] = resolution[0]
    return stated


def _beside(root: pathlib.Path, from_arrays: Pi0Config, stated: Mapping[str, Any], *, overruled: bool) -> Pi0Config:
    """The arrays' sizes, and from a file beside them what is in no array."""
    wrong = [
        f"{field} is {value} there, {getattr(from_arrays, field)} in the arrays"
        for field, value in stated.items()
        if getattr(from_arrays, field) not in (None, value)
    ]
    if wrong:
        message = f"{root / 'config.json'} contradicts the arrays: {'; '.join(wrong)}"
        if not overruled:
            raise CheckpointError(f"{message}. Correct it, or pass config=.")
        warnings.warn(message, stacklevel=4)
    unset = {field: value for field, value in stated.items() if getattr(from_arrays, field) is None}
    return dataclasses.replace(from_arrays, **unset)


def _differences(explicit: Pi0Config, other: Pi0Config, *, except_for: Collection[str] = ()) -> str:
    """Each field in which two configs differ, with both values."""
    mine, theirs = explicit.to_dict(), other.to_dict()
    found = []
    for name, value in mine.items():
        if isinstance(value, dict):
            found += [
                f"{name}.{part} is {value[part]} in config, {theirs[name][part]} in the checkpoint"
                for part in value
                if value[part] != theirs[name][part]
            ]
        elif value != theirs[name] and name not in except_for:
            found.append(f"{name} is {value} in config, {theirs[name]} in the checkpoint")
    return "; ".join(found)


def _unknown_format(root: pathlib.Path) -> str:
    """The message for a folder that holds nothing that we read."""
    names = sorted(entry.name for entry in root.iterdir())
    unread = [name for name in names if name.endswith(_UNREAD_SUFFIXES)]
    return (
        f"{root} is in no known checkpoint format: a policy folder has policy.json and model.safetensors, an openpi "
        "checkpoint has params/_METADATA and params/manifest.ocdbt, or config.json and model.safetensors, as LeRobot's "
        f"has; found {names[:12] or 'an empty folder'}"
        + (f". {', '.join(unread[:3])} may be a pickle, and nothing is ever unpickled" if unread else "")
    )

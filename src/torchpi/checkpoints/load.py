"""Reading weights: one entry for every format, recognised by what is in the folder, never by its name."""

import pathlib
import warnings
from collections.abc import Collection

import torch

from torchpi.assets import assets
from torchpi.checkpoints import folder, openpi
from torchpi.config import PRESETS, Pi0Config, preset
from torchpi.model.pi0 import Pi0

# A path may name one of these instead of its folder.
_FILES_OF_FORMATS = ("policy.json", "model.safetensors", "_METADATA", "manifest.ocdbt")


def load_model(
    path: str | pathlib.Path,
    *,
    config: Pi0Config | str | pathlib.Path | None = None,
    adapt: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    lora_alpha: tuple[float, float] | None = None,
) -> Pi0:
    """Load a model from a policy folder or an openpi JAX checkpoint.

    Every array is consumed or named in an error. Sizes come from the arrays; what they do not hold (in a JAX checkpoint
    action_horizon, max_token_len and discrete_state_input) comes from `config`, or stays unset.

    Args:
        path: a policy folder; an openpi checkpoint: the folder with `params`, `params` itself, or the folder of a
            training run with a single step; or "demo", the embedded policy.
        config: a Pi0Config, a JSON file (may be partial), or the name of a preset.
        adapt: cut or extend the weights to a `config` of other sizes. Not supported yet.
        dtype: of the weights, and so of the computation.
        device: where the weights go.
        lora_alpha: of a JAX LoRA checkpoint. Not supported yet.

    Returns:
        The model in eval mode, with gradients enabled.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: it is in no known format; arrays are missing, left over, misshapen or unreadable; or `config`
            contradicts them.
    """
    if adapt or lora_alpha is not None:
        raise NotImplementedError("adapt= and lora_alpha= are not supported yet")
    root = existing_folder(path)
    if folder.is_policy_folder(root):
        model = folder.load_weights(root, folder_config(root, config), dtype=dtype, device=device)
    else:
        params = openpi.find_params(root)
        if params is None:
            raise ValueError(unknown_format(root))
        arrays = openpi.JaxArrays(params)
        model = arrays.load(merge_config(config, arrays.config()), dtype=dtype, device=device)
    return model.eval()


def existing_folder(path: str | pathlib.Path) -> pathlib.Path:
    """The folder that holds a checkpoint; "demo" is the packaged one of the embedded policy.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is a file that says nothing about its folder; or a hub's address, which is not supported yet.
    """
    if str(path).startswith(("hf://", "gs://")):
        raise ValueError(f"{path}: downloads are not supported yet; download the folder and pass its path")
    root = assets() / "demo_policy" if str(path) == "demo" else pathlib.Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"there is no checkpoint at {root}")
    if root.is_dir():
        return root
    if root.name in _FILES_OF_FORMATS:
        return root.parent
    raise ValueError(f"{root} is a file; expected the folder of a checkpoint, or its {' or '.join(_FILES_OF_FORMATS)}")


def folder_config(root: pathlib.Path, config: Pi0Config | str | pathlib.Path | None) -> Pi0Config:
    """The config of a policy folder, under an explicit one, whose differences are reported."""
    own = folder.read_policy_json(root).model
    if config is None:
        return own
    explicit = _explicit(config, own)
    if differences := _differences(explicit, own):  # a variant's name and its sizes are the same
        warnings.warn(f"{root}: config= overrides {differences}", stacklevel=3)
    return explicit


def merge_config(config: Pi0Config | str | pathlib.Path | None, from_arrays: Pi0Config) -> Pi0Config:
    """What `config` adds to the sizes that the arrays have.

    Raises:
        ValueError: it contradicts the arrays.
    """
    if config is None:
        return from_arrays
    explicit = _explicit(config, from_arrays)
    not_in_arrays = {name for name, value in from_arrays.to_dict().items() if value is None}
    if from_arrays.siglip.position != "learned":
        not_in_arrays.add("image_size")
    contradictions = _differences(explicit, from_arrays, except_for=not_in_arrays)
    if contradictions:
        raise ValueError(f"config= contradicts the checkpoint's arrays: {contradictions}")
    return explicit


def _explicit(config: Pi0Config | str | pathlib.Path, base: Pi0Config) -> Pi0Config:
    if isinstance(config, Pi0Config):
        return config
    if isinstance(config, str) and config in PRESETS:
        return preset(config)
    if isinstance(config, str) and not pathlib.Path(config).is_file():
        raise ValueError(f"config={config!r} is neither a file nor a preset; presets are {', '.join(PRESETS)}")
    return Pi0Config.from_json(config, base)


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


def unknown_format(root: pathlib.Path) -> str:
    """The message for a folder that holds nothing that we read."""
    found = sorted(entry.name for entry in root.iterdir())[:12]
    if (root / "model.safetensors").is_file() and (root / "config.json").is_file():
        return (
            f"{root} looks like an openpi PyTorch or LeRobot checkpoint (config.json and model.safetensors); "
            "these are not supported yet"
        )
    return (
        f"{root} is in no known checkpoint format: a policy folder has policy.json and model.safetensors, an openpi "
        f"checkpoint has params/_METADATA and params/manifest.ocdbt; found {found or 'an empty folder'}"
    )

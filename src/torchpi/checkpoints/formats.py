"""Format of a checkpoint, recognised by the contents of its folder, never by its name."""

import pathlib
from typing import Any, Literal

from torchpi.checkpoints import folder, openpi, peft
from torchpi.checkpoints.address import UNREAD_SUFFIXES
from torchpi.checkpoints.npz import find_npz
from torchpi.checkpoints.safetensors_files import has_weights
from torchpi.errors import CheckpointError, listed
from torchpi.schema import read_json_object

Format = Literal["torchpi", "openpi-jax", "openpi-pytorch", "lerobot"]


def format_of(root: pathlib.Path) -> Format:
    return probe(root)[0]


def probe(root: pathlib.Path) -> tuple[Format, pathlib.Path, dict[str, Any]]:
    """Format of the checkpoint in a folder, path of its arrays, and contents of config.json (PyTorch formats only)."""
    candidates: list[tuple[Format, pathlib.Path, dict[str, Any]]] = []
    if folder.is_policy_folder(root):
        candidates.append(("torchpi", root, {}))
    has_config, has_adapter = (root / "config.json").is_file(), peft.is_peft(root)
    if has_adapter and has_weights(root):
        raise CheckpointError(f"{root} holds whole weights and PEFT's adapter; move one to a folder of its own.")
    if has_config and (has_weights(root) or has_adapter):
        document = read_json_object(root / "config.json")
        if not (candidates and is_plugin_config(document)):
            candidates.append(("lerobot" if "type" in document else "openpi-pytorch", root, document))
    elif has_adapter or (has_weights(root) and not candidates):
        candidates.append(("lerobot" if has_adapter else "openpi-pytorch", root, {}))
    if root.is_dir() and (params := openpi.find_params(root)) is not None:
        candidates.append(("openpi-jax", params, {}))
    if not candidates and (file := find_npz(root)) is not None:
        candidates.append(("openpi-jax", file, {}))
    if len(candidates) > 1:
        raise CheckpointError(
            f"{root} holds checkpoints in two formats, {listed(format_ for format_, *_ in candidates)}; move one to a "
            "folder of its own."
        )
    if candidates:
        return candidates[0]
    if checkpoints := _checkpoints_in_run(root):
        steps = ", ".join(str(path.relative_to(root)) for path in checkpoints[-8:])
        raise CheckpointError(
            f"{root} is not a checkpoint itself; the last one in it is {checkpoints[-1]}, of {steps}."
        )
    names = sorted(entry.name for entry in root.iterdir())
    unread = [name for name in names if name.endswith(UNREAD_SUFFIXES)]
    raise CheckpointError(
        f"{root} is in no known checkpoint format: a policy folder has policy.json and model.safetensors, an openpi "
        "checkpoint has params/_METADATA and params/manifest.ocdbt, or config.json and model.safetensors, as LeRobot's "
        f"has; found {names[:12] or 'an empty folder'}"
        + (f". {', '.join(unread[:3])} may be a pickle, and torchpi never unpickles." if unread else ".")
    )


def is_plugin_config(document: Any) -> bool:
    """True if a config.json holds the options of torchpi's LeRobot plug-in, which LeRobot saves in a policy folder."""
    return isinstance(document, dict) and document.get("type") == "torchpi"


# Checkpoints in the folder of a training run of openpi, LeRobot or torchpi.
_RUN_PATTERNS = (
    "[0-9]*",
    *(f"{step}{name}" for step in ("", "*/", "checkpoints/*/") for name in ("policy", "pretrained_model")),
)


def _checkpoints_in_run(root: pathlib.Path) -> list[pathlib.Path]:
    """Checkpoints in the folder of a training run, the newest last."""

    def step(path: pathlib.Path) -> int:
        return max((int(part) for part in path.relative_to(root).parts if part.isdecimal()), default=-1)

    candidates = sorted((path for pattern in _RUN_PATTERNS for path in sorted(root.glob(pattern))), key=step)
    # LeRobot's `last` is a link without a step number: it sorts first, and the folder that it points to replaces it.
    unique = {path.resolve(): path for path in candidates}
    return [
        path
        for path in sorted(unique.values(), key=step)
        if folder.is_policy_folder(path) or has_weights(path) or peft.is_peft(path) or (path / "params").is_dir()
    ]

"""Addresses of checkpoints: a folder or one of its files, hf://…, gs://…, or "demo", the embedded policy."""

import os
import pathlib
import re
from urllib.parse import quote

from torchpi.assets import assets
from torchpi.config import PRESETS
from torchpi.errors import CheckpointError, MissingFileError, closest, listed

PUBLISHED = "gs://openpi-assets/checkpoints/"
PUBLISHED_NAMES = tuple(name for name in PRESETS if name not in ("pi0", "pi05", "tiny", "tiny_pi0"))
REMOTE = ("hf://", "gs://")
_EXPECTED = "a folder, hf://ORG/NAME, gs://BUCKET/PATH, or demo, the embedded policy."
_REPOSITORY = r"\w[\w.-]*/\w[\w.-]*(@\S+)?"

# A path may name one of these files instead of its folder.
_FILES_OF_FORMATS = (
    "policy.json",
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "_METADATA",
    "manifest.ocdbt",
)
UNREAD_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".zip", ".msgpack")
"""Suffixes of files that may run code when loaded, or have an unsupported format."""


def existing_file(path: str | pathlib.Path) -> pathlib.Path:
    """Local path of a path or address; downloads remote addresses into the cache."""
    if not str(path).startswith(REMOTE):
        return pathlib.Path(os.path.expanduser(path))
    from torchpi.checkpoints import hub  # imports huggingface_hub

    return hub.fetch(str(path))


def existing_folder(path: str | pathlib.Path) -> pathlib.Path:
    """Local folder of the checkpoint at a path or address, or its .npz file."""
    if not isinstance(path, str | os.PathLike):
        raise CheckpointError(f"A checkpoint's path is a string or a Path, got {path!r:.80}; expected {_EXPECTED}")
    root = assets() / "demo_policy" if str(path) == "demo" else existing_file(path)
    if not os.path.exists(root):
        hints = _hint(str(path)) + hub_hint(str(path)) + _steps_hint(root)
        raise MissingFileError(f"There is no checkpoint at {root}; {hints}")
    if root.is_dir() or root.suffix == ".npz":
        return root
    if root.name in _FILES_OF_FORMATS:
        return root.parent
    if root.suffix in UNREAD_SUFFIXES:
        raise CheckpointError(
            f"{root} is not read: a zip or pickle can run code, and torchpi never unpickles. Pass the folder of a "
            "checkpoint with safetensors or OCDBT files."
        )
    raise CheckpointError(
        f"{root} is a file; expected the folder of a checkpoint, or its {listed(_FILES_OF_FORMATS, 'or')}."
    )


def _hint(path: str) -> str:
    """Advice for the error about a path that does not exist."""
    if path in PUBLISHED_NAMES:
        return f"the published one is {PUBLISHED}{path}."
    addresses = {"demo": "demo"} | {name: f"{PUBLISHED}{name}" for name in PUBLISHED_NAMES}
    if re.fullmatch(r"[\w.-]+:\d+", path):
        return f"to evaluate with a server, pass ws://{path}. Expected {_EXPECTED}"
    if close := closest(path, addresses):
        return f"did you mean {addresses[close]}? Expected {_EXPECTED}"
    if "/" in path:
        return f"expected {_EXPECTED}"
    return f"expected {_EXPECTED} Published are {', '.join(PUBLISHED_NAMES)}, at {PUBLISHED}NAME."


def _steps_hint(path: pathlib.Path) -> str:
    """The existing steps of a training run, if `path` names another one."""
    parent = next((parent for parent in path.parents if parent.exists()), pathlib.Path())
    if not path.relative_to(parent).parts[0].isdecimal():
        return ""
    steps = sorted(folder.name for folder in parent.glob("[0-9]*") if folder.name.isdecimal())
    return f" Steps in {parent}: {', '.join(steps[-8:])}." if steps else ""


def hub_address(name: str | pathlib.Path, revision: str | None = None) -> str:
    """Address of a checkpoint by the Hub's convention: ORG/NAME means hf://ORG/NAME unless such a folder exists."""
    address = str(name)
    if address != "demo" and not address.startswith(REMOTE) and not os.path.exists(os.path.expanduser(address)):
        address = f"hf://{address}" if re.fullmatch(_REPOSITORY, address, re.ASCII) else address
    if revision is None:
        return address
    match = re.fullmatch(rf"hf://({_REPOSITORY})(/.+)?", address, re.ASCII)
    if match is None or "@" in match[1]:
        raise CheckpointError(
            f"revision={revision!r} belongs to a repository of the Hugging Face Hub, ORG/NAME without a revision; "
            f"found {address}."
        )
    return f"hf://{match[1]}@{revision if revision.startswith('refs/') else quote(revision, safe='')}{match[3] or ''}"


def hub_hint(path: str) -> str:
    """Hint for the error about a missing folder, if its name could be a repository's; else empty."""
    if re.fullmatch(_REPOSITORY, path, re.ASCII):
        return f" On the Hugging Face Hub, {path} is hf://{path}."
    if match := re.match(r"https://(?:huggingface\.co|hf\.co)/(?:datasets/)?([^/]+/[^/]+)(?:/tree/(.+?))?/?$", path):
        return f" Its address is hf://{match[1]}{f'@{match[2]}' if match[2] else ''}."
    return ""


def published_name(path: str | pathlib.Path) -> str | None:
    """Name of the preset for the address of a published openpi checkpoint; None for other addresses."""
    name = str(path).rstrip("/").removeprefix(PUBLISHED)
    return name if name in PUBLISHED_NAMES and str(path).startswith(PUBLISHED) else None

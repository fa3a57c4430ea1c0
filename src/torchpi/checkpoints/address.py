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
"""Endings of files that may run code when they are loaded, or have another format."""


def existing_file(path: str | pathlib.Path) -> pathlib.Path:
    """The path; a remote address is downloaded into the cache first."""
    if not str(path).startswith(REMOTE):
        return pathlib.Path(os.path.expanduser(path))
    from torchpi.checkpoints import hub  # imports huggingface_hub

    return hub.fetch(str(path))


def existing_folder(path: str | pathlib.Path) -> pathlib.Path:
    """The folder of the checkpoint at a path or address, or the .npz file."""
    root = assets() / "demo_policy" if str(path) == "demo" else existing_file(path)
    if not os.path.exists(root):
        raise MissingFileError(f"There is no checkpoint at {root}; {_hint(str(path))}{hub_hint(str(path))}")
    if root.is_dir() or root.suffix == ".npz":
        return root
    if root.name in _FILES_OF_FORMATS:
        return root.parent
    if root.suffix in UNREAD_SUFFIXES:
        raise CheckpointError(
            f"{root} is not read: a zip or pickle can run code, and nothing is ever unpickled. Give the folder of a "
            "checkpoint with safetensors or OCDBT files."
        )
    raise CheckpointError(
        f"{root} is a file; expected the folder of a checkpoint, or its {listed(_FILES_OF_FORMATS, 'or')}."
    )


def _hint(path: str) -> str:
    """The rest of the error about a path at which nothing is."""
    if path in PUBLISHED_NAMES:
        return f"the published one is {PUBLISHED}{path}."
    possible = "a folder, hf://ORG/NAME, gs://BUCKET/PATH, or demo, the embedded policy."
    addresses = {"demo": "demo"} | {name: f"{PUBLISHED}{name}" for name in PUBLISHED_NAMES}
    if close := closest(path, addresses):
        return f"did you mean {addresses[close]}? Possible are {possible}"
    published = "" if "/" in path else f" Published are {', '.join(PUBLISHED_NAMES)}, at {PUBLISHED}NAME."
    return f"expected {possible}{published}"


def hub_address(name: str | pathlib.Path, revision: str | None = None) -> str:
    """The address of what `name` says by the Hub's habit: ORG/NAME, if there is no such folder, is hf://ORG/NAME."""
    address = str(name)
    if address != "demo" and not address.startswith(REMOTE) and not os.path.exists(os.path.expanduser(address)):
        address = f"hf://{address}" if re.fullmatch(_REPOSITORY, address, re.ASCII) else address
    if revision is None:
        return address
    match = re.fullmatch(rf"hf://({_REPOSITORY})(/.+)?", address, re.ASCII)
    if match is None or "@" in match[1]:
        raise CheckpointError(
            f"revision={revision!r} belongs to a repository of the Hugging Face Hub, ORG/NAME, which has none yet; "
            f"{address} is none of these."
        )
    return f"hf://{match[1]}@{revision if revision.startswith('refs/') else quote(revision, safe='')}{match[3] or ''}"


def hub_hint(path: str) -> str:
    """A sentence for the error about a folder that is not there, if its name could be a repository's."""
    if re.fullmatch(_REPOSITORY, path, re.ASCII):
        return f" On the Hugging Face Hub, {path} is hf://{path}."
    if match := re.match(r"https://(?:huggingface\.co|hf\.co)/(?:datasets/)?([^/]+/[^/]+)(?:/tree/(.+?))?/?$", path):
        return f" Its address is hf://{match[1]}{f'@{match[2]}' if match[2] else ''}."
    return ""


def published_name(path: str | pathlib.Path) -> str | None:
    """The preset of a published openpi checkpoint, whose address says what is in none of its arrays."""
    name = str(path).rstrip("/").removeprefix(PUBLISHED)
    return name if name in PUBLISHED_NAMES and str(path).startswith(PUBLISHED) else None

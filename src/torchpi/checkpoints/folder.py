"""Our own format: a policy is a folder that needs nothing else.

policy.json         everything but the numbers: model config, embodiment, normalization, prompt, provenance
norm_stats.json     in openpi's layout
tokenizer.model     or tokenizer.json
model.safetensors   the weights, or shards of them with model.safetensors.index.json
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from torchpi.checkpoints.layout import leaf_array, own_leaves
from torchpi.checkpoints.safetensors_files import write_safetensors
from torchpi.config import Pi0Config
from torchpi.errors import CheckpointError
from torchpi.model.lora import lora_config
from torchpi.model.pi0 import Pi0

FORMAT_VERSION = 2
# The one resize there is (transforms.images); written down, so that a policy stays right should there be another.
IMAGE_TRANSFORM = {"resize": "pad", "filter": "bilinear_antialiased"}


@dataclasses.dataclass(frozen=True)
class PolicyFile:
    """The contents of policy.json. `docs/policy_folder.md` describes the fields."""

    model: Pi0Config
    embodiment: Mapping[str, Any]
    """`Embodiment.to_dict`: cameras in order, named dimensions, control rate, actions to execute, default prompt."""
    normalization: Mapping[str, Mapping[str, str]]
    """Per key ("state", "actions"): kind and eps_rule."""
    prompt: Mapping[str, Any]
    """"default" (a text or null), "format" and "truncation"; whether the state is in it follows the model's
    discrete_state_input."""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Free, for clients."""
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Where the weights come from."""

    def to_json(self) -> str:
        """The file's text."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        document = {"format_version": FORMAT_VERSION, **fields, "model": self.model.to_dict()}
        try:
            text = json.dumps(
                {**document, "image_transform": IMAGE_TRANSFORM}, indent=2, ensure_ascii=False, allow_nan=False
            )
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"metadata or provenance of the policy can't be written as JSON: {error}") from error
        return f"{text}\n"

    @classmethod
    def from_json(cls, text: str, source: pathlib.Path) -> "PolicyFile":
        """Parse the file's text."""
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{source} is not valid JSON: {error}") from error
        if not isinstance(document, dict):
            raise CheckpointError(f"{source} must hold a JSON object, found {type(document).__name__}.")
        version = document.pop("format_version", None)
        if version == 1 and isinstance(document.get("prompt"), dict):  # there was one format then
            document["prompt"].setdefault("format", "openpi")
        elif version != FORMAT_VERSION:
            raise CheckpointError(
                f"{source}: format_version is {version!r}; this torchpi reads 1 and {FORMAT_VERSION}. A newer file "
                "needs a newer torchpi."
            )
        try:
            return cls._from_document(document)
        except ValueError as error:
            raise CheckpointError(f"{source}: {error}") from error

    @classmethod
    def _from_document(cls, document: dict[str, Any]) -> "PolicyFile":
        names = [*(field.name for field in dataclasses.fields(cls)), "image_transform"]
        require_fields(document, names, "the document")
        for name in names:
            if not isinstance(document[name], dict):
                raise CheckpointError(f"{name} must be an object, found {document[name]!r}.")
        if document.pop("image_transform") != IMAGE_TRANSFORM:
            raise CheckpointError(f"image_transform must be {IMAGE_TRANSFORM}, the only one this torchpi has.")
        require_fields(document["normalization"], ("state", "actions"), "normalization")
        for key, rule in document["normalization"].items():
            require_fields(rule, ("kind", "eps_rule"), f"normalization.{key}")
            if not all(isinstance(value, str) for value in rule.values()):
                raise CheckpointError(f"normalization.{key} must have texts as its values, found {rule!r}.")
        prompt = document["prompt"]
        require_fields(prompt, ("default", "format", "truncation"), "prompt")
        if not isinstance(prompt["default"], str | None):
            raise CheckpointError(f"prompt.default must be a text or null, found {prompt['default']!r}.")
        for field in ("format", "truncation"):
            if not isinstance(prompt[field], str):
                raise CheckpointError(f"prompt.{field} must be a text, found {prompt[field]!r}.")
        model = document["model"]
        try:
            config = Pi0Config.from_dict(model)
        except ValueError as error:
            raise CheckpointError(f"model: {error}") from error
        # Complete: a default in place of what is missing would be a guess about the weights.
        for name, value in {"model": config.to_dict(), **config.to_dict()}.items():
            if isinstance(value, dict):
                require_fields(model if name == "model" else model[name], value, name)
        return cls(**{**document, "model": config})


def require_fields(found: Any, names: Collection[str], where: str) -> None:
    """Raise a ValueError unless `found` is a JSON object with these fields and no others."""
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} must be an object with {', '.join(names)}, found {found!r}.")
    missing, unknown = [name for name in names if name not in found], sorted(set(found) - set(names))
    if missing or unknown:
        raise CheckpointError(
            f"{where} has"
            + (f" no {', '.join(missing)}" if missing else "")
            + (" and" if missing and unknown else "")
            + (f" unknown fields {', '.join(unknown)}" if unknown else "")
            + f"; expected {', '.join(names)}"
        )


def is_policy_folder(root: pathlib.Path) -> bool:
    """Whether a folder is in our own format."""
    return (root / "policy.json").is_file()


def read_policy_json(root: pathlib.Path) -> PolicyFile:
    """Read and check policy.json; see `PolicyFile.from_json`."""
    path = root / "policy.json"
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    return PolicyFile.from_json(text, path)


def tokenizer_file(root: pathlib.Path) -> pathlib.Path | None:
    """The tokenizer in the folder, if there is one."""
    files = (root / "tokenizer.model", root / "tokenizer.json")
    return next((file for file in files if file.is_file()), None)


def write_weights(
    root: pathlib.Path,
    model: Pi0,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Write a model's weights into a policy folder.

    Args:
        dtype: on disk; by default the model's.
        max_shard_bytes: above it they are written in shards; None: never.
        read: gives the weights by their names; by default they are the model's.
    """
    if read is None and lora_config(model) is not None:
        raise CheckpointError(
            "A policy folder holds plain weights, and this model has LoRA: merge_lora folds it into the weights, "
            "save_adapter writes it on its own."
        )
    leaves, dtype = own_leaves(model.config), dtype or model.embedding.dtype
    write_safetensors(
        root,
        leaves,
        read or (lambda name: leaf_array(model, leaves[name], dtype)),
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )


@contextlib.contextmanager
def new_folder(path: str | pathlib.Path, *, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """A folder to write a policy folder's files into: complete under its name when the context ends, or not there.

    It is written beside its place and moved there. A process killed while it writes leaves a `.<name>.….tmp` behind. A
    folder cannot be exchanged in one step: one killed between the two renames of an overwrite leaves nothing under the
    name, the old folder as `.<name>.….old` and the new one as `.<name>.….tmp`, both whole.

    Args:
        overwrite: replace a policy folder that is there; without it, that is an error.
    """
    target = pathlib.Path(path).expanduser()
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} exists already; choose another path, or pass overwrite=True.")
    if target.exists() and not is_policy_folder(target):
        raise CheckpointError(f"{target} exists and is no policy folder; it is not overwritten.")
    with atomic_folder(target) as beside:
        yield beside


@contextlib.contextmanager
def atomic_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder beside `target` to write into, which takes its place when the context ends without an error.

    See `new_folder` for what a killed process leaves behind.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    beside.mkdir()
    try:
        yield beside
        make_durable(beside)
        _move_into_place(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def make_durable(folder: pathlib.Path) -> None:
    """Wait until everything in a folder is on the disk."""
    for entry in (*folder.rglob("*"), folder):
        fsync(entry)


def _move_into_place(beside: pathlib.Path, target: pathlib.Path) -> None:
    if target.exists():
        old = target.parent / f".{target.name}.{uuid.uuid4().hex}.old"
        os.rename(target, old)
        try:
            os.rename(beside, target)
        except OSError:
            os.rename(old, target)
            raise
        shutil.rmtree(old)
    else:
        os.rename(beside, target)
    fsync(target.parent)


def fsync(path: pathlib.Path) -> None:
    """Wait until a file, or the list of a folder's entries, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

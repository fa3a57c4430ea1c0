"""Our own format: a policy is a folder that needs nothing else.

policy.json         everything but the numbers: model config, embodiment, normalization, prompt, provenance
norm_stats.json     in openpi's layout
tokenizer.model     or tokenizer.json
model.safetensors   the weights
"""

import dataclasses
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch

from torchpi.checkpoints.fill import materialized_parameter, refuse_mismatch
from torchpi.config import Pi0Config
from torchpi.model.pi0 import Pi0

FORMAT_VERSION = 1
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
    """"default" (a text or null) and "truncation"; the format follows the model's discrete_state_input."""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Free, for clients."""
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Where the weights come from."""

    def to_json(self) -> str:
        """The file's text."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        document = {"format_version": FORMAT_VERSION, **fields, "model": self.model.to_dict()}
        return json.dumps({**document, "image_transform": IMAGE_TRANSFORM}, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: pathlib.Path) -> "PolicyFile":
        """Parse the file's text.

        Raises:
            ValueError: it is not JSON, of another version, or a field is missing, unknown or of a wrong type.
        """
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source} is not valid JSON: {error}") from error
        if not isinstance(document, dict):
            raise ValueError(f"{source} must hold a JSON object, found {type(document).__name__}")
        version = document.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{source}: format_version is {version!r}; this torchpi reads {FORMAT_VERSION}. A newer file needs a "
                "newer torchpi"
            )
        names = {field.name for field in dataclasses.fields(cls)} | {"image_transform"}
        if names != set(document):
            missing, unknown = sorted(names - set(document)), sorted(set(document) - names)
            raise ValueError(f"{source}: missing fields {missing}, unknown fields {unknown}")
        for name in sorted(names):
            if not isinstance(document[name], dict):
                raise ValueError(f"{source}: {name} must be an object, found {type(document[name]).__name__}")
        if document.pop("image_transform") != IMAGE_TRANSFORM:
            raise ValueError(f"{source}: image_transform must be {IMAGE_TRANSFORM}, the only one this torchpi has")
        try:
            return cls(**{**document, "model": Pi0Config.from_dict(document["model"])})
        except ValueError as error:
            raise ValueError(f"{source}: model: {error}") from error


def is_policy_folder(root: pathlib.Path) -> bool:
    """Whether a folder is in our own format."""
    return (root / "policy.json").is_file()


def read_policy_json(root: pathlib.Path) -> PolicyFile:
    """Read and check policy.json."""
    path = root / "policy.json"
    return PolicyFile.from_json(path.read_text(encoding="utf-8"), path)


def tokenizer_file(root: pathlib.Path) -> pathlib.Path | None:
    """The tokenizer in the folder, if there is one."""
    files = (root / "tokenizer.model", root / "tokenizer.json")
    return next((file for file in files if file.is_file()), None)


def load_weights(root: pathlib.Path, config: Pi0Config, *, dtype: torch.dtype, device: str | torch.device) -> Pi0:
    """Build the model that `config` describes and fill every weight from model.safetensors, one array at a time.

    Raises:
        FileNotFoundError: there is no model.safetensors.
        ValueError: it is truncated or corrupt; arrays are missing, left over or misshapen.
    """
    path = root / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a policy folder has its weights there")
    model = Pi0(config, device="meta", dtype=dtype)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    try:
        with safetensors.safe_open(path, framework="pt") as arrays:
            found = {name: tuple(arrays.get_slice(name).get_shape()) for name in arrays.keys()}  # noqa: SIM118
            misshapen = [
                f"{name} is {list(found[name])}, expected {list(shape)}"
                for name, shape in expected.items()
                if name in found and found[name] != shape
            ]
            refuse_mismatch(path, sorted(set(expected) - set(found)), sorted(set(found) - set(expected)), misshapen)
            for name in expected:
                materialized_parameter(model, name, device).data.copy_(arrays.get_tensor(name))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or corrupt: {error}; get the file again") from error
    return model


def save_folder(
    path: str | pathlib.Path,
    *,
    model: Pi0,
    file: PolicyFile,
    write_others: Callable[[pathlib.Path], None],
    overwrite: bool = False,
) -> None:
    """Write a policy folder atomically: it is complete under its name, or not there.

    Args:
        write_others: writes norm_stats.json and the tokenizer into the folder that it is given.
        overwrite: replace a policy folder that is there; without it, that is an error.

    Raises:
        ValueError: something is there already.
    """
    target = pathlib.Path(path).expanduser()
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists already; choose another path, or pass overwrite=True")
    if target.exists() and not is_policy_folder(target):
        raise ValueError(f"{target} exists and is no policy folder; it is not overwritten")
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    beside.mkdir()
    try:
        (beside / "policy.json").write_text(file.to_json(), encoding="utf-8")
        write_others(beside)
        weights = {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}
        safetensors.torch.save_file(weights, beside / "model.safetensors")
        for entry in (*beside.iterdir(), beside):
            _fsync(entry)
        if target.exists():
            old = target.parent / f".{target.name}.{uuid.uuid4().hex}.old"
            os.rename(target, old)
            os.rename(beside, target)
            shutil.rmtree(old)
        else:
            os.rename(beside, target)
        _fsync(target.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _fsync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

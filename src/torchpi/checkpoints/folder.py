"""Our own format: a policy is a folder that needs nothing else.

policy.json         everything but the numbers: model config, embodiment, normalization, prompt, provenance
norm_stats.json     in openpi's layout
tokenizer.model     or tokenizer.json
model.safetensors   the weights
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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
        """The file's text.

        Raises:
            ValueError: JSON can't hold the metadata or the provenance.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        document = {"format_version": FORMAT_VERSION, **fields, "model": self.model.to_dict()}
        try:
            text = json.dumps(
                {**document, "image_transform": IMAGE_TRANSFORM}, indent=2, ensure_ascii=False, allow_nan=False
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"metadata or provenance of the policy can't be written as JSON: {error}") from error
        return f"{text}\n"

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
        try:
            return cls._from_document(document)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    @classmethod
    def _from_document(cls, document: dict[str, Any]) -> "PolicyFile":
        names = [*(field.name for field in dataclasses.fields(cls)), "image_transform"]
        _require_fields(document, names, "the document")
        for name in names:
            if not isinstance(document[name], dict):
                raise ValueError(f"{name} must be an object, found {document[name]!r}")
        if document.pop("image_transform") != IMAGE_TRANSFORM:
            raise ValueError(f"image_transform must be {IMAGE_TRANSFORM}, the only one this torchpi has")
        _require_fields(document["normalization"], ("state", "actions"), "normalization")
        for key, rule in document["normalization"].items():
            _require_fields(rule, ("kind", "eps_rule"), f"normalization.{key}")
            if not all(isinstance(value, str) for value in rule.values()):
                raise ValueError(f"normalization.{key} must have texts as its values, found {rule!r}")
        prompt = document["prompt"]
        _require_fields(prompt, ("default", "truncation"), "prompt")
        if not isinstance(prompt["default"], str | None):
            raise ValueError(f"prompt.default must be a text or null, found {prompt['default']!r}")
        if not isinstance(prompt["truncation"], str):
            raise ValueError(f"prompt.truncation must be a text, found {prompt['truncation']!r}")
        model = document["model"]
        try:
            config = Pi0Config.from_dict(model)
        except ValueError as error:
            raise ValueError(f"model: {error}") from error
        # Complete: a default in place of what is missing would be a guess about the weights.
        for name, value in {"model": config.to_dict(), **config.to_dict()}.items():
            if isinstance(value, dict):
                _require_fields(model if name == "model" else model[name], value, name)
        return cls(**{**document, "model": config})


def _require_fields(found: Any, names: Collection[str], where: str) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{where} must be an object with {', '.join(names)}, found {found!r}")
    missing, unknown = [name for name in names if name not in found], sorted(set(found) - set(names))
    if missing or unknown:
        raise ValueError(
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
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return PolicyFile.from_json(text, path)


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
        # The file is mapped into memory, and what was read of it counts as used until it is closed. The large arrays
        # come first, when little else is allocated.
        by_size = sorted(expected, key=lambda name: -math.prod(expected[name]))
        for names in _grouped(by_size, expected):
            with safetensors.safe_open(path, framework="pt") as arrays:
                for name in names:
                    materialized_parameter(model, name, device).data.copy_(arrays.get_tensor(name))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or corrupt: {error}; get the file again") from error
    return model


def _grouped(names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """The names in groups of at least 16 million elements, so that a small file is opened once."""
    group: list[str] = []
    elements = 0
    for name in names:
        group.append(name)
        elements += math.prod(shapes[name])
        if elements >= 1 << 24:
            yield group
            group, elements = [], 0
    if group:
        yield group


def save_folder(
    path: str | pathlib.Path,
    *,
    model: Pi0,
    file: PolicyFile,
    write_others: Callable[[pathlib.Path], None],
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a policy folder atomically: it is complete under its name, or not there.

    It is written beside its place and moved there. A process killed while it writes leaves a `.<name>.….tmp` behind. A
    folder cannot be exchanged in one step: one killed between the two renames of an overwrite leaves nothing under the
    name, the old folder as `.<name>.….old` and the new one as `.<name>.….tmp`, both whole.

    Args:
        write_others: writes norm_stats.json and the tokenizer into the folder that it is given.
        overwrite: replace a policy folder that is there; without it, that is an error.
        dtype: of the weights on disk; by default the model's.

    Raises:
        ValueError: something is there already.
    """
    target = pathlib.Path(path).expanduser()
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists already; choose another path, or pass overwrite=True")
    if target.exists() and not is_policy_folder(target):
        raise ValueError(f"{target} exists and is no policy folder; it is not overwritten")
    with atomic_folder(target) as beside:
        (beside / "policy.json").write_text(file.to_json(), encoding="utf-8")
        write_others(beside)
        weights = {
            name: parameter.detach().to("cpu", dtype).contiguous() for name, parameter in model.named_parameters()
        }
        safetensors.torch.save_file(weights, beside / "model.safetensors")
        # safetensors makes its file for this user alone; it shall be as readable as the others.
        shutil.copymode(beside / "policy.json", beside / "model.safetensors")


@contextlib.contextmanager
def atomic_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder beside `target` to write into, which takes its place when the context ends without an error.

    See `save_folder` for what a killed process leaves behind.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    beside.mkdir()
    try:
        yield beside
        for entry in (*beside.rglob("*"), beside):
            _fsync(entry)
        _move_into_place(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


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
    _fsync(target.parent)


def _fsync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

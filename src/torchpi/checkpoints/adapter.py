"""The changes of a LoRA training, as a small folder for the base checkpoint that it belongs to.

adapter.json           the LoRA, the other trained parameters, and the base
adapter.safetensors    the low-rank matrices and the other trained parameters, in float32
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch

from torchpi.atomic import atomic_folder
from torchpi.checkpoints.layout import Shapes, require_shapes
from torchpi.checkpoints.safetensors_files import SafetensorsArrays, require_intact, write_safetensors
from torchpi.errors import CheckpointError, MissingFileError
from torchpi.model.lora import LoraConfig, attach_lora, is_lora, lora_config, merge_lora
from torchpi.model.pi0 import Pi0
from torchpi.schema import parse, read_json_object, require_stated, write_json

FORMAT_VERSION = 1
DOCUMENT, WEIGHTS = "adapter.json", "adapter.safetensors"


@dataclasses.dataclass(frozen=True)
class Base:
    """The checkpoint that was trained from."""

    address: str
    dtype: Literal["float32", "bfloat16"]
    """To which its frozen weights were rounded."""
    sha256: str | None = None
    """The `digest` of these, where it is known."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The contents of adapter.json."""

    lora: LoraConfig
    trained: tuple[str, ...]
    """Names of the parameters that were trained in addition to the low-rank matrices."""
    base: Base


def save_adapter(
    model: Pi0, path: str | pathlib.Path, *, base: Mapping[str, str], trained: Collection[str], overwrite: bool = False
) -> None:
    """Write the low-rank matrices and what else was trained into a new folder, which appears complete or not at all.

    Args:
        base: "address" of the checkpoint that was trained from, the "dtype" of what was frozen, and where it is known
            the "sha256" of that, see `digest`.
        trained: names of the trained parameters, as `trainable_parameters` has them.
        overwrite: replace an adapter that is there; without it, that is an error.

    Raises:
        ValueError: the model has no LoRA or no parameter of a name in `trained`; `base` says something else; something
            is there already.
    """
    target, config = pathlib.Path(path).expanduser(), lora_config(model)
    if config is None:
        raise CheckpointError("The model has no LoRA, and so there is no adapter to save.")
    if target.exists() and not (overwrite and is_adapter(target)):
        raise CheckpointError(
            f"{target} exists already; choose another path, or pass overwrite=True to replace an adapter."
        )
    shapes = _shapes(model, trained, "Trained")
    others = tuple(name for name in shapes if not is_lora(name))
    adapter = Adapter(config, others, parse(Base, dict(base), "base", error=CheckpointError))
    with atomic_folder(target) as beside:
        write_adapter(beside, adapter, shapes, model.get_parameter)


def _shapes(model: Pi0, trained: Collection[str], subject: str) -> Shapes:
    """Shapes of the low-rank matrices and the other trained parameters, in the model's order."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if unknown := sorted(set(trained) - set(shapes)):
        raise CheckpointError(f"{subject} names what the model does not have: {', '.join(unknown[:8])}.")
    return {name: shape for name, shape in shapes.items() if is_lora(name) or name in set(trained)}


def write_adapter(root: pathlib.Path, adapter: Adapter, shapes: Shapes, read: Callable[[str], torch.Tensor]) -> None:
    """Write an adapter, whose parameters have these shapes and are read by name, into a folder that is there."""
    document = {"format_version": FORMAT_VERSION, **dataclasses.asdict(adapter)}
    document["base"] = {name: value for name, value in document["base"].items() if value is not None}
    write_json(root / DOCUMENT, document)
    write_safetensors(root, shapes, read, dtypes=dict.fromkeys(shapes, torch.float32), single=WEIGHTS)


def digest(names: Iterable[str], read: Callable[[str], torch.Tensor]) -> str:
    """SHA-256 over the names and numbers of parameters, in the order of their names; `read` returns them in CPU memory,
    and is called in several threads."""

    def of_one(name: str) -> bytes:
        parameter = read(name).detach().contiguous()
        numbers = hashlib.sha256(parameter.flatten().view(torch.uint8).numpy().data).digest()
        return f"{name} {parameter.dtype} {list(parameter.shape)}".encode() + numbers

    whole = hashlib.sha256()
    with ThreadPoolExecutor() as threads:  # hashing much data releases the interpreter
        for part in threads.map(of_one, sorted(names)):
            whole.update(part)
    return whole.hexdigest()


def is_adapter(root: pathlib.Path) -> bool:
    return (root / DOCUMENT).is_file()


def read_adapter(path: str | pathlib.Path) -> Adapter:
    file = pathlib.Path(path).expanduser() / DOCUMENT
    if not file.is_file():
        raise MissingFileError(f"{file} does not exist; expected the folder of an adapter.")
    document = read_json_object(file, error=CheckpointError)
    version = document.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{file}: format_version is {version!r}; this torchpi reads {FORMAT_VERSION}.")
    adapter = parse(Adapter, document, str(file), error=CheckpointError)
    require_stated(document["lora"], dataclasses.asdict(adapter.lora), f"{file}: lora", error=CheckpointError)
    return adapter


def load_adapter(path: str | pathlib.Path, model: Pi0, *, verify: bool = True) -> Adapter:
    """Attach an adapter to the base model that it belongs to, in place; nothing is changed if something is wrong.

    Args:
        model: the base, without LoRA or with the adapter's own, whose values are replaced. The caller sees to it that
            it is the base that `Adapter.base` names: another model of the same sizes can't be told from it.
        verify: compare the file with its checksum, if there is one.

    Raises:
        FileNotFoundError: there is no adapter at the path.
        ValueError: a file is damaged, the model has another LoRA, or other sizes.
    """
    root = pathlib.Path(path).expanduser()
    adapter = read_adapter(root)
    present = lora_config(model)
    if present not in (None, adapter.lora):
        raise CheckpointError(
            f"{root} has {adapter.lora}, the model has {present} already; load the base without LoRA."
        )
    planned = Pi0(model.config, device="meta")
    attach_lora(planned, adapter.lora)
    arrays, expected = (
        SafetensorsArrays(root, WEIGHTS),
        _shapes(planned, adapter.trained, "The adapter's field trained"),
    )
    require_shapes(arrays, expected)
    if verify:
        require_intact(arrays.source)
    if present is None:
        attach_lora(model, adapter.lora)
    with torch.no_grad():
        for name in expected:
            model.get_parameter(name).copy_(arrays.read(name))
    return adapter


@torch.no_grad()
def merge_adapter(root: pathlib.Path, adapter: Adapter, model: Pi0, *, verify: bool = True) -> None:
    """Merge an adapter into its base, in place; weights that differ from the base's in training are an error."""
    dtype = getattr(torch, adapter.base.dtype)  # what was trained beside them saw them rounded
    frozen = {name: p for name, p in model.named_parameters() if name not in adapter.trained and not is_lora(name)}
    for parameter in frozen.values():
        parameter.copy_(parameter.to(dtype))
    expected = adapter.base.sha256
    if expected is not None and expected != digest(frozen, lambda name: frozen[name].to("cpu", dtype)):
        raise CheckpointError(
            f"{root} holds the changes of a LoRA training to {adapter.base.address}, whose weights differ now from "
            "those that it was trained with; restore that checkpoint."
        )
    load_adapter(root, model, verify=verify)
    merge_lora(model)

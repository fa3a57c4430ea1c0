"""LoRA adapters: a small folder with the trained parameters, for a base checkpoint stored elsewhere.

adapter.json           LoRA config, names of the other trained parameters, and the base
adapter.safetensors    low-rank matrices and the other trained parameters, in float32
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
    """The checkpoint from which the training started."""

    address: str
    dtype: Literal["float32", "bfloat16"]
    """Dtype of its frozen weights in training."""
    sha256: str | None = None
    """`digest` of the frozen weights, if known."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The contents of adapter.json."""

    lora: LoraConfig
    trained: tuple[str, ...]
    """Names of the trained parameters, without the low-rank matrices."""
    base: Base


def save_adapter(
    model: Pi0, path: str | pathlib.Path, *, base: Mapping[str, str], trained: Collection[str], overwrite: bool = False
) -> None:
    """Write the low-rank matrices and the other trained parameters to a new folder, atomically.

    Args:
        base: fields of `Base`: "address" and "dtype", and optionally "sha256".
        trained: names of the trained parameters, as in `trainable_parameters`.
        overwrite: replace an existing adapter.

    Raises:
        ValueError: the model has no LoRA; `trained` has an unknown name; `base` has a wrong field; the path exists.
    """
    target, config = pathlib.Path(path).expanduser(), lora_config(model)
    if config is None:
        raise CheckpointError("The model has no LoRA: there is no adapter to save.")
    if target.exists() and not (overwrite and is_adapter(target)):
        raise CheckpointError(
            f"{target} exists already; choose another path, or pass overwrite=True to replace an adapter."
        )
    shapes = _shapes(model, trained, "The argument trained")
    without_lora = tuple(name for name in shapes if not is_lora(name))
    adapter = Adapter(config, without_lora, parse(Base, dict(base), "base", error=CheckpointError))
    with atomic_folder(target) as folder:
        write_adapter(folder, adapter, shapes, model.get_parameter)


def _shapes(model: Pi0, trained: Collection[str], subject: str) -> Shapes:
    """Shapes of the low-rank matrices and the other trained parameters, in the model's order."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if unknown := sorted(set(trained) - set(shapes)):
        raise CheckpointError(f"{subject} has names that are not in the model: {', '.join(unknown[:8])}.")
    return {name: shape for name, shape in shapes.items() if is_lora(name) or name in set(trained)}


def write_adapter(root: pathlib.Path, adapter: Adapter, shapes: Shapes, read: Callable[[str], torch.Tensor]) -> None:
    """Write an adapter into an existing folder; `read` returns a parameter by its name."""
    document = {"format_version": FORMAT_VERSION, **dataclasses.asdict(adapter)}
    document["base"] = {name: value for name, value in document["base"].items() if value is not None}
    write_json(root / DOCUMENT, document)
    write_safetensors(root, shapes, read, dtypes=dict.fromkeys(shapes, torch.float32), single=WEIGHTS)


def digest(names: Iterable[str], read: Callable[[str], torch.Tensor]) -> str:
    """SHA-256 of the names, dtypes, shapes and values of parameters, independent of their order.

    `read` returns a parameter on the CPU, and is called in several threads.
    """

    def describe(name: str) -> bytes:
        parameter = read(name).detach().contiguous()
        values = hashlib.sha256(parameter.flatten().view(torch.uint8).numpy().data).digest()
        return f"{name} {parameter.dtype} {list(parameter.shape)}".encode() + values

    sha256 = hashlib.sha256()
    with ThreadPoolExecutor() as threads:  # hashlib releases the GIL
        for description in threads.map(describe, sorted(names)):
            sha256.update(description)
    return sha256.hexdigest()


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
    """Attach an adapter to its base model in place; in case of an error the model is unchanged.

    Args:
        model: the base, without LoRA or with LoRA of the same config, whose values are replaced. It must be the base
            in `Adapter.base`: another model of the same sizes is not detected.
        verify: compare the file with its checksum, if there is one.

    Raises:
        FileNotFoundError: there is no adapter at the path.
        ValueError: a file is damaged, or the model has another LoRA config or other sizes.
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
    arrays = SafetensorsArrays(root, WEIGHTS)
    expected = _shapes(planned, adapter.trained, "The adapter's field trained")
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
    """Merge an adapter into its base in place; raise an error if the base has changed since the training."""
    dtype = getattr(torch, adapter.base.dtype)  # the adapter was trained with the base rounded to this
    frozen = {name: p for name, p in model.named_parameters() if name not in adapter.trained and not is_lora(name)}
    for parameter in frozen.values():
        parameter.copy_(parameter.to(dtype))
    expected = adapter.base.sha256
    if expected is not None and expected != digest(frozen, lambda name: frozen[name].to("cpu", dtype)):
        raise CheckpointError(
            f"{root} is a LoRA adapter for {adapter.base.address}, whose weights have changed since the training; "
            "restore that checkpoint."
        )
    load_adapter(root, model, verify=verify)
    merge_lora(model)

"""What a LoRA training has changed, as a small folder beside the base checkpoint that it belongs to.

adapter.json           the LoRA, the other trained parameters, and which base they belong to
adapter.safetensors    the low-rank matrices and the other trained parameters, in float32
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from torchpi.checkpoints.folder import atomic_folder, require_fields
from torchpi.checkpoints.layout import Leaf, Piece, Shapes, refuse_mismatch
from torchpi.checkpoints.safetensors_files import SafetensorsArrays, write_safetensors
from torchpi.errors import CheckpointError, MissingFileError
from torchpi.model.lora import LoraConfig, attach_lora, is_lora, lora_config
from torchpi.model.pi0 import Pi0

FORMAT_VERSION = 1
DOCUMENT, WEIGHTS = "adapter.json", "adapter.safetensors"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The contents of adapter.json."""

    lora: LoraConfig
    trained: tuple[str, ...]
    """Names of the parameters that were trained beside the low-rank matrices."""
    base: Mapping[str, str]
    """Which checkpoint it belongs to: "address", the "dtype" to which its frozen weights were rounded, and where it is
    known "sha256", the `digest` of these."""

    def to_json(self) -> str:
        """The file's text."""
        document = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return f"{json.dumps(document, indent=2, ensure_ascii=False)}\n"

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Adapter":
        """Parse the file's JSON object."""
        require_fields(document, ["format_version", *(field.name for field in dataclasses.fields(cls))], "the document")
        if document["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"format_version is {document['format_version']!r}; this torchpi reads {FORMAT_VERSION}."
            )
        trained, base = document["trained"], document["base"]
        if not isinstance(trained, list) or not all(isinstance(name, str) for name in trained):
            raise CheckpointError(f"Trained must be a list of parameters' names, found {trained!r}.")
        return cls(_lora_from_json(document["lora"]), tuple(trained), _checked_base(base))


def save_adapter(
    model: Pi0,
    path: str | pathlib.Path,
    *,
    base: Mapping[str, str],
    trained: Collection[str],
    overwrite: bool = False,
) -> None:
    """Write what was trained into a new folder, which appears complete or not at all.

    Args:
        base: "address" of the checkpoint that was trained from, the "dtype" of what was frozen, and where it is known
            the "sha256" of that, see `digest`.
        trained: names of the trained parameters, as `trainable_parameters` has them; the low-rank matrices are always
            written.
        overwrite: replace an adapter that is there; without it, that is an error.

    Raises:
        ValueError: the model has no LoRA or no parameter of a name in `trained`; `base` says something else; something
            is there already.
    """
    target, config = pathlib.Path(path).expanduser(), lora_config(model)
    if config is None:
        raise CheckpointError("The model has no LoRA, and so there is no adapter to save.")
    parameters = dict(model.named_parameters())
    if unknown := sorted(set(trained) - set(parameters)):
        raise CheckpointError(f"Trained names what the model does not have: {', '.join(unknown[:8])}.")
    if target.exists() and not (overwrite and (target / DOCUMENT).is_file()):
        raise CheckpointError(
            f"{target} exists already; choose another path, or pass overwrite=True to replace an adapter."
        )
    names = [name for name in parameters if is_lora(name) or name in set(trained)]
    adapter = Adapter(config, tuple(name for name in names if not is_lora(name)), _checked_base(base))
    with atomic_folder(target) as beside:
        write_adapter(beside, adapter, {name: tuple(parameters[name].shape) for name in names}, model.get_parameter)


def write_adapter(root: pathlib.Path, adapter: Adapter, shapes: Shapes, read: Callable[[str], torch.Tensor]) -> None:
    """Write the files of an adapter into a folder that is there.

    Args:
        shapes: of the low-rank matrices and the other trained parameters, by name.
        read: gives them.
    """
    (root / DOCUMENT).write_text(adapter.to_json(), encoding="utf-8")
    leaves = {name: Leaf(shape, (Piece(name),)) for name, shape in shapes.items()}
    write_safetensors(root, leaves, lambda name: read(name).detach(), dtype=torch.float32, single=WEIGHTS)


def digest(names: Iterable[str], read: Callable[[str], torch.Tensor]) -> str:
    """SHA-256 over the names and numbers of parameters, in the order of their names.

    Args:
        read: gives them, in CPU memory; called in several threads.
    """

    def of_one(name: str) -> bytes:
        parameter = read(name).detach().contiguous()
        numbers = hashlib.sha256(parameter.flatten().view(torch.uint8).numpy().data).digest()
        return f"{name} {parameter.dtype} {list(parameter.shape)}".encode() + numbers

    whole = hashlib.sha256()
    with ThreadPoolExecutor() as threads:  # a hash of much data leaves the interpreter to others
        for part in threads.map(of_one, sorted(names)):
            whole.update(part)
    return whole.hexdigest()


def is_adapter(root: pathlib.Path) -> bool:
    """Whether a folder has an adapter."""
    return (root / DOCUMENT).is_file()


def read_adapter(path: str | pathlib.Path) -> Adapter:
    """Read and check adapter.json."""
    file = pathlib.Path(path).expanduser() / DOCUMENT
    if not file.is_file():
        raise MissingFileError(f"{file} does not exist; expected the folder of an adapter.")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        return Adapter.from_dict(document)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def load_adapter(path: str | pathlib.Path, model: Pi0) -> Adapter:
    """Attach an adapter to the base model that it belongs to, in place; nothing is changed if something is wrong.

    Args:
        model: the base, without LoRA or with the adapter's own, whose values are replaced. It is the caller's to see
            that it is the base that `Adapter.base` names: another model of the same sizes can't be told from it.

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
    arrays = SafetensorsArrays(root, WEIGHTS)
    expected = _expected_shapes(model, adapter)
    misshapen = [
        f"{name} is {list(arrays.shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if arrays.shapes.get(name, shape) != shape
    ]
    refuse_mismatch(
        root, sorted(set(expected) - set(arrays.shapes)), sorted(set(arrays.shapes) - set(expected)), misshapen
    )
    if present is None:
        attach_lora(model, adapter.lora)
    with torch.no_grad():
        for name in expected:
            model.get_parameter(name).copy_(arrays.read(name))
    return adapter


def _expected_shapes(model: Pi0, adapter: Adapter) -> Shapes:
    """Of all arrays that the adapter must have for this model."""
    planned = Pi0(model.config, device="meta")
    attach_lora(planned, adapter.lora)
    shapes = {name: tuple(parameter.shape) for name, parameter in planned.named_parameters()}
    if unknown := sorted(set(adapter.trained) - set(shapes)):
        raise CheckpointError(
            f"The adapter's field trained names what the model does not have: {', '.join(unknown[:8])}."
        )
    return {name: shape for name, shape in shapes.items() if is_lora(name) or name in set(adapter.trained)}


def _checked_base(base: Any) -> dict[str, str]:
    if not isinstance(base, Mapping) or not all(isinstance(value, str) for value in base.values()):
        raise CheckpointError(f"base must be an object of texts with address and perhaps sha256, found {base!r}.")
    require_fields(base, ["address", "dtype", *(["sha256"] if "sha256" in base else [])], "base")
    if base["dtype"] not in ("float32", "bfloat16"):
        raise CheckpointError(f"base.dtype must be float32 or bfloat16, found {base['dtype']!r}.")
    return dict(base)


def _lora_from_json(found: Any) -> LoraConfig:
    require_fields(found, [field.name for field in dataclasses.fields(LoraConfig)], "lora")
    # JSON does not tell 16 from 16.0.
    alphas = {
        name: float(value)
        for name, value in found.items()
        if name.endswith("_alpha") and isinstance(value, int | float) and not isinstance(value, bool)
    }
    try:
        return LoraConfig(**{**found, **alphas})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"lora: {error}") from error

"""Arrays in safetensors files: one model.safetensors, or shards with an index."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from torchpi.checkpoints import checksums
from torchpi.checkpoints.layout import Shapes, require_writable
from torchpi.errors import CheckpointError, MissingFileError, first_of
from torchpi.schema import is_file_name, parse, read_json, write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
_READ = _DTYPES | {"F16": torch.float16}
_QUANTIZED = {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8}
# As PyTorch allocates: an array's alignment selects the CPU's instructions, and so the last bits of matmuls.
_ALIGNMENT = 64


def require_intact(weights: pathlib.Path) -> None:
    """Raise an error where a safetensors file, or a shard that an index names, has another checksum than is stated
    beside it; files without one, of other programs and of earlier versions, are taken as they are."""
    if weights.suffix in (".safetensors", ".json"):
        files = sorted(set(_read_index(weights).values())) if weights.suffix == ".json" else [weights.name]
        checksums.require_intact(weights, files)


def has_weights(root: pathlib.Path) -> bool:
    return (root / SINGLE).is_file() or (root / INDEX).is_file()


class SafetensorsArrays:
    """The arrays of a folder's safetensors files; see `StoredArrays`."""

    def __init__(
        self, root: pathlib.Path, single: str = SINGLE, *, quantized: Mapping[str, torch.dtype] | None = None
    ) -> None:
        """Read the headers of the file `single`, or of the shards that its index names; `quantized` are the dtypes of
        the arrays in fp8 or int8."""
        whole, index = root / single, root / f"{single}.index.json"
        self.source = whole if whole.is_file() else index
        if whole.is_file() and index.is_file():
            raise CheckpointError(f"{root} has both {whole.name} and {index.name}; remove the one that is not meant.")
        if not whole.is_file() and not index.is_file():
            raise MissingFileError(f"{root} has neither {whole.name} nor {index.name}; the weights are expected there.")
        self._files: dict[str, pathlib.Path] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        expected = None if whole.is_file() else _read_index(index)
        files = [whole] if expected is None else [root / name for name in sorted(set(expected.values()))]
        self._open = {file: _opened(file) for file in files}
        self._sizes = {file: file.stat().st_size for file in files}
        shapes: dict[str, tuple[int, ...]] = {}
        for file, arrays in self._open.items():
            for name in arrays.keys():  # noqa: SIM118
                if name in self._files:
                    raise CheckpointError(f"{root} holds {name} twice, in {self._files[name].name} and in {file.name}.")
                entry = arrays.get_slice(name)
                dtype, expected_dtype = entry.get_dtype(), (quantized or {}).get(name)
                if expected_dtype is not None and _QUANTIZED.get(dtype) is not expected_dtype:
                    raise CheckpointError(f"{file}: {name} has dtype {dtype}; policy.json says {expected_dtype}.")
                if expected_dtype is None and dtype not in _READ:
                    raise CheckpointError(
                        f"{file}: {name} has dtype {dtype}; float32, bfloat16 and float16 weights are read."
                    )
                self._files[name], shapes[name] = file, tuple(entry.get_shape())
                self.dtypes[name] = (_DTYPES | _QUANTIZED).get(dtype, torch.float32)
        self.shapes: Shapes = shapes
        stored_in = {name: file.name for name, file in self._files.items()}
        if expected is not None and expected != stored_in:
            wrong = sorted(name for name in {*expected, *stored_in} if expected.get(name) != stored_in.get(name))
            raise CheckpointError(f"{index} and the files disagree about {first_of(wrong)}; get the checkpoint again.")

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """An array in `dtype`, by default its stored one.

        One that need not be converted is the mapped file itself: nothing is read before it is used, and writing to it
        does not change the file.
        """
        file = self._files[name]
        # A mapped page that is gone would end the process.
        if file.is_file() and (size := file.stat().st_size) != self._sizes[file]:
            raise CheckpointError(
                f"{file} had {self._sizes[file]} bytes when it was opened, and has {size} now: it is being written; "
                "load it when it is complete."
            )
        try:
            mapped: Tensor = self._open[file].get_tensor(name)
            if dtype in (None, mapped.dtype) and mapped.data_ptr() % _ALIGNMENT == 0:
                return mapped
            # Not from the one that stays open: what was read through it counts as used memory until it is closed.
            with safetensors.safe_open(file, framework="pt") as arrays:
                tensor: Tensor = arrays.get_tensor(name)
        except safetensors.SafetensorError as error:
            raise _corrupt(file, error) from error
        return tensor.to(dtype or tensor.dtype, copy=True)


def _opened(file: pathlib.Path) -> Any:
    if not file.is_file():
        raise MissingFileError(f"{file} does not exist; the index names it. Get the checkpoint again.")
    with file.open("rb") as content:
        start = content.read(9)
    # safetensors begins with the length of its header, whose first byte may be any, and then the header's JSON.
    if start[8:] != b"{" and (start.startswith(b"PK\x03\x04") or start[:1] == b"\x80"):
        raise CheckpointError(
            f"{file} is a zip archive or a pickle, not safetensors; it is not read, because unpickling runs code. "
            "Convert it where it comes from."
        )
    try:
        return safetensors.safe_open(file, framework="pt").__enter__()
    except safetensors.SafetensorError as error:
        raise _corrupt(file, error) from error


def _corrupt(file: pathlib.Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file} is truncated or corrupt: {error}; get the file again.")


@dataclasses.dataclass(frozen=True)
class _Index:
    weight_map: dict[str, str]
    """Names of arrays to names of files."""


def _read_index(index: pathlib.Path) -> dict[str, str]:
    document = read_json(index, error=CheckpointError)
    weight_map = parse(_Index, document, f"{index} is no index", error=CheckpointError, known_only=False).weight_map
    if not weight_map:
        raise CheckpointError(f"{index} is no index: weight_map is empty.")
    for file in set(weight_map.values()):
        if not is_file_name(file) or "\\" in file:
            raise CheckpointError(f"{index} names the file {file!a:.300}; only files next to the index are read.")
    return weight_map


def write_safetensors(
    root: pathlib.Path,
    shapes: Shapes,
    read: Callable[[str], Tensor],
    *,
    dtypes: Mapping[str, torch.dtype],
    max_shard_bytes: int | None = None,
    metadata: Mapping[str, str] | None = None,
    single: str = SINGLE,
) -> None:
    """Write arrays of these dtypes, read by name, into one file, or into shards with an index where they are more than
    `max_shard_bytes`, and their checksums; the files' headers have the `metadata`."""
    for dtype in {*dtypes.values()} - {*_QUANTIZED.values()}:
        require_writable(dtype)
    size = {name: dtypes[name].itemsize * torch.Size(shape).numel() for name, shape in shapes.items()}
    shards: list[dict[str, int]] = [{}]
    room = max_shard_bytes or sum(size.values())
    for name in shapes:
        if shards[-1] and sum(shards[-1].values()) + size[name] > room:
            shards.append({})
        shards[-1][name] = size[name]
    files = [single]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, sizes in zip(files, shards, strict=True):
        with (root / file).open("wb") as out:
            _write_file(out, shapes, sizes, read, dtypes, {"format": "pt", **(metadata or {})})
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        document = {"metadata": {"total_size": sum(size.values())}, "weight_map": weight_map}
        write_json(root / INDEX, document)
    checksums.write_checksums(root, single, files)


def _write_file(
    file: BinaryIO,
    shapes: Shapes,
    sizes: Mapping[str, int],
    read: Callable[[str], Tensor],
    dtypes: Mapping[str, torch.dtype],
    metadata: Mapping[str, str],
) -> None:
    """A file of the format, one array after the other, each aligned so that it can be used where it lies.

    The library's own writer wants all arrays at once and aligns them to 8 bytes.
    """
    # The format allows no gaps: arrays whose size would move the next one off its place come last.
    order = sorted(sizes, key=lambda name: sizes[name] % _ALIGNMENT != 0)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end, codes = 0, {known: code for code, known in (_DTYPES | _QUANTIZED).items()}
    for name in order:
        begin, end = end, end + sizes[name]
        header[name] = {"dtype": codes[dtypes[name]], "shape": list(shapes[name]), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        array = read(name).detach().to("cpu", dtypes[name]).contiguous()
        if array.shape != shapes[name]:
            raise CheckpointError(f"{name} is {list(array.shape)}, expected {list(shapes[name])}.")
        file.write(array.view(-1).view(torch.uint8).numpy().data)

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
from torchpi.checkpoints.layout import Shapes, loaded_dtypes, require_writable
from torchpi.errors import CheckpointError, MissingFileError, first_of
from torchpi.schema import is_file_name, parse, read_json, write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
_QUANTIZED = {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8}
# PyTorch's own alignment: CPU kernels depend on it, and so do the last bits of matmul results.
_ALIGNMENT = 64


def require_intact(weights: pathlib.Path) -> None:
    """Raise an error if a safetensors file, or a shard of an index, does not have the checksum stated next to it.

    Files without a checksum, from other programs and earlier versions, are accepted.
    """
    if weights.suffix in (".safetensors", ".json"):
        files = sorted(set(_read_index(weights).values())) if weights.suffix == ".json" else [weights.name]
        checksums.require_intact(weights, files)


def has_weights(root: pathlib.Path) -> bool:
    return (root / SINGLE).is_file() or (root / INDEX).is_file()


class SafetensorsArrays:
    """Arrays of a folder's safetensors files; see `StoredArrays`."""

    def __init__(
        self, root: pathlib.Path, single: str = SINGLE, *, quantized: Mapping[str, torch.dtype] | None = None
    ) -> None:
        """Read the headers of the file `single`, or of the shards in its index.

        `quantized` has the dtypes of arrays in fp8 or int8.
        """
        file, index = root / single, root / f"{single}.index.json"
        if file.is_file() and index.is_file():
            raise CheckpointError(f"{root} has both {file.name} and {index.name}; remove one of them.")
        if not file.is_file() and not index.is_file():
            raise MissingFileError(f"{root} has neither {file.name} nor {index.name}; the weights are expected there.")
        self.source = file if file.is_file() else index
        self._files: dict[str, pathlib.Path] = {}
        weight_map = None if file.is_file() else _read_index(index)
        files = [file] if weight_map is None else [root / name for name in sorted(set(weight_map.values()))]
        self._open = {file: _open(file) for file in files}
        self._sizes = {file: file.stat().st_size for file in files}
        shapes, stored, quantized = {}, {}, quantized or {}
        for file, arrays in self._open.items():
            for name in arrays.keys():  # noqa: SIM118
                if name in self._files:
                    raise CheckpointError(f"{root} holds {name} twice, in {self._files[name].name} and in {file.name}.")
                entry = arrays.get_slice(name)
                self._files[name], shapes[name], dtype = file, tuple(entry.get_shape()), entry.get_dtype()
                if name not in quantized:
                    stored[name] = dtype
                elif _QUANTIZED.get(dtype) is not quantized[name]:
                    raise CheckpointError(f"{file}: {name} has dtype {dtype}; policy.json says {quantized[name]}.")
        self.shapes: Shapes = shapes
        self.dtypes = loaded_dtypes(self.source, stored, _DTYPES | {"F16": torch.float32})
        self.dtypes |= {name: dtype for name, dtype in quantized.items() if name in shapes}
        found = {name: file.name for name, file in self._files.items()}
        if weight_map is not None and weight_map != found:
            wrong = sorted(name for name in {*weight_map, *found} if weight_map.get(name) != found.get(name))
            raise CheckpointError(f"{index} and the files disagree about {first_of(wrong)}; get the checkpoint again.")

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read an array in `dtype`, by default the stored one.

        Without a cast the result is memory-mapped: data are read on first use, and writing to it does not change the
        file.
        """
        file = self._files[name]
        # Reading a mapped page beyond the end of a truncated file would kill the process.
        if file.is_file() and (size := file.stat().st_size) != self._sizes[file]:
            raise CheckpointError(
                f"{file} had {self._sizes[file]} bytes when it was opened, and has {size} now: it is being written; "
                "load it when it is complete."
            )
        try:
            mapped: Tensor = self._open[file].get_tensor(name)
            if dtype in (None, mapped.dtype) and mapped.data_ptr() % _ALIGNMENT == 0:
                return mapped
            # A new mapping, which is closed after the copy: pages read through the open one would stay in memory.
            with safetensors.safe_open(file, framework="pt") as arrays:
                tensor: Tensor = arrays.get_tensor(name)
        except safetensors.SafetensorError as error:
            raise _corrupt(file, error) from error
        return tensor.to(dtype or tensor.dtype, copy=True)


def _open(file: pathlib.Path) -> Any:
    if not file.is_file():
        raise MissingFileError(f"{file} does not exist; the index names it. Get the checkpoint again.")
    with file.open("rb") as content:
        start = content.read(9)
    # safetensors begins with 8 bytes for the length of its header, which may look like a pickle, and then JSON.
    if start[8:] != b"{" and (start.startswith(b"PK\x03\x04") or start[:1] == b"\x80"):
        raise CheckpointError(
            f"{file} is a zip archive or a pickle, not safetensors; it is not read, because unpickling can run code. "
            "Convert it to safetensors with the program that wrote it."
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
    """Array name → file name."""


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
    """Write arrays and their checksums, one array at a time.

    Args:
        read: returns an array by its name.
        dtypes: dtype of each array in the file.
        max_shard_bytes: split into shards with an index above this size; by default one file.
        metadata: texts for the headers of the files.
        single: name of the file, if it is only one.
    """
    for dtype in {*dtypes.values()} - {*_QUANTIZED.values()}:
        require_writable(dtype)
    num_bytes = {name: dtypes[name].itemsize * torch.Size(shape).numel() for name, shape in shapes.items()}
    total = sum(num_bytes.values())
    shards: list[dict[str, int]] = [{}]
    for name, size in num_bytes.items():
        if shards[-1] and sum(shards[-1].values()) + size > (max_shard_bytes or total):
            shards.append({})
        shards[-1][name] = size
    files = [single]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, sizes in zip(files, shards, strict=True):
        with (root / file).open("wb") as out:
            _write_file(out, shapes, sizes, read, dtypes, {"format": "pt", **(metadata or {})})
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        document = {"metadata": {"total_size": total}, "weight_map": weight_map}
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
    """Write one file, with arrays aligned so that they can be memory-mapped.

    The library's own writer needs all arrays at once, and aligns them to 8 bytes.
    """
    # The format allows no gaps: arrays whose size would misalign the next one come last.
    order = sorted(sizes, key=lambda name: sizes[name] % _ALIGNMENT != 0)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    codes = {dtype: code for code, dtype in (_DTYPES | _QUANTIZED).items()}
    end = 0
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

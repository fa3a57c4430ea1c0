"""Checksums of weights files, in a document beside them: a file that was damaged since is an error.

<name>.checksums.json       of model.safetensors or adapter.safetensors, or of the shards of that name

CRC-32 finds accidents, not forgeries: whoever can change the weights can change their checksums. A file has one per
block, so that several threads can read it.
"""

import dataclasses
import itertools
import os
import pathlib
import zlib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal

from torchpi.errors import CheckpointError
from torchpi.schema import parse, read_json, write_json

_BLOCK_BYTES = 67_108_864
_READ_BYTES = 1 << 20  # stays in the processor's cache, where a checksum costs least
_MOST_THREADS = 8


@dataclasses.dataclass(frozen=True)
class Checksums:
    """The document."""

    block_bytes: Literal[67_108_864]
    crc32: dict[str, list[str]]
    """By the file's name, the checksum of each of its blocks, in hexadecimal."""


def write_checksums(root: pathlib.Path, name: str, files: Collection[str]) -> None:
    write_json(_document(root / name), {"block_bytes": _BLOCK_BYTES, "crc32": {f: _crc32s(root / f) for f in files}})


def require_intact(weights: pathlib.Path, files: Collection[str]) -> None:
    """Raise an error where files have other checksums than the document of `weights` states, if there is one."""
    document = _document(weights)
    if not document.is_file():
        return
    stated = parse(Checksums, read_json(document, error=CheckpointError), str(document), error=CheckpointError).crc32
    for name in files:
        file = weights.with_name(name)
        found, expected = _crc32s(file), stated.get(name, [])
        if found != expected:
            pairs = enumerate(itertools.zip_longest(found, expected))
            start = _BLOCK_BYTES * next(block for block, (ours, theirs) in pairs if ours != theirs)
            raise CheckpointError(
                f"{file} is damaged, or of another checkpoint: from byte {start} on it has another checksum than "
                f"{document.name} states. Get the folder again. If the file was changed on purpose, delete {document}, "
                "or load it with --no-verify (verify= in Python)."
            )


def _document(weights: pathlib.Path) -> pathlib.Path:
    return weights.with_name(f"{weights.name.removesuffix('.index.json')}.checksums.json")


def _crc32s(file: pathlib.Path) -> list[str]:
    blocks = range(0, max(file.stat().st_size, 1), _BLOCK_BYTES)
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as threads:  # reading releases the interpreter
        return list(threads.map(partial(_crc32, file), blocks))


def _crc32(file: pathlib.Path, start: int) -> str:
    crc, left, buffer = 0, _BLOCK_BYTES, memoryview(bytearray(_READ_BYTES))
    with file.open("rb", buffering=0) as content:
        content.seek(start)
        while left and (count := content.readinto(buffer[:left])):
            crc, left = zlib.crc32(buffer[:count], crc), left - count
    return f"{crc:08x}"

"""Checksums of weights files, to detect files that were damaged after they were written.

<name>.checksums.json       for <name>.safetensors (model or adapter), or for its shards

CRC-32 detects accidents, not forgeries: whoever can change the weights can change their checksums. There is one per
block of a file, so that several threads can compute them.
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
_READ_BYTES = 1 << 20  # fits into the CPU's cache
_MAX_THREADS = 8


@dataclasses.dataclass(frozen=True)
class Checksums:
    """Contents of a .checksums.json."""

    block_bytes: Literal[67_108_864]
    crc32: dict[str, list[str]]
    """File name → checksums of its blocks, in hexadecimal."""


def write_checksums(root: pathlib.Path, name: str, files: Collection[str]) -> None:
    write_json(_document(root / name), {"block_bytes": _BLOCK_BYTES, "crc32": {f: _crc32s(root / f) for f in files}})


def require_intact(weights: pathlib.Path, files: Collection[str]) -> None:
    """Raise an error if files do not have the checksums in the document next to `weights`; without one, accept them."""
    document = _document(weights)
    if not document.is_file():
        return
    stated = parse(Checksums, read_json(document, error=CheckpointError), str(document), error=CheckpointError).crc32
    for name in files:
        file = weights.with_name(name)
        found, expected = _crc32s(file), stated.get(name, [])
        if found != expected:
            pairs = enumerate(itertools.zip_longest(found, expected))
            start = _BLOCK_BYTES * next(block for block, (crc, expected_crc) in pairs if crc != expected_crc)
            raise CheckpointError(
                f"{file} is damaged, or of another checkpoint: from byte {start} on its checksum differs from the one "
                f"in {document.name}. Get the folder again. If the file was changed on purpose, delete {document}, "
                "or load it with --no-verify (verify= in Python)."
            )


def _document(weights: pathlib.Path) -> pathlib.Path:
    return weights.with_name(f"{weights.name.removesuffix('.index.json')}.checksums.json")


def _crc32s(file: pathlib.Path) -> list[str]:
    blocks = range(0, max(file.stat().st_size, 1), _BLOCK_BYTES)
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as threads:  # reading and CRC release the GIL
        return list(threads.map(partial(_crc32, file), blocks))


def _crc32(file: pathlib.Path, start: int) -> str:
    crc, left, buffer = 0, _BLOCK_BYTES, memoryview(bytearray(_READ_BYTES))
    with file.open("rb", buffering=0) as content:
        content.seek(start)
        while left and (count := content.readinto(buffer[:left])):
            crc, left = zlib.crc32(buffer[:count], crc), left - count
    return f"{crc:08x}"

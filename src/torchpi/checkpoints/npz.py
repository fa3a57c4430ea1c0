"""JAX weights in an .npz file, by key paths that are joined with "/": PaliGemma's as published, or a whole model's."""

import math
import pathlib
import tokenize
import zipfile
import zlib

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from torchpi.checkpoints.layout import Shapes
from torchpi.errors import CheckpointError
from torchpi.model.pi0 import Pi0
from torchpi.model.suffix import init_projections

# NumPy does not know bfloat16, and writes two bytes of no type.
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "void16": torch.bfloat16}
DRAWN = ("expert.", "suffix.", "action_out_proj.")
"""The beginnings of the names of parameters that PaliGemma does not have."""
_DAMAGED = (zipfile.BadZipFile, zlib.error, tokenize.TokenError, ValueError, EOFError)


def find_npz(root: pathlib.Path) -> pathlib.Path | None:
    """The file itself, or the only .npz file of a folder."""
    files = [root] if root.is_file() else sorted(root.glob("*.npz"))
    return files[0] if len(files) == 1 else None


class NpzArrays:
    """The arrays of an .npz file by openpi's names; see `StoredArrays`."""

    def __init__(self, file: pathlib.Path) -> None:
        self.source, self._members = file, dict[str, str]()
        shapes, dtypes = {}, {}
        try:
            with zipfile.ZipFile(file) as archive:
                for member in archive.infolist():
                    name = _openpi_name(member.filename.removesuffix(".npy"))
                    if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                        raise ValueError(f"{name} is encrypted, or compressed as NumPy does not")
                    with archive.open(member) as content:
                        header = (
                            npy.read_array_header_1_0
                            if npy.read_magic(content) == (1, 0)
                            else npy.read_array_header_2_0
                        )
                        shapes[name], _, dtypes[name] = header(content)
                        size = content.tell() + math.prod(shapes[name]) * dtypes[name].itemsize
                    if size != member.file_size and not dtypes[name].hasobject:
                        raise ValueError(f"{name} has {member.file_size} bytes, of which its header says {size}")
                    self._members[name] = member.filename
        except _DAMAGED as error:
            raise CheckpointError(f"{file} is no .npz file, or is damaged: {error}; get the file again.") from error
        if others := [f"{name} has dtype {dtype.name}" for name, dtype in dtypes.items() if dtype.name not in _DTYPES]:
            raise CheckpointError(
                f"{file}: float32, bfloat16 and float16 weights are read, but {', '.join(others[:8])}."
            )
        self.shapes: Shapes = shapes
        halves = {name for name, dtype in dtypes.items() if dtype.name == "void16"}
        self.dtypes = {name: torch.bfloat16 if name in halves else torch.float32 for name in shapes}

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        try:
            with zipfile.ZipFile(self.source) as archive, archive.open(self._members[name]) as content:
                array = npy.read_array(content, allow_pickle=False)
        except _DAMAGED as error:
            raise CheckpointError(f"{self.source}: {name} is damaged: {error}; get the file again.") from error
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        is_bfloat16 = array.dtype.kind == "V"
        tensor = (
            torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16) if is_bfloat16 else torch.from_numpy(array)
        )
        return tensor.to(dtype or tensor.dtype)


def _openpi_name(path: str) -> str:
    parts = path.removeprefix("params/").removesuffix("/value").split("/")
    return ".".join(["PaliGemma", *parts] if parts[0] in ("img", "llm") else parts)


@torch.no_grad()
def draw_action_weights(model: Pi0, seed: int) -> None:
    """Draw the weights that PaliGemma does not have, as for training from scratch."""
    generator = torch.Generator(model.device).manual_seed(seed)
    for part in (model.expert, model.suffix, model.action_out_proj):
        part.to_empty(device=model.device)
    model.expert.init_weights(generator)
    init_projections(model.suffix, generator)
    init_projections(model.action_out_proj, generator)

"""JAX weights in an .npz file, with key paths joined by "/": PaliGemma's published file, or a whole model."""

import math
import pathlib
import tokenize
import zipfile
import zlib

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from torchpi.checkpoints.layout import Shapes, loaded_dtypes
from torchpi.errors import CheckpointError
from torchpi.model.pi0 import Pi0
from torchpi.model.suffix import init_projections

# NumPy has no bfloat16, and writes it as untyped two-byte values.
_DTYPES = {"float32": torch.float32, "float16": torch.float32, "void16": torch.bfloat16}
DRAWN = ("expert.", "suffix.", "action_out_proj.")
"""Name prefixes of the parameters that PaliGemma does not have."""
_DAMAGED = (zipfile.BadZipFile, zlib.error, tokenize.TokenError, ValueError, EOFError)


def find_npz(root: pathlib.Path) -> pathlib.Path | None:
    """The file itself, or the only .npz file in a folder."""
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
                        raise ValueError(f"{name} is encrypted, or has a compression that NumPy does not use")
                    with archive.open(member) as content:
                        is_v1 = npy.read_magic(content) == (1, 0)
                        read_header = npy.read_array_header_1_0 if is_v1 else npy.read_array_header_2_0
                        shapes[name], _, dtypes[name] = read_header(content)
                        size = content.tell() + math.prod(shapes[name]) * dtypes[name].itemsize
                    if size != member.file_size and not dtypes[name].hasobject:
                        raise ValueError(f"{name} has {member.file_size} bytes; its header describes {size}")
                    self._members[name] = member.filename
        except _DAMAGED as error:
            raise CheckpointError(f"{file} is no .npz file, or is damaged: {error}; get the file again.") from error
        self.shapes: Shapes = shapes
        self.dtypes = loaded_dtypes(file, {name: dtype.name for name, dtype in dtypes.items()}, _DTYPES)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        try:
            with zipfile.ZipFile(self.source) as archive, archive.open(self._members[name]) as content:
                array = npy.read_array(content, allow_pickle=False)
        except _DAMAGED as error:
            raise CheckpointError(f"{self.source}: {name} is damaged: {error}; get the file again.") from error
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        if array.dtype.kind == "V":
            tensor = torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(array)
        return tensor.to(dtype or tensor.dtype)


def _openpi_name(path: str) -> str:
    parts = path.removeprefix("params/").removesuffix("/value").split("/")
    return ".".join(["PaliGemma", *parts] if parts[0] in ("img", "llm") else parts)


@torch.no_grad()
def draw_action_weights(model: Pi0, seed: int) -> None:
    """Draw the weights that PaliGemma does not have at random, for training from scratch."""
    generator = torch.Generator(model.device).manual_seed(seed)
    for part in (model.expert, model.suffix, model.action_out_proj):
        part.to_empty(device=model.device)
    model.expert.init_weights(generator)
    init_projections(model.suffix, generator)
    init_projections(model.action_out_proj, generator)

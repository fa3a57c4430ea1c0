"""Camera images that lie as compressed files in the data files' rows."""

import collections
import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from torchpi.data.metadata import open_parquet
from torchpi.errors import DatasetError, UnknownKeyError


class ParquetImages:
    """Images out of data files, for any number of threads; row groups read last stay in memory, compressed."""

    def __init__(self, cache_bytes: int) -> None:
        self._cache_bytes, self._cached_bytes = cache_bytes, 0
        self._lock = threading.Lock()
        self._row_groups: collections.OrderedDict[tuple[Path, str, int], Any] = collections.OrderedDict()
        self._first_rows: dict[Path, np.ndarray] = {}

    def read(self, path: Path, camera: str, row: int) -> UInt8[np.ndarray, "h w 3"]:
        compressed = self._compressed(path, camera, row)
        if compressed is None:
            raise DatasetError(
                f"{path} has no image of {camera} in row {row}; images in files of their own are not read."
            )
        try:
            with Image.open(io.BytesIO(compressed)) as image:
                return np.array(image if image.mode == "RGB" else image.convert("RGB"))
        except (OSError, SyntaxError) as error:  # SyntaxError: Pillow's, for a damaged PNG
            raise DatasetError(f"{path}: the image of {camera} in row {row} is damaged: {error}.") from error

    def _compressed(self, path: Path, camera: str, row: int) -> Any:
        if path not in self._first_rows:
            with open_parquet(path) as file:
                counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            self._first_rows[path] = np.cumsum([0, *counts[:-1]])
        row_group = int(np.searchsorted(self._first_rows[path], row, side="right")) - 1
        key = (path, camera, row_group)
        images = self._row_groups.get(key)
        if images is None:
            images = _read_row_group(path, camera, row_group)
        with self._lock:
            if key not in self._row_groups:  # another thread may have been as fast
                self._cached_bytes += images.nbytes
            self._row_groups[key] = images
            self._row_groups.move_to_end(key)
            while self._cached_bytes > self._cache_bytes and len(self._row_groups) > 1:
                self._cached_bytes -= self._row_groups.popitem(last=False)[1].nbytes
        return images[row - int(self._first_rows[path][row_group])].as_buffer()


def _read_row_group(path: Path, camera: str, row_group: int) -> Any:
    column = f"{camera}.bytes"
    with open_parquet(path) as file:
        table = file.read_row_group(row_group, columns=[column]).flatten()
        columns = ", ".join(file.schema_arrow.names)
    if table.column_names != [column]:
        raise UnknownKeyError(f"{path} has no images of {camera}; its columns are {columns}.")
    return table.column(0)

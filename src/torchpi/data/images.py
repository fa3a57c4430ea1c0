"""Camera images: compressed files in the data files' rows, or files of their own that the rows name."""

import collections
import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from torchpi.data.files import DatasetFolder, open_parquet
from torchpi.data.pixels import DepthCoding, Pixels, image_pixels
from torchpi.errors import DatasetError, MissingFileError, UnknownKeyError
from torchpi.extras import require


class ParquetImages:
    """Images out of data files, for any number of threads; row groups read last stay in memory, compressed."""

    def __init__(self, root: Path, cache_bytes: int) -> None:
        self._root, self._cache_bytes, self._cached_bytes = root, cache_bytes, 0
        self._lock = threading.Lock()
        self._row_groups: collections.OrderedDict[tuple[Path, str, int], Any] = collections.OrderedDict()
        self._first_rows: dict[Path, np.ndarray] = {}

    def read(self, path: Path, camera: str, row: int, depth: DepthCoding | None = None) -> Pixels:
        file = io.BytesIO(self.file(path, camera, row))
        try:
            return image_pixels(file, depth)
        except UnidentifiedImageError as error:
            raise DatasetError(
                f"{path}: the image of {camera} in row {row} is in no format that Pillow reads, such as TIFF with "
                "floating-point numbers of 64 or 16 bits. Store it as PNG, JPEG, or TIFF of 16-bit integers or 32-bit "
                "floating-point numbers."
            ) from error
        except DatasetError:
            raise
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow has many kinds
            raise DatasetError(f"{path}: the image of {camera} in row {row} is damaged: {error!s:.200}.") from error

    def file(self, path: Path, camera: str, row: int) -> bytes:
        """An image as it is stored."""
        found = self._row(path, camera, row)
        if (compressed := found.get("bytes")) is not None:
            return bytes(compressed)
        if (name := found.get("path")) is None:
            raise DatasetError(f"{path} has no image of {camera} in row {row}, and names no file of it.")
        return _file_inside(self._root, name, f"{path}, row {row}").read_bytes()

    def _row(self, path: Path, camera: str, row: int) -> dict[str, Any]:
        """The "bytes" and "path" of a row, as far as it has them."""
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
        place = row - int(self._first_rows[path][row_group])
        return {name: images[name][place].as_py() for name in images.column_names}


def _read_row_group(path: Path, camera: str, row_group: int) -> Any:
    """A table of the images' "bytes" and "path"s, of which a dataset may have one only."""
    with open_parquet(path) as file:
        table = file.read_row_group(row_group, columns=[camera])
        columns = ", ".join(file.schema_arrow.names)
    if table.column_names != [camera]:
        raise UnknownKeyError(f"{path} has no images of {camera}; its columns are {columns}.")
    kind = table.schema.field(0).type
    if require("pyarrow", "data").types.is_struct(kind):
        return table.flatten().rename_columns([field.name for field in kind])
    if (name := {"binary": "bytes", "string": "path"}.get(str(kind).removeprefix("large_"))) is None:
        raise DatasetError(f"{path}: {camera} is {kind}; expected images as PNG, JPEG or TIFF, or the names of files.")
    return table.rename_columns([name])


def _file_inside(root: Path, name: str, where: str) -> Path:
    """An image's file in the dataset's folder, also where its name is a path on the computer that recorded it."""
    parts = name.replace("\\", "/").split("/")
    starts = [0] if parts[0] and ":" not in parts[0] else []
    starts += [i for i, part in enumerate(parts) if part == "images" and i]
    inside = [root.joinpath(*parts[i:]) for i in starts if ".." not in parts[i:]]
    if found := next((file for file in inside if file.is_file()), None):
        DatasetFolder(root).check(found)
        return found
    raise MissingFileError(
        f"{where} names the image {name}, which is not in the dataset's folder {root}: expected it there under "
        "images/. Copy the images as well; of a dataset of the Hub, download the whole repository."
    )

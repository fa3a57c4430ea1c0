"""Camera images stored in the rows of data files, or in separate files named by the rows."""

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
    """Thread-safe reader of images in data files. The last row groups read stay in memory, compressed."""

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
                f"{path}: the image of {camera} in row {row} has a format that Pillow can't read, for example TIFF "
                "with 64-bit or 16-bit floating-point numbers. Store it as PNG, JPEG, or TIFF with 16-bit integers or "
                "32-bit floating-point numbers."
            ) from error
        except DatasetError:
            raise
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow raises any of these
            raise DatasetError(f"{path}: the image of {camera} in row {row} is damaged: {error!s:.200}.") from error

    def file(self, path: Path, camera: str, row: int) -> bytes:
        """The encoded image."""
        image = self._row(path, camera, row)
        if image.get("bytes") is not None:
            return bytes(image["bytes"])
        if (name := image.get("path")) is None:
            raise DatasetError(f"{path} has no image of {camera} in row {row}, and names no image file.")
        return _file_inside(self._root, name, f"{path}, row {row}").read_bytes()

    def _row(self, path: Path, camera: str, row: int) -> dict[str, Any]:
        """The "bytes" and "path" of a row; a dataset may have only one of them."""
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
            if key not in self._row_groups:  # otherwise another thread has read it, too
                self._cached_bytes += images.nbytes
            self._row_groups[key] = images
            self._row_groups.move_to_end(key)
            while self._cached_bytes > self._cache_bytes and len(self._row_groups) > 1:
                self._cached_bytes -= self._row_groups.popitem(last=False)[1].nbytes
        offset = row - int(self._first_rows[path][row_group])
        return {name: images[name][offset].as_py() for name in images.column_names}


def _read_row_group(path: Path, camera: str, row_group: int) -> Any:
    """Table with the columns "bytes" and "path" of the images, or one of them."""
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
    """An image's file in the dataset's folder. Its name may be an absolute path on the computer that recorded it."""
    parts = name.replace("\\", "/").split("/")
    starts = [0] if parts[0] and ":" not in parts[0] else []
    starts += [i for i, part in enumerate(parts) if part == "images" and i]
    for file in (root.joinpath(*parts[i:]) for i in starts if ".." not in parts[i:]):
        if file.is_file():
            DatasetFolder(root).check(file)
            return file
    raise MissingFileError(
        f"{where} names the image {name}, which is not in the dataset's folder {root}: expected it in its "
        "folder images/. Copy the images as well; for a dataset on the Hub, download the whole repository."
    )

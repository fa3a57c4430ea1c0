"""Read .npz and .npy files from users, without ever unpickling."""

import pathlib
import zipfile
import zlib

import numpy as np

from torchpi.errors import MissingFileError, UsageError


def read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise MissingFileError(f"There is no file {path}; check its path.")
    try:
        if not zipfile.is_zipfile(path):
            raise UsageError("It is not a zip file.")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError) as error:
        hint = ""
        if "Object arrays" in str(error):
            hint = (
                ". np.savez(PATH, **torchpi.robots.flatten(observation)) saves a nested observation, with joined keys."
            )
        raise UsageError(f"{path} is not an .npz file of plain arrays, or is damaged: {error}{hint}") from error


def read_npy(path: pathlib.Path) -> np.ndarray:
    if not path.is_file():
        raise MissingFileError(f"There is no file {path}; check its path.")
    try:
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UsageError(f"{path} is not an .npy file of a plain array, or is damaged: {error}") from error

"""Optional dependencies: imported on first use, with an error that names the install command."""

import contextlib
import importlib.metadata
import os
from collections.abc import Iterator
from typing import Any

from torchpi.errors import MissingExtraError

_NEEDS = {
    "adamw8bit": "The optimizer adamw8bit needs the extra 'adamw8bit'",
    "aloha": "Simulating ALOHA needs the extra 'sim' and Python 3.11 or 3.12 (labmaze has no wheel for newer ones)",
    "client": "Querying a policy server needs torchpi-client",
    "data": "Datasets, videos and TensorBoard need the extra 'data'",
    "gcs": "Addresses that begin with gs:// need the extra 'gcs'",
    "gpu": "The fused kernels for GPUs need the extra 'gpu'",
    "hdf5": "HDF5 needs the extra 'hdf5'",
    "libero": "LIBERO and robosuite need the extra 'libero'",
    "rerun": "Viewing needs the extra 'rerun' and torchpi-client",
    "serve": "Serving needs the extra 'serve' and torchpi-client",
    "sim": "Simulation needs the extra 'sim'",
    "track": "Weights & Biases needs the extra 'track'",
}
_COMMANDS = {
    "aloha": "pip install 'torchpi[sim]'",
    "client": "pip install torchpi-client",
    "rerun": "pip install ./client '.[rerun]' in torchpi's repository",
    "serve": "pip install ./client '.[serve]' in torchpi's repository",
}


def require(module: str, extra: str) -> Any:
    """Import a module that an extra of torchpi installs."""
    with _name_extra(extra):
        return importlib.import_module(module)


def check_installed(distribution: str, extra: str) -> None:
    """Raise the error of `require` unless a distribution of an extra is installed, without importing it."""
    with _name_extra(extra):
        importlib.metadata.version(distribution)


@contextlib.contextmanager
def _name_extra(extra: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        command = _COMMANDS.get(extra, f"pip install 'torchpi[{extra}]'")
        raise MissingExtraError(f"{_NEEDS[extra]}: {command} ({error}).") from error


@contextlib.contextmanager
def environment_defaults(**variables: str) -> Iterator[None]:
    """Set environment variables for a library or for child processes, unless the user has set them."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)

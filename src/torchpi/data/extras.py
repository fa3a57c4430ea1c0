"""The libraries that only data sets need; they are an extra, and are imported where they are used."""

import importlib
from typing import Any

from torchpi.errors import MissingExtraError


def require(module: str) -> Any:
    """The module, imported."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"Data sets need the extra 'data': pip install 'torchpi[data]' ({error}).") from error

"""The libraries that only data sets need; they are an extra, and are imported where they are used."""

import importlib
from typing import Any


def require(module: str) -> Any:
    """The module, imported.

    Raises:
        ModuleNotFoundError: it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"data sets need the extra 'data': pip install 'torchpi[data]' ({error})") from error

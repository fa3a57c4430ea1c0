"""The package's data: tokenizer, recipes, the embedded policy, styles of pages."""

import importlib.resources
import pathlib


def assets() -> pathlib.Path:
    """The folder with the package's data."""
    return pathlib.Path(str(importlib.resources.files("torchpi.assets")))

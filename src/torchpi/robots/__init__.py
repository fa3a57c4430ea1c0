"""Embodiments: descriptions of robots as data. `get_embodiment` loads one by name or from a file."""

from pathlib import Path
from typing import Any

from torchpi.errors import EmbodimentError, MissingFileError, UnknownKeyError, closest
from torchpi.robots.embodiment import Embodiment as Embodiment
from torchpi.robots.keys import flatten as flatten
from torchpi.robots.parts import HOOKS as HOOKS
from torchpi.robots.parts import ActionDim as ActionDim
from torchpi.robots.parts import Camera as Camera
from torchpi.robots.parts import Hook as Hook
from torchpi.robots.parts import StateKey as StateKey
from torchpi.robots.presets import EMBODIMENTS as EMBODIMENTS
from torchpi.robots.presets import aloha as aloha
from torchpi.robots.presets import droid as droid
from torchpi.robots.presets import libero as libero
from torchpi.robots.presets import metaworld as metaworld
from torchpi.robots.presets import read_embodiment
from torchpi.transforms.depth import DepthMapping as DepthMapping


def get_embodiment(embodiment: Any) -> Embodiment:
    """Load an embodiment by name, or from a JSON file as written from `Embodiment.to_dict`.

    An Embodiment is returned unchanged. Objects in the file may have a field `comment`, which is ignored.

    Raises:
        KeyError: neither a known name nor a file.
        FileNotFoundError: the .json file does not exist.
        ValueError: the file is not JSON or not an embodiment; an argument of the wrong type.
    """
    if isinstance(embodiment, Embodiment):
        return embodiment
    if isinstance(embodiment, str) and embodiment in EMBODIMENTS:
        return EMBODIMENTS[embodiment]()
    if not isinstance(embodiment, str | Path):
        raise EmbodimentError(
            f"An embodiment is a name, a path or an Embodiment; found a value of type {type(embodiment).__name__}."
        )
    file = Path(embodiment)
    if file.is_file():
        return read_embodiment(file)
    if file.suffix == ".json":
        raise MissingFileError(f"No embodiment file at {file}.")
    close = closest(str(embodiment), EMBODIMENTS)
    raise UnknownKeyError(
        f"Unknown embodiment '{embodiment}'; known are {', '.join(EMBODIMENTS)}, or give a JSON file."
        + (f" Did you mean {close}?" if close else "")
    )

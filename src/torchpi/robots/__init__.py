"""Robots as data; `get_embodiment` finds one by name, by file or as the object itself."""

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
    """An embodiment by its registered name, or from a JSON file as `Embodiment.to_dict` gives it, or itself.

    Each object of a file may have a field `comment`, which is not read.

    Raises:
        KeyError: neither a registered name nor a file.
        FileNotFoundError: a path to a .json file that isn't there.
        ValueError: the file isn't JSON or not an embodiment; an argument of another type.
    """
    if isinstance(embodiment, Embodiment):
        return embodiment
    if isinstance(embodiment, str) and embodiment in EMBODIMENTS:
        return EMBODIMENTS[embodiment]()
    if not isinstance(embodiment, str | Path):
        raise EmbodimentError(f"An embodiment is a name, a path or an Embodiment; found a {type(embodiment).__name__}.")
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

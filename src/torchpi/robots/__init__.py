"""Robots as data; `get_embodiment` finds one by name, file or as the object itself."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torchpi.errors import EmbodimentError, MissingFileError, UnknownKeyError
from torchpi.robots.aloha import aloha
from torchpi.robots.droid import droid
from torchpi.robots.embodiment import HOOKS, ActionDim, Camera, Embodiment, Hook, StateKey
from torchpi.robots.libero import libero
from torchpi.robots.metaworld import metaworld

__all__ = [
    "EMBODIMENTS",
    "HOOKS",
    "ActionDim",
    "Camera",
    "Embodiment",
    "Hook",
    "StateKey",
    "aloha",
    "droid",
    "get_embodiment",
    "libero",
    "metaworld",
]

_RESET_POSE = {"reset_pose": [0, -1.5, 1.5, 0, 0, 0]}  # of each arm, in rad; clients move there before an episode

EMBODIMENTS: dict[str, Callable[[], Embodiment]] = {
    "aloha": aloha,
    "droid": droid,
    "libero": libero,
    "metaworld": metaworld,
    # The published policies; prompts, assets and delta actions are those of their training.
    **{
        name: partial(aloha, name=name, default_prompt=prompt, asset_id="trossen", metadata=_RESET_POSE)
        for name, prompt in (
            ("pi0_aloha_towel", "fold the towel"),
            ("pi0_aloha_tupperware", "open the tupperware and put the food on the plate"),
            ("pi0_aloha_pen_uncap", "uncap the pen"),
        )
    },
    # 10: openpi's client for the simulator
    "pi0_aloha_sim": partial(
        aloha, name="pi0_aloha_sim", delta_actions=False, default_prompt="Transfer cube", execute_steps=10
    ),
    "pi0_droid": partial(droid, name="pi0_droid", asset_id="droid"),
    "pi05_droid": partial(droid, name="pi05_droid", asset_id="droid"),
    "pi0_libero": partial(libero, name="pi0_libero", delta_actions=True, asset_id="physical-intelligence/libero"),
    "pi05_libero": partial(libero, name="pi05_libero", asset_id="physical-intelligence/libero"),
}


def get_embodiment(embodiment: Any) -> Embodiment:
    """An embodiment by its registered name, or from a JSON file as `Embodiment.to_dict` gives it, or itself.

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
        try:
            return Embodiment.from_dict(json.loads(file.read_bytes()))
        except ValueError as error:  # JSONDecodeError is one, too
            raise EmbodimentError(f"{file} is not an embodiment: {error}") from error
    if file.suffix == ".json":
        raise MissingFileError(f"No embodiment file at {file}.")
    raise UnknownKeyError(
        f"Unknown embodiment '{embodiment}'; known are {', '.join(EMBODIMENTS)}, or give a JSON file."
    )

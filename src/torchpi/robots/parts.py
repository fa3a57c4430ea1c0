"""The parts of an embodiment: cameras, pieces of the state, dimensions of an action, conversions of units."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from torchpi.errors import EmbodimentError, listed
from torchpi.transforms.depth import DEPTH_DTYPES, DepthMapping
from torchpi.transforms.images import DTYPES, LAYOUTS, to_uint8_hwc
from torchpi.transforms.normalize import require_finite

PRESENCES = ("required", "optional", "masked", "ignored")
KINDS = ("absolute", "delta")
COMMANDS = ("position", "velocity", "increment", "effort")
LIMITS = ("low", "high", "max_step")
"""The fields of an `ActionDim` that limit what the robot is sent."""
BEYOND_LIMITS = ("clip", "refuse", "send")


@dataclasses.dataclass(frozen=True)
class Camera:
    """One camera of the robot, of the model, or of both.

    Raises:
        ValueError: a field has none of its values, or the presence doesn't fit name and key.
    """

    name: str | None
    """The model's name for it; None if the model doesn't read it (presence "ignored")."""
    key: str | None
    """Its place in the observation, nested keys joined by '.' ("images.cam_high"); None if the robot doesn't have
    it."""
    presence: str = "required"
    """"required"; "optional": absent means masked; "masked": the model has this camera, the robot doesn't; "ignored":
    the robot may send it, the model doesn't read it."""
    layout: str = "hwc"
    """"hwc" [h, w, 3] or "chw" [3, h, w]."""
    dtype: str = "uint8"
    """"uint8"; "float32", in [0, 1]; "any": uint8 or floating-point in [0, 1]. Of a depth camera "uint16",
    "float32" or "any" of them, in the mapping's unit."""
    depth: DepthMapping | None = None
    """The colours of a depth camera's depths, for the model; None: it is no depth camera."""

    def __post_init__(self) -> None:
        label = f"Camera {self.name or self.key!r}"
        dtypes = DTYPES if self.depth is None else DEPTH_DTYPES
        for field, allowed in (("presence", PRESENCES), ("layout", LAYOUTS), ("dtype", dtypes)):
            _check_choice(label, field, getattr(self, field), allowed)
        if (self.key is None) != (self.presence == "masked"):
            raise EmbodimentError(
                f"{label}: presence {self.presence!r} with key {self.key!r}; exactly a masked camera has no key."
            )
        if self.name is None and self.presence != "ignored":
            raise EmbodimentError(
                f"{label}: presence {self.presence!r} without a name; only an ignored camera has none."
            )

    def read(self, image: Any) -> np.ndarray:
        """The image as uint8 [h, w, 3]."""
        read = to_uint8_hwc if self.depth is None else self.depth.read
        return read(image, layout=self.layout, dtype=self.dtype, camera=f"{self.name} ({self.key})")

    def as_sent(self, image: np.ndarray) -> np.ndarray:
        """An image uint8 [h, w, 3], or depth [h, w, 1] in metres, as the robot sends it."""
        if self.depth is not None:
            image = self.depth.as_sent(image, self.dtype)
        elif self.dtype == "float32":
            image = image.astype(np.float32) / 255
        return np.moveaxis(image, -1, 0) if self.layout == "chw" else image

    def example(self, rng: np.random.Generator) -> np.ndarray:
        if self.depth is not None:
            return self.depth.as_sent(rng.uniform(self.depth.near, self.depth.far, (480, 640)), self.dtype)
        return np.ascontiguousarray(self.as_sent(rng.integers(0, 256, (480, 640, 3), np.uint8)))


@dataclasses.dataclass(frozen=True)
class StateKey:
    """One part of the state; the parts are concatenated in the embodiment's order.

    Raises:
        ValueError: no names; not a unit for each; min_dim isn't between 1 and the number of names.
    """

    key: str
    """Its place in the observation, nested keys joined by '.'."""
    names: tuple[str, ...]
    """One per dimension. The value is [d]; for a single dimension also a plain number."""
    min_dim: int | None = None
    """Fewest dimensions that may be sent, the last ones missing; None: all."""
    units: tuple[str, ...] = ()
    """One per dimension, or empty: not stated."""

    def __post_init__(self) -> None:
        for field in ("names", "units"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if not self.names:
            raise EmbodimentError(f"State {self.key!r} has no names; expected one per dimension.")
        if self.units and len(self.units) != len(self.names):
            raise EmbodimentError(
                f"State {self.key!r} has {len(self.names)} names and {len(self.units)} units; expected as many."
            )
        if self.min_dim is not None and not 1 <= self.min_dim <= len(self.names):
            raise EmbodimentError(f"State {self.key!r}: min_dim {self.min_dim}; expected 1 to {len(self.names)}.")

    @property
    def dims(self) -> range:
        """The lengths that it may have."""
        return range(self.min_dim or len(self.names), len(self.names) + 1)

    def read(self, value: Any, robot: str) -> np.ndarray:
        """The finite numbers [d] of this part; `robot` is for messages."""
        array = numbers(value, f"state '{self.key}'")
        if array.ndim == 0 and len(self.names) == 1:
            array = array.reshape(1)
        if array.ndim != 1 or len(array) not in self.dims:
            lengths = listed(self.dims, "or")
            raise EmbodimentError(
                f"State '{self.key}' has shape {list(array.shape)}; embodiment '{robot}' expects {lengths} "
                f"numbers: {', '.join(self.names)}."
            )
        require_finite(array, f"state '{self.key}'", self.names)
        return array


@dataclasses.dataclass(frozen=True)
class ActionDim:
    """One dimension of an action.

    Raises:
        ValueError: an unknown kind or command; limits that are not finite, a low that is not below high, a max_step
            that is not positive.
    """

    name: str
    """Name, shown in messages."""
    unit: str = ""
    """Unit in which the robot takes it; empty: not stated."""
    kind: str = "absolute"
    """"delta": the model predicts the difference to the state of the same index at the beginning of the chunk;
    "absolute": it predicts what the robot takes, even if the robot reads that as an increment."""
    command: str | None = None
    """The meaning of the value to the robot: "position" (where to be), "velocity" (how fast to move), "increment" (how
    far to move in this step) or "effort" (how strongly to push, as a gripper's force). It decides which action keeps
    the robot still; None: not stated, and the control loop asks for it."""
    low: float | int | None = None
    """The least that the robot may be sent, in its units; None: not stated."""
    high: float | int | None = None
    """The most."""
    max_step: float | int | None = None
    """The largest change from one action to the next, at the embodiment's control rate; None: not stated."""

    def __post_init__(self) -> None:
        label = f"Action {self.name!r}"
        _check_choice(label, "kind", self.kind, KINDS)
        if self.command is not None:
            _check_choice(label, "command", self.command, COMMANDS)
        for field in LIMITS:
            value = getattr(self, field)
            if value is not None and not (isinstance(value, float | int | np.number) and math.isfinite(value)):
                raise EmbodimentError(f"{label}: {field} is {value}; expected a finite number, or none.")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise EmbodimentError(f"{label}: low is {self.low} and high {self.high}; low must be below high.")
        if self.max_step is not None and not self.max_step > 0:
            raise EmbodimentError(f"{label}: max_step is {self.max_step}; expected a positive number.")


@dataclasses.dataclass(frozen=True)
class Hook:
    """Code for a robot whose units are not the model's; register it in `HOOKS` under the name that embodiments use."""

    state_to_model: Callable[[np.ndarray], np.ndarray]
    """[s] to [s]."""
    actions_to_model: Callable[[np.ndarray], np.ndarray]
    """[H, a] to [H, a], the inverse of actions_to_robot."""
    actions_to_robot: Callable[[np.ndarray], np.ndarray]
    """[H, a] to [H, a]."""
    state_to_robot: Callable[[np.ndarray], np.ndarray] | None = None
    """[s] to [s], the inverse of state_to_model, for example observations; None: they have a state of zeros."""


HOOKS: dict[str, Hook] = {}


def numbers(value: Any, label: str) -> np.ndarray:
    """A floating-point array; floats keep their dtype, because the state's text depends on it."""
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged lists; tensors that NumPy does not read
        raise EmbodimentError(
            f"Cannot read {label}: {str(error).rstrip('.')}; expected an array of numbers."
        ) from error
    if array.dtype.kind in "biu":
        return array.astype(np.float64)
    if array.dtype.kind != "f":
        raise EmbodimentError(f"Cannot read {label}: it has dtype {array.dtype}; expected numbers.")
    if array.dtype.itemsize > 8:  # PyTorch has no dtype for them
        raise EmbodimentError(f"Cannot read {label}: it is {array.dtype}; expected floats of at most 64 bits.")
    if np.isfinite(array).all() and (magnitude := np.abs(array).max(initial=0)) > np.finfo(np.float32).max:
        raise EmbodimentError(f"Cannot read {label}: it reaches a magnitude of {magnitude:.3g}, beyond float32.")
    return array


def _check_choice(label: str, field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise EmbodimentError(f"{label}: {field} is {value!r}; expected one of {', '.join(allowed)}.")

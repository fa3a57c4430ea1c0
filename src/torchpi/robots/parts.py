"""Parts of an embodiment: cameras, parts of the state, action dimensions, and unit conversions (hooks)."""

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
"""Fields of `ActionDim` that limit the actions sent to the robot."""
BEYOND_LIMITS = ("clip", "refuse", "send")


@dataclasses.dataclass(frozen=True)
class Camera:
    """A camera of the robot, of the model, or of both.

    Raises:
        ValueError: a field has an unknown value, or the presence contradicts name and key.
    """

    name: str | None
    """The model's name of the camera; None if the model doesn't read it (presence "ignored")."""
    key: str | None
    """Key in the observation, nested keys joined by '.' ("images.cam_high"); None if the robot lacks the camera."""
    presence: str = "required"
    """"required"; "optional": masked if absent; "masked": a camera of the model that the robot lacks; "ignored": the
    robot may send it, but the model doesn't read it."""
    layout: str = "hwc"
    """"hwc" [h, w, 3] or "chw" [3, h, w]."""
    dtype: str = "uint8"
    """"uint8", "float32" in [0, 1], or "any" (uint8 or floating-point in [0, 1]). For a depth camera "uint16",
    "float32" or "any", in the unit of the depth mapping."""
    depth: DepthMapping | None = None
    """Mapping of depths to colours; None if this is not a depth camera."""

    def __post_init__(self) -> None:
        label = f"Camera {self.name or self.key!r}"
        dtypes = DTYPES if self.depth is None else DEPTH_DTYPES
        for field, allowed in (("presence", PRESENCES), ("layout", LAYOUTS), ("dtype", dtypes)):
            _check_choice(label, field, getattr(self, field), allowed)
        if (self.key is None) != (self.presence == "masked"):
            raise EmbodimentError(
                f"{label}: presence {self.presence!r} with key {self.key!r}; a masked camera has no key, all others "
                "need one."
            )
        if self.name is None and self.presence != "ignored":
            raise EmbodimentError(
                f"{label}: presence {self.presence!r} without a name; only an ignored camera has none."
            )

    def read(self, image: Any) -> np.ndarray:
        """Convert an image of the robot to uint8 [h, w, 3]."""
        read = to_uint8_hwc if self.depth is None else self.depth.read
        return read(image, layout=self.layout, dtype=self.dtype, camera=f"{self.name} ({self.key})")

    def as_sent(self, image: np.ndarray) -> np.ndarray:
        """Convert an image uint8 [h, w, 3], or depth [h, w, 1] in metres, to the robot's format."""
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
    """Part of the state; the parts are concatenated in the embodiment's order.

    Raises:
        ValueError: no names; a number of units other than of names; min_dim out of range.
    """

    key: str
    """Key in the observation, nested keys joined by '.'."""
    names: tuple[str, ...]
    """Name of each dimension. The value is [d], or a plain number for a single dimension."""
    min_dim: int | None = None
    """Smallest accepted number of dimensions; the last ones may be missing. None: all are required."""
    units: tuple[str, ...] = ()
    """Unit of each dimension; empty if not stated."""

    def __post_init__(self) -> None:
        for field in ("names", "units"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if not self.names:
            raise EmbodimentError(f"State {self.key!r} has no names; expected one per dimension.")
        if self.units and len(self.units) != len(self.names):
            raise EmbodimentError(
                f"State {self.key!r} has {len(self.names)} names and {len(self.units)} units; expected one per name."
            )
        if self.min_dim is not None and not 1 <= self.min_dim <= len(self.names):
            raise EmbodimentError(f"State {self.key!r}: min_dim {self.min_dim}; expected 1 to {len(self.names)}.")

    @property
    def dims(self) -> range:
        """Allowed lengths."""
        return range(self.min_dim or len(self.names), len(self.names) + 1)

    def read(self, value: Any, robot: str) -> np.ndarray:
        """Check and convert the value of this part to an array [d]; `robot` is the embodiment's name, for messages."""
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
    """Dimension of an action.

    Raises:
        ValueError: unknown kind or command; limits that are not finite; low not less than high; max_step not positive.
    """

    name: str
    """Name, shown in messages."""
    unit: str = ""
    """The robot's unit; empty if not stated."""
    kind: str = "absolute"
    """"delta": the model predicts the difference to the state of the same index at the beginning of the chunk.
    "absolute": the model predicts the robot's value, even if the robot interprets it as an increment."""
    command: str | None = None
    """Interpretation of the value by the robot: "position" (where to be), "velocity" (how fast to move), "increment"
    (how far to move in this step) or "effort" (for example a gripper's force). It determines the action that keeps the
    robot still; None: not stated, but the control loop requires it."""
    low: float | int | None = None
    """Lower limit of the sent value, in the robot's units; None: not stated."""
    high: float | int | None = None
    """Upper limit of the sent value."""
    max_step: float | int | None = None
    """Largest change between consecutive actions, at the embodiment's control rate; None: not stated."""

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
            raise EmbodimentError(f"{label}: low is {self.low} and high {self.high}; low must be less than high.")
        if self.max_step is not None and not self.max_step > 0:
            raise EmbodimentError(f"{label}: max_step is {self.max_step}; expected a positive number.")


@dataclasses.dataclass(frozen=True)
class Hook:
    """Unit conversions for a robot whose units are not the model's; register them in `HOOKS` by name."""

    state_to_model: Callable[[np.ndarray], np.ndarray]
    """[s] → [s]."""
    actions_to_model: Callable[[np.ndarray], np.ndarray]
    """[H, a] → [H, a], the inverse of actions_to_robot."""
    actions_to_robot: Callable[[np.ndarray], np.ndarray]
    """[H, a] → [H, a]."""
    state_to_robot: Callable[[np.ndarray], np.ndarray] | None = None
    """[s] → [s], the inverse of state_to_model, used by `example_observation`; None: its state is then zero."""


HOOKS: dict[str, Hook] = {}


def numbers(value: Any, label: str) -> np.ndarray:
    """Convert to a floating-point array; floats keep their dtype, because the state's text in the prompt depends on
    it."""
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
    if array.dtype.itemsize > 8:  # PyTorch has no such dtype
        raise EmbodimentError(f"Cannot read {label}: it is {array.dtype}; expected floats of at most 64 bits.")
    if np.isfinite(array).all() and (magnitude := np.abs(array).max(initial=0)) > np.finfo(np.float32).max:
        raise EmbodimentError(f"Cannot read {label}: it reaches a magnitude of {magnitude:.3g}, beyond float32.")
    return array


def _check_choice(label: str, field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise EmbodimentError(f"{label}: {field} is {value!r}; expected one of {', '.join(allowed)}.")

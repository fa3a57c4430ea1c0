"""The last check of actions: finite, and within the robot's limits, or they are not sent."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from torchpi.errors import ActionError
from torchpi.robots.embodiment import Embodiment
from torchpi.robots.parts import ActionDim


def within_limits(actions: np.ndarray, robot: Embodiment) -> tuple[Float[np.ndarray, "H a"], int]:
    """The actions as float32 that may be sent, and the number of values that were clipped, see `beyond_limits`.

    A `max_step` is left to the control loop, which knows what the robot was sent before.

    Args:
        actions: [H, a], in the robot's units.
    """
    with np.errstate(over="ignore"):
        sent = actions.astype(np.float32)
    _require_none(~np.isfinite(sent), "is not finite", sent, robot)
    if robot.beyond_limits == "send":
        return sent, 0
    low, high = (_limits(robot.actions, field) for field in ("low", "high"))
    with np.errstate(over="ignore"):  # a limit itself, rounded to float32, is not beyond it
        beyond = (sent < np.nextafter(low, np.float32(-np.inf))) | (sent > np.nextafter(high, np.float32(np.inf)))
    if robot.beyond_limits == "refuse":
        _require_none(beyond, "is beyond the robot's limits", sent, robot)
    return np.clip(sent, low, high), int(beyond.sum())


def _limits(dimensions: Sequence[ActionDim], field: str) -> Float[np.ndarray, " a"]:
    """The limits "low" or "high" as the nearest float32 numbers within them; infinite where there is none."""
    none = -np.inf if field == "low" else np.inf
    stated = np.array([none if (limit := getattr(dim, field)) is None else limit for dim in dimensions], np.float64)
    with np.errstate(over="ignore"):
        limits = stated.astype(np.float32)
    outside = limits < stated if field == "low" else limits > stated
    return np.where(outside, np.nextafter(limits, np.float32(-none)), limits)


def _require_none(bad: np.ndarray, problem: str, actions: np.ndarray, robot: Embodiment) -> None:
    if bad.any():
        step, i = (int(each[0]) for each in np.nonzero(bad))
        dim = robot.actions[i]
        limits = f"; its limits are {dim.low} to {dim.high}" if (dim.low, dim.high) != (None, None) else ""
        raise ActionError(
            f"No robot is sent this chunk: {dim.name} {problem} in {int(bad[:, i].sum())} of {len(bad)} steps, at step "
            f"{step} it is {actions[step, i]:.6g}{limits}. Check the policy's statistics (torchpi doctor), and whether "
            "the observation is of this robot."
        )

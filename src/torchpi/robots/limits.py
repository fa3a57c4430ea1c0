"""Final check of actions before they are sent: finite, and within the robot's limits."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from torchpi.errors import ActionError
from torchpi.robots.embodiment import Embodiment
from torchpi.robots.parts import ActionDim


def within_limits(actions: np.ndarray, robot: Embodiment) -> tuple[Float[np.ndarray, "H a"], int]:
    """Enforce the limits as `Embodiment.beyond_limits` says; returns float32 actions and the number of clipped values.

    `max_step` is enforced by the control loop, which knows the previous action.

    Args:
        actions: [H, a], in the robot's units.
    """
    with np.errstate(over="ignore"):
        sent = actions.astype(np.float32)
    _refuse(~np.isfinite(sent), "is not finite", sent, robot)
    if robot.beyond_limits == "send":
        return sent, 0
    low, high = (_limits(robot.actions, field) for field in ("low", "high"))
    with np.errstate(over="ignore"):  # tolerate one float32 step, because a limit may have been rounded
        beyond = (sent < np.nextafter(low, np.float32(-np.inf))) | (sent > np.nextafter(high, np.float32(np.inf)))
    if robot.beyond_limits == "refuse":
        _refuse(beyond, "is beyond the robot's limits", sent, robot)
    return np.clip(sent, low, high), int(beyond.sum())


def _limits(dimensions: Sequence[ActionDim], field: str) -> Float[np.ndarray, " a"]:
    """Round the limits "low" or "high" inwards to float32; a missing limit is infinite."""
    unlimited = -np.inf if field == "low" else np.inf
    exact = np.array([getattr(dim, field) for dim in dimensions], np.float64)  # None becomes NaN
    exact = np.where(np.isnan(exact), unlimited, exact)
    with np.errstate(over="ignore"):
        limits = exact.astype(np.float32)
    outside = limits < exact if field == "low" else limits > exact
    return np.where(outside, np.nextafter(limits, np.float32(-unlimited)), limits)


def _refuse(bad: np.ndarray, problem: str, actions: np.ndarray, robot: Embodiment) -> None:
    if bad.any():
        step, i = (int(indices[0]) for indices in np.nonzero(bad))
        dim = robot.actions[i]
        limits = f"; its limits are {dim.low} to {dim.high}" if (dim.low, dim.high) != (None, None) else ""
        raise ActionError(
            f"This chunk is not sent to the robot: {dim.name} {problem} in {int(bad[:, i].sum())} of {len(bad)} steps, "
            f"at step {step} it is {actions[step, i]:.6g}{limits}. Check the policy's statistics (torchpi doctor), and "
            "whether the observation is from this robot."
        )

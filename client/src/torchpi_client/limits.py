"""Limits that every command keeps, whatever the policy says."""

from __future__ import annotations

import dataclasses
from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np


class Limited(NamedTuple):
    """A command within the limits, and where it was not."""

    action: np.ndarray
    """float32 [a]."""
    range_clipped: np.ndarray
    """bool [a]: it was below or above the range."""
    step_clipped: np.ndarray
    """bool [a]: it was too far from the command before."""


@dataclasses.dataclass(frozen=True)
class ActionLimits:
    """Range and largest step per dimension, in the robot's units.

    Raises:
        ValueError: they are not of one length, low exceeds high, a step is not positive, or there is NaN.
    """

    low: np.ndarray
    """[a]; -inf: none."""
    high: np.ndarray
    """[a]; inf: none."""
    max_step: np.ndarray
    """[a], the largest change from one command to the next; inf: any."""

    def __post_init__(self) -> None:
        for name in ("low", "high", "max_step"):
            object.__setattr__(self, name, np.array(getattr(self, name), np.float64, ndmin=1))
        shapes = {name: getattr(self, name).shape for name in ("low", "high", "max_step")}
        if len(set(shapes.values())) != 1 or self.low.ndim != 1:
            raise ValueError(f"action limits have the shapes {shapes}; expected [a] each")
        for wrong, what in (
            (~(self.low <= self.high), "low is above high, or NaN"),
            (~(self.max_step > 0), "the largest step is not positive, or NaN"),
        ):
            if wrong.any():
                raise ValueError(f"action limits of the dimensions {np.flatnonzero(wrong).tolist()}: {what}")

    @classmethod
    def of(
        cls,
        low: Sequence[float | None],
        high: Sequence[float | None],
        *,
        max_step: Sequence[float | None] | None = None,
        margin: float = 0.0,
    ) -> ActionLimits:
        """Limits from lists, in which None is no limit.

        Args:
            margin: by how much of its width each range is widened on both sides, for one that was only observed.
        """
        bottom = np.array([-np.inf if value is None else value for value in low])
        top = np.array([np.inf if value is None else value for value in high])
        if bottom.shape == top.shape:
            width = np.where(np.isfinite(top - bottom), top - bottom, 0.0)
            bottom, top = bottom - margin * width, top + margin * width
        steps = [None] * len(low) if max_step is None else max_step
        return cls(bottom, top, np.array([np.inf if value is None else value for value in steps]))

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, Any], *, margin: float = 0.1, max_step: Sequence[float | None] | None = None
    ) -> ActionLimits:
        """What a server says about its robot: "action_limits", {"low": […], "high": […], "max_step": […]}, are the
        embodiment's own and hold as they are; "action_range", {"low": […], "high": […]}, is what the policy was trained
        with, and gets a margin.

        Args:
            margin: of the training range, as a fraction of its width.
            max_step: the largest steps, if the server doesn't say them.

        Raises:
            ValueError: it says neither.
        """
        if (own := metadata.get("action_limits")) is not None:
            steps = own.get("max_step") if max_step is None else max_step
            return cls.of(own["low"], own["high"], max_step=steps)
        if (trained := metadata.get("action_range")) is not None:
            return cls.of(trained["low"], trained["high"], max_step=max_step, margin=margin)
        raise ValueError(
            f"the server says neither action_limits nor action_range, only {', '.join(metadata) or 'nothing'}; "
            "state the robot's limits with ActionLimits.of(low, high, max_step=…)"
        )

    def apply(self, action: np.ndarray, last: np.ndarray | None) -> Limited:
        """The nearest command within the range, then as far towards it as one step from the last command goes.

        Args:
            action: [a], finite.
            last: [a], the command before; None: there was none, and any step is allowed.
        """
        ranged = np.clip(action, self.low, self.high)
        stepped = ranged if last is None else np.clip(ranged, last - self.max_step, last + self.max_step)
        return Limited(stepped.astype(np.float32), ranged != action, stepped != ranged)

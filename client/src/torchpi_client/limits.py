"""Limits on the commands sent to the robot."""

from __future__ import annotations

import dataclasses
from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np


class Limited(NamedTuple):
    """A command within the limits, and the dimensions that were clipped."""

    action: np.ndarray
    """float32 [a]."""
    step_clipped: np.ndarray
    """bool [a]: the change from the previous command was too large."""
    range_clipped: np.ndarray
    """bool [a]: the action was outside the range."""


@dataclasses.dataclass(frozen=True)
class ActionLimits:
    """Range and largest step per dimension, in the robot's units, for actions at the policy's rate.

    Infinity means no limit.

    Raises:
        ValueError: the lengths differ, low exceeds high, a step is not positive, or there is NaN.
    """

    low: np.ndarray
    """[a]"""
    high: np.ndarray
    """[a]"""
    max_step: np.ndarray
    """[a], the largest change from one command to the next."""

    def __post_init__(self) -> None:
        for name in ("low", "high", "max_step"):
            object.__setattr__(self, name, np.array(getattr(self, name), np.float64, ndmin=1))
        shapes = {name: getattr(self, name).shape for name in ("low", "high", "max_step")}
        if len(set(shapes.values())) != 1 or self.low.ndim != 1:
            raise ValueError(f"Action limits have the shapes {shapes}; expected [a] each.")
        for invalid, reason in (
            (~(self.low <= self.high), "low is above high, or NaN"),
            (~(self.max_step > 0), "the largest step is not positive, or NaN"),
        ):
            if invalid.any():
                raise ValueError(f"Action limits of the dimensions {np.flatnonzero(invalid).tolist()}: {reason}.")

    @classmethod
    def of(
        cls,
        low: Sequence[float | None],
        high: Sequence[float | None],
        *,
        max_step: Sequence[float | None] | None = None,
        margin: float = 0.0,
    ) -> ActionLimits:
        """Make limits from lists, where None means no limit.

        Args:
            margin: fraction of its width by which each range is widened on both sides, for observed ranges.
        """
        lowest, highest = _numbers("low", low, -np.inf), _numbers("high", high, np.inf)
        if lowest.shape == highest.shape:
            width = np.where(np.isfinite(highest - lowest), highest - lowest, 0.0)
            lowest, highest = lowest - margin * width, highest + margin * width
        steps = np.full(len(lowest), np.inf) if max_step is None else _numbers("max_step", max_step, np.inf)
        return cls(lowest, highest, steps)

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, Any], *, margin: float = 0.1, max_step: Sequence[float | None] | None = None
    ) -> ActionLimits:
        """Make limits from a server's metadata.

        "action_limits", {"low": […], "high": […], "max_step": […]}, are the embodiment's and apply unchanged.
        "action_range", {"low": […], "high": […]}, is the range of the training actions. It applies, with a margin, to
        each dimension for which the embodiment has no range.

        Args:
            margin: widening of the training range, as a fraction of its width.
            max_step: largest steps, instead of the embodiment's.

        Raises:
            ValueError: the metadata contain neither, or one that is malformed.
        """
        embodiment, training = (_server_range(metadata, name) for name in ("action_limits", "action_range"))
        steps = embodiment.get("max_step") if max_step is None and embodiment is not None else max_step
        sources = [
            cls.of(source["low"], source["high"], max_step=steps, margin=extra)
            for source, extra in ((embodiment, 0.0), (training, margin))
            if source is not None
        ]
        if not sources:
            raise ValueError(
                f"The server states neither action_limits nor action_range, only {', '.join(metadata) or 'nothing'}; "
                "state the robot's limits with ActionLimits.of(low, high, max_step=…)."
            )
        first, last = sources[0], sources[-1]
        if first.low.shape != last.low.shape:
            raise ValueError(
                f"The server's action_limits are for {len(first.low)} dimensions, its action_range for {len(last.low)}."
            )
        no_range = np.isinf(first.low) & np.isinf(first.high)
        return cls(np.where(no_range, last.low, first.low), np.where(no_range, last.high, first.high), first.max_step)

    def at_rate(self, commands: Sequence[str], *, policy_hz: float, control_hz: float) -> ActionLimits:
        """Convert the limits to another rate, keeping speed and acceleration.

        Args:
            commands: per dimension, see `robot.COMMANDS`. The range of an increment is a distance per step.
            policy_hz: rate of the policy's actions, to which these limits apply.
            control_hz: rate of the commands.
        """
        ratio = policy_hz / control_hz
        per_step = np.where([command == "increment" for command in commands], ratio, 1.0)
        return ActionLimits(self.low * per_step, self.high * per_step, self.max_step * per_step * ratio)

    def apply(self, action: np.ndarray, last: np.ndarray | None) -> Limited:
        """Clip an action to the range, then to the largest step from the previous command.

        Args:
            action: [a], finite.
            last: [a], the previous command; None: any step is allowed.
        """
        ranged = np.clip(action, self.low, self.high)
        return Limited(*self._one_step(ranged, last), ranged != action)

    def hold(self, command: np.ndarray, last: np.ndarray) -> Limited:
        """Clip a hold command to the largest step from the previous command, but not to the range: a range of
        velocities need not contain 0.

        Args:
            command: [a], see `robot.hold_command`.
            last: [a], the previous command.
        """
        return Limited(*self._one_step(command, last), np.zeros(len(command), bool))

    def _one_step(self, command: np.ndarray, last: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The command after one step, float32 [a], and the dimensions that were clipped."""
        stepped = command if last is None else np.clip(command, last - self.max_step, last + self.max_step)
        return stepped.astype(np.float32), stepped != command


def _numbers(name: str, values: Any, no_limit: float) -> np.ndarray:
    """The values, float64 [a], with `no_limit` in place of None."""
    try:
        return np.array([no_limit if value is None else value for value in values], np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} is {values!r:.80}; expected a list with one number per action dimension, or None for no limit."
        ) from None


def _server_range(metadata: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    value = metadata.get(name)
    if value is None or (isinstance(value, Mapping) and {"low", "high"} <= set(value)):
        return value
    raise ValueError(f"The server's {name} is {value!r:.80}; expected a dict with the lists low and high.")

"""The settings of the control loop."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Sequence

import numpy as np

from torchpi_client.limits import ActionLimits

MODES = ("sync", "async", "rtc", "ensemble")
LATE = ("hold", "slow", "stop")
INVALID = ("hold", "stop")
RESAMPLE = ("interpolate", "as_is")


@dataclasses.dataclass(frozen=True)
class ControlSettings:
    """The settings of the control loop.

    Raises:
        ValueError: a field has none of its values.
    """

    mode: str = "sync"
    """"sync": execute a part of a chunk, hold while the next is inferred. "async": infer while the rest is executed,
    then go on with the new chunk. "rtc": the same, and the new chunk continues the old one (real-time chunking; the
    server has to support it). "ensemble": infer all the time, average what the chunks say for the same step."""
    execute_steps: int | None = None
    """Of the policy's actions, how many are executed before the next chunk is asked for. None: what the server
    recommends, else half a chunk; 1 in "ensemble"."""
    control_hz: float | None = None
    """Steps per second; None: the policy's rate."""
    resample: str | None = None
    """At another rate than the policy's: "interpolate": the same motion at the same speed; "as_is": the same actions,
    faster or slower. None: another rate is refused."""
    late: str = "hold"
    """The reaction if the actions run out before the next chunk is there: "hold" the robot still; "slow": as hold, but
    from the moment at which the chunk should have come, what is left takes twice the time; "stop" the run."""
    on_invalid: str = "stop"
    """At an action with NaN or infinity: "hold" the robot for its step, or "stop" the run."""
    max_age: float | None = None
    """Seconds from an observation to its chunk, above which the chunk is refused as stale. None: as long as the chunk
    lasts; in "sync" any, as the robot stands still."""
    action_commands: Sequence[str] | None = None
    """Of the dimensions, see `robot.COMMANDS`; None: what the server says."""
    limits: ActionLimits | None = None
    """That every command keeps; None: none. See `ActionLimits.from_metadata`."""
    start: np.ndarray | None = None
    """[a], the command at which the robot stands at the beginning, for the limit of the first step; None: the first
    command may be anywhere in the range."""
    ensemble_decay: float = 0.01
    """See `schedule.Ensemble`."""
    latency_window: int = 10
    """Inferences of which the latency is estimated."""
    latency_quantile: float = 1.0
    """Of these; 1: the largest."""
    dry_run: bool = False
    """Send nothing to the robot; everything else is as ever."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("mode", MODES),
            ("late", LATE),
            ("on_invalid", INVALID),
            ("resample", (None, *RESAMPLE)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(map(str, allowed))}.")
        for name in ("execute_steps", "control_hz", "max_age"):
            check_positive(name, getattr(self, name), whole=name == "execute_steps")
        if not math.isfinite(self.ensemble_decay):
            raise ValueError(f"ensemble_decay is {self.ensemble_decay}; expected a finite number.")
        if self.start is not None and not np.isfinite(self.start).all():
            raise ValueError(f"There is NaN or infinity in start, {self.start}; it must be finite.")

    def rates(self, policy_hz: float | None) -> tuple[float, float]:
        """The policy's rate and the loop's.

        Args:
            policy_hz: what the server says; None: nothing.

        Raises:
            ValueError: nobody says the rate, or they differ and `resample` is not set.
        """
        check_positive("The server's control_hz", policy_hz)
        control_hz = self.control_hz if self.control_hz is not None else policy_hz
        if control_hz is None:
            raise ValueError("Neither the server nor the settings say how many steps a second has: pass control_hz=.")
        policy_hz = control_hz if policy_hz is None else policy_hz
        if policy_hz != control_hz and self.resample is None:
            raise ValueError(
                f"control_hz is {control_hz:g}, but the policy's actions are for {policy_hz:g} Hz: leave control_hz "
                'out, or say how to resample: "interpolate" (the same motion at the same speed) or "as_is" (the same '
                "actions, faster or slower)."
            )
        return policy_hz, control_hz


def check_positive(name: str, value: Any, *, whole: bool = False) -> None:
    """Raises a ValueError unless it is a positive number, or None."""
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    if value is None or (isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < math.inf):
        return
    raise ValueError(f"{name} is {value!r:.80}; expected a positive {'whole ' if whole else ''}number.")

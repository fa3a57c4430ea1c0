"""The settings of the control loop."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Sequence

import numpy as np

from torchpi_client.limits import ActionLimits
from torchpi_client.robot import COMMANDS

MODES = ("sync", "async", "rtc", "ensemble")
LATE = ("hold", "slow", "stop")
INVALID = ("hold", "stop")
RESAMPLE = ("interpolate", "as_is")


@dataclasses.dataclass(frozen=True)
class ControlSettings:
    """Settings of the control loop.

    Raises:
        ValueError: a field has an invalid value.
    """

    mode: str = "sync"
    """"sync": execute part of a chunk, then hold while the next is inferred. "async": infer while the rest is executed,
    then switch to the new chunk. "rtc": as "async", with the new chunk conditioned on the previous one (real-time
    chunking, if the server supports it). "ensemble": infer continuously and average the chunks' predictions for the
    same step."""
    execute_steps: int | None = None
    """Number of the policy's actions executed before the next chunk is requested. None: the server's recommendation, or
    else half a chunk; 1 in "ensemble"."""
    control_hz: float | None = None
    """Steps per second; None: the policy's rate."""
    resample: str | None = None
    """Resampling to another rate than the policy's. "interpolate": the same motion at the same speed. "as_is": the same
    actions, faster or slower. None: refuse another rate."""
    late: str = "hold"
    """Reaction if the actions run out before the next chunk arrives. "hold": hold the robot still. "slow": as "hold",
    and execute the remaining actions at half speed once the chunk is overdue. "stop": end the run."""
    on_invalid: str = "stop"
    """Reaction to an action with NaN or infinity: "hold" the robot for this step, or "stop" the run."""
    max_age: float | None = None
    """Largest age of a chunk, in seconds from its observation; older chunks are refused as stale. None: the chunk's
    duration; no limit in "sync", where the robot is held."""
    max_uncertainty: float | None = None
    """Largest uncertainty of a chunk that is executed: the spread of its samples as a fraction of the training range,
    which a server with --num-samples sends. Above it, the robot is held until a less uncertain chunk arrives. None: no
    limit."""
    action_commands: Sequence[str] | None = None
    """Command of each dimension, see `robot.COMMANDS`; None: from the server's metadata."""
    limits: ActionLimits | None = None
    """Limits on all commands, see `ActionLimits.from_metadata`; None: no limits."""
    start: np.ndarray | None = None
    """[a], the command that corresponds to the robot's initial position, for the step limit of the first command. None:
    the first command may be anywhere in the range."""
    ensemble_decay: float = 0.01
    """Decay m of the weights in mode "ensemble", see `schedule.Ensemble`."""
    latency_window: int = 10
    """Number of last inferences in the latency estimate."""
    latency_quantile: float = 1.0
    """Quantile of their latencies; 1 is the largest."""
    dry_run: bool = False
    """Do everything but send commands to the robot."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("mode", MODES),
            ("late", LATE),
            ("on_invalid", INVALID),
            ("resample", (None, *RESAMPLE)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(map(str, allowed))}.")
        for name in ("execute_steps", "control_hz", "max_age", "max_uncertainty"):
            check_positive(name, getattr(self, name), whole=name == "execute_steps")
        if self.action_commands is not None:
            check_command_list(self.action_commands)
        if self.limits is not None and not isinstance(self.limits, ActionLimits):
            raise ValueError(f"limits is {self.limits!r:.80}; expected ActionLimits.of(low, high, max_step=…).")
        if not isinstance(self.ensemble_decay, (int, float, np.number)) or not math.isfinite(self.ensemble_decay):
            raise ValueError(f"ensemble_decay is {self.ensemble_decay!r:.80}; expected a finite number.")
        if self.start is not None:
            start = np.asarray(self.start)
            if start.ndim != 1 or start.dtype.kind not in "iuf":
                raise ValueError(f"start is {self.start!r:.80}; expected a list with one number per action dimension.")
            if not np.isfinite(start).all():
                raise ValueError(f"start is {self.start}, with NaN or infinity; it must be finite.")

    def rates(self, policy_hz: float | None) -> tuple[float, float]:
        """The rates of the policy and of the loop.

        Args:
            policy_hz: the rate in the server's metadata, or None.

        Raises:
            ValueError: no rate is known, or the rates differ and `resample` is not set.
        """
        check_positive("The server's control_hz", policy_hz)
        control_hz = self.control_hz if self.control_hz is not None else policy_hz
        if control_hz is None:
            raise ValueError("Neither the server nor the settings have a control rate in Hz: pass control_hz=.")
        policy_hz = control_hz if policy_hz is None else policy_hz
        if policy_hz != control_hz and self.resample is None:
            raise ValueError(
                f"control_hz is {control_hz:g}, but the policy's actions are for {policy_hz:g} Hz: leave control_hz "
                'out, or choose how to resample: "interpolate" (the same motion at the same speed) or "as_is" (the '
                "same actions, faster or slower)."
            )
        return policy_hz, control_hz


def check_command_list(commands: Any) -> None:
    """Raise a ValueError unless the value is a list of one or more of `COMMANDS`."""
    if not isinstance(commands, (list, tuple)) or not commands:
        raise ValueError(
            f"action_commands is {commands!r:.80}; expected a list, one command per action dimension: what "
            'act() expects, for example ["increment", …, "effort"].'
        )
    unknown = [f"{command!r:.80} (dimension {i})" for i, command in enumerate(commands) if command not in COMMANDS]
    if unknown:
        raise ValueError(f"action_commands has {', '.join(unknown)}; each must be one of {', '.join(COMMANDS)}.")


def check_positive(name: str, value: Any, *, whole: bool = False) -> None:
    """Raise a ValueError unless the value is a positive number or None."""
    types = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    if value is None or (isinstance(value, types) and not isinstance(value, bool) and 0 < value < math.inf):
        return
    raise ValueError(f"{name} is {value!r:.80}; expected a positive {'whole ' if whole else ''}number.")

"""Control loop: turns a policy's action chunks into one robot command per step, at a fixed rate."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import signal
import threading
from typing import Any, Callable, Iterator, Mapping

import numpy as np

from torchpi_client.clock import Clock, MonotonicClock, Pacer, Tick
from torchpi_client.inference import Answer, BackgroundInference, Inference
from torchpi_client.latency import LatencyEstimate
from torchpi_client.limits import Limited
from torchpi_client.protocol import BUSY, RTC, PreviousChunk, require_support
from torchpi_client.report import ControlReport, counted
from torchpi_client.rerun_log import RobotLog
from torchpi_client.resample import resample, stretch
from torchpi_client.robot import InferringPolicy, Robot, check_commands, hold_command, wrong_count
from torchpi_client.schedule import ActionQueue, Ensemble, Request
from torchpi_client.settings import ControlSettings, check_positive
from torchpi_client.uncertainty import UncertaintyLimit

_log = logging.getLogger(__name__)

SLOW = 2
"""Steps per action while a chunk is late, with `late="slow"`."""

WARM_UP_SECONDS = 600.0
"""Time limit for repeating the first inference, whose deadline a compilation may exceed."""

_STOP_CHECK_SECONDS = 0.1
"""Time between checks for `stop` while the loop waits for the first chunk."""

HELD_SECONDS = 1.0
"""Time that the robot is held for a late chunk before a warning is logged."""

MAX_STALE = 3
"""Consecutive stale chunks that end the run: waiting will not help."""


class ControlLoop:
    """One robot controlled by one policy.

        loop = ControlLoop(robot, WebsocketPolicy("ws://192.168.1.20:8000"), ControlSettings(mode="rtc"))
        print(loop.run(seconds=30).summary())

    Args:
        robot: observed and moved from the thread that calls `run`.
        policy: called in another thread; its `reconnects`, if it has this attribute, are reported.
        settings: mode, rate, limits and reactions; by default `ControlSettings()`.
        clock, inference: replacements for tests.
        on_chunk: called with each chunk [H, a] as the policy returned it.
        log: receives observations, chunks and commands, see `RerunLog`.

    Raises:
        ValueError: the settings contradict the policy's metadata.
    """

    def __init__(
        self,
        robot: Robot,
        policy: InferringPolicy,
        settings: ControlSettings | None = None,
        *,
        clock: Clock | None = None,
        inference: Inference | None = None,
        on_chunk: Callable[[np.ndarray], None] | None = None,
        log: RobotLog | None = None,
    ) -> None:
        _require_members("robot", robot, "observe", "act")
        _require_members("policy", policy, "metadata", "infer")
        if settings is not None and not isinstance(settings, ControlSettings):
            raise ValueError(f"settings is of type {type(settings).__name__}; expected ControlSettings.")
        self._robot = robot
        self._run_log = log
        self._policy = policy
        self._name = f"The policy at {policy.url}" if hasattr(policy, "url") else "The policy"
        self._settings = settings = settings or ControlSettings()
        self._clock = clock or MonotonicClock()
        self._inference = inference or BackgroundInference(policy, self._clock)
        self._on_chunk = on_chunk
        metadata = policy.metadata
        self._policy_hz, self.control_hz = settings.rates(metadata.get("control_hz"))
        self._commands = check_commands(settings.action_commands, metadata)
        if settings.mode == "rtc":
            instead = 'Use mode "async", which switches to each new chunk without conditioning.'
            require_support(dict(metadata), RTC, instead, server=self._name)
        self._check_length("limits", None if settings.limits is None else settings.limits.low)
        self._check_length("start", settings.start)
        zeros = np.zeros(len(self._commands), np.int64)
        self.report = ControlReport(
            names=list(metadata.get("action_names") or ()),
            invalid=zeros.copy(),
            range_clipped=zeros.copy(),
            step_clipped=zeros.copy(),
            limited=settings.limits is not None,
            dry_run=settings.dry_run,
        )
        self._latency = LatencyEstimate(window=settings.latency_window, quantile=settings.latency_quantile)
        self._limits = settings.limits
        if self._limits is not None and self._resamples:
            self._limits = self._limits.at_rate(self._commands, policy_hz=self._policy_hz, control_hz=self.control_hz)
        self._last = None if settings.start is None else np.asarray(settings.start, np.float32)
        self._queued: list[np.ndarray] = []  # the remaining steps of a slowed action
        self._request: _Pending | None = None
        self._consecutive_stale = 0
        self._consecutive_unanswered = 0
        self._consecutive_held = 0
        self._uncertainty = UncertaintyLimit(settings.max_uncertainty, self._name, self.report)
        self._stale_after = math.inf  # maximum age in seconds of the chunk being executed
        self._behind = 0.0  # seconds by which skipped steps have delayed it
        self._reconnects_before = self._reconnects
        self._stopping = False

    def run(self, *, seconds: float | None = None, steps: int | None = None) -> ControlReport:
        """Control the robot until the time is over, `stop` is called, or an error ends the run; then hold it still.

        Before the run, the loop waits for a first chunk, whose inference may include a compilation, and drops it.

        Ctrl-C, SIGTERM and SIGHUP hold the robot still before the exception that ends the process: KeyboardInterrupt,
        or SystemExit for the other two. For those, `run` must be called in the main thread; a handler that the process
        has set, or an ignored signal, stays as it is.

        Args:
            seconds, steps: length of the run, whichever ends first; None means no limit. Skipped steps count.

        Raises:
            ValueError: the policy's chunk contradicts the settings (before the robot moves), or the loop has run.
            Exception: the errors of the robot's methods, and those of the policy except TimeoutError, ConnectionError
                and the errors of a busy server.
        """
        if self.report.steps:
            raise ValueError("This ControlLoop has run already; make a new one.")
        for name, value in (("seconds", seconds), ("steps", steps)):
            if value is not None and not (isinstance(value, (int, float, np.integer, np.floating)) and value >= 0):
                raise ValueError(f"{name} is {value!r:.80}; expected a number of 0 or more, or None for no limit.")
        limit = min(math.inf if steps is None else steps, math.inf if seconds is None else seconds * self.control_hz)
        with _signals_raise():
            return self._run(limit)

    def stop(self) -> None:
        """End the run after the current step, or before the robot moves; for signal handlers and other threads."""
        self._stopping = True

    def _run(self, limit: float) -> ControlReport:
        schedule = self._warm_up()
        if schedule is None:
            return self.report
        self._schedule = schedule
        pacer = Pacer(self._clock, 1 / self.control_hz)
        # The log may be older than this run: it can have earlier runs and other robots.
        self._log_start = self._clock.now() - (0.0 if self._run_log is None else self._run_log.seconds)
        try:
            while self.report.steps + self.report.missed_steps < limit - 1e-9 and not self._stopping:
                self._step()
                self._account(pacer.wait())
        except _Stop as stop:
            self.report.stopped = str(stop)
        finally:
            self.report.reconnects = self._reconnects - self._reconnects_before
            self._halt()
        return self.report

    # ---- before the robot moves ----

    def _warm_up(self) -> ActionQueue | Ensemble | None:
        """Request a first chunk and make the action schedule for chunks of its length; None if `stop` was called."""
        chunk = self._first_chunk({})
        if chunk is None:
            return None
        self._horizon = len(chunk)
        chunk = self._resampled(chunk, self._policy_hz, self.control_hz)
        schedule = self._make_schedule(len(chunk))
        if self._settings.mode != "rtc":
            return schedule
        # Inference conditioned on a previous chunk is another computation, which may include another compilation.
        conditioned = self._first_chunk(self._rtc_fields(Request(0, chunk[1:], 1)))
        return None if conditioned is None else schedule

    def _first_chunk(self, fields: dict[str, Any]) -> np.ndarray | None:
        """Request a chunk for an observation with additional fields; None if `stop` was called.

        Requests that exceed their deadline are repeated.
        """
        until = self._clock.now() + WARM_UP_SECONDS
        warned = False
        while not self._stopping:
            started = self._clock.now()
            self._inference.start({**self._observe(), **fields})
            while (answer := self._inference.wait(_STOP_CHECK_SECONDS)) is None:
                if self._stopping:
                    return None
            if not _is_unanswered(answer) or self._clock.now() > until:
                return self._checked_chunk(answer)
            if not warned:
                warned = True
                _log.warning(
                    "Warm-up: %s. Retrying for up to %g s, because the first inference may include a compilation; a "
                    "model that always takes longer needs a longer answer_timeout",
                    str(answer.error).rstrip("."),
                    WARM_UP_SECONDS,
                )
            self._clock.sleep_until(started + 1 / self.control_hz)  # a busy server refuses immediately
        return None

    def _make_schedule(self, length: int) -> ActionQueue | Ensemble:
        """The schedule for chunks of `length` actions at the loop's rate."""
        if not length:
            raise ValueError(
                f"A chunk of {counted(self._horizon, 'action')} at {self._policy_hz:g} Hz is shorter than one step at "
                f"{self.control_hz:g} Hz; choose a control_hz of at least {self._policy_hz / self._horizon:g}."
            )
        recommended = self._policy.metadata.get("execute_steps") if self._settings.mode != "ensemble" else 1
        check_positive("The server's execute_steps", recommended, whole=True)
        steps = self._settings.execute_steps or recommended or max(self._horizon // 2, 1)
        if steps > self._horizon:
            source = "execute_steps is" if self._settings.execute_steps else f"{self._name} recommends execute_steps"
            raise ValueError(
                f"{source} {steps}, but the policy's chunk has only {counted(self._horizon, 'action')}; "
                "set execute_steps= to at most that in ControlSettings."
            )
        if self._resamples:
            steps = min(max(1, round(steps * self.control_hz / self._policy_hz)), length)
        if self._settings.mode == "rtc" and steps == length:
            raise ValueError(
                f"Of each chunk {steps} of {length} steps at {self.control_hz:g} Hz are executed (execute_steps); mode "
                '"rtc" needs at least one left, on which the next chunk is conditioned.'
            )
        if self._settings.mode == "ensemble":
            return Ensemble(steps, decay=self._settings.ensemble_decay)
        return ActionQueue(steps, drop_rest=self._settings.mode == "sync")

    @property
    def _resamples(self) -> bool:
        return self._settings.resample == "interpolate" and self.control_hz != self._policy_hz

    def _resampled(self, actions: np.ndarray, from_hz: float, to_hz: float) -> np.ndarray:
        return resample(actions, self._commands, from_hz=from_hz, to_hz=to_hz) if self._resamples else actions

    # ---- one step ----

    def _step(self) -> None:
        self._receive()
        if self._schedule.empty and not self._queued:
            # Hold the robot before observe(), which may block: the last velocity would last as long.
            self._send_command()
            self._request_chunk()
            if self._consecutive_held:
                self._mark_late()
        else:
            self._request_chunk()
            self._send_command()
        self.report.steps += 1

    def _send_command(self) -> None:
        command = self._next_command()
        if command is not None:
            self._act(command)

    def _receive(self) -> None:
        """Handle the answer, if it has arrived."""
        answer = self._inference.poll()
        if answer is None:
            return
        assert self._request is not None
        pending, self._request = self._request, None
        self.report.reconnects = self._reconnects - self._reconnects_before
        if _is_unanswered(answer):
            self.report.failed_requests += 1  # the next request has a new observation
            self._consecutive_unanswered += 1
            if self._consecutive_unanswered == 1:
                _log.warning("%s; sending a new request", str(answer.error).rstrip("."))
            return
        if isinstance(answer.error, ConnectionError):
            raise _Stop(f"The connection to the policy is lost: {answer.error}")
        chunk = self._checked_chunk(answer)
        if self._consecutive_unanswered:
            unanswered = counted(self._consecutive_unanswered, "request")
            _log.info("The policy answers again, after %s without an answer", unanswered)
        self._consecutive_unanswered = 0
        self._latency.add(answer.finished - pending.observed_at)
        self.report.latency.add(answer.finished - pending.observed_at)
        if self._uncertainty.refuses(answer.content or {}):
            self._clear()  # the current chunk is for an older observation
            return
        chunk = self._resampled(chunk, self._policy_hz, self.control_hz)
        if self._run_log is not None:
            self._run_log.predict(pending.observed_at - self._log_start, chunk, hz=self.control_hz)
        age = self._clock.now() - pending.observed_at
        discarded = None if age > self._max_age(chunk) else self._schedule.arrive(pending.request, chunk)
        if discarded is None:
            self._refuse(age, len(chunk))
        else:
            self._consecutive_stale = 0
            self._stale_after, self._behind = self._max_age(chunk), 0.0
            self.report.chunks += 1
            self.report.discarded.add(discarded)

    def _refuse(self, age: float, length: int) -> None:
        self.report.stale_chunks += 1
        self._consecutive_stale += 1
        if self._consecutive_stale == MAX_STALE:
            max_age = self._settings.max_age
            limit = f"lasts {length / self.control_hz:.2f} s"
            if max_age is not None:
                limit = f"may be {max_age:g} s old (max_age)"
            raise _Stop(
                f"{MAX_STALE} chunks in a row were stale: the last came {age:.2f} s after its observation, and "
                f'{limit}; use mode "sync", in which the robot waits, or a faster policy'
            )

    def _max_age(self, chunk: np.ndarray) -> float:
        if self._settings.max_age is not None:
            return self._settings.max_age
        return math.inf if self._settings.mode == "sync" else len(chunk) / self.control_hz

    def _request_chunk(self) -> None:
        """Request a chunk, if one is due."""
        if self._inference.busy or not self._schedule.due:
            return
        now = self._clock.now()
        observation = self._observe()
        if self._run_log is not None:
            self._run_log.observe(now - self._log_start, observation)
        request = self._schedule.request()
        if self._settings.mode == "rtc":
            observation.update(self._rtc_fields(request))
        self._request = _Pending(request, now, self.report.steps)
        self._inference.start(observation)

    def _observe(self) -> dict[str, Any]:
        observation = self._robot.observe()
        if not isinstance(observation, Mapping):
            raise ValueError(
                f"The robot's observe() returned a value of type {type(observation).__name__}; expected a dict with "
                "the keys that the policy reads."
            )
        return dict(observation)

    def _rtc_fields(self, request: Request) -> dict[str, Any]:
        """Request field for real-time chunking, at the policy's rate; empty without a previous chunk."""
        if request.rest is None:
            return {}
        rest, executed, rate = request.rest, request.executed, self.control_hz
        if self._resamples:
            rest, rate = self._resampled(rest, self.control_hz, self._policy_hz), self._policy_hz
            executed = self._horizon - len(rest)
        finite = np.isfinite(rest).all(axis=1)
        rest = rest if finite.all() else rest[: int(np.argmin(finite))]  # NaN and infinity are never executed
        if not len(rest):
            return {}
        delay = min(self._latency.steps(rate) or 0, len(rest))  # the loop runs out of actions after len(rest) steps
        return {RTC: PreviousChunk(rest, delay, executed).to_wire()}

    def _next_command(self) -> np.ndarray | None:
        """The command of this step; None: send nothing."""
        if self._queued:
            return self._limited(self._queued.pop(0))
        action = self._schedule.next()
        if action is None:
            return self._without_action()
        if self._consecutive_held >= HELD_SECONDS * self.control_hz:
            _log.info("The robot moves again, after %.1f s", self._consecutive_held / self.control_hz)
        self._consecutive_held = 0
        invalid = ~np.isfinite(action)
        if invalid.any():
            self.report.invalid += invalid
            if self._settings.on_invalid == "stop":
                raise _Stop(f"NaN or infinity in the action, dimensions {np.flatnonzero(invalid).tolist()}")
            return self._hold()
        self.report.actions += 1
        if self._settings.late == "slow" and self._last is not None and self._is_overdue():
            self.report.slowed += 1
            self._queued = list(stretch(self._last, action, self._commands, SLOW))
            return self._limited(self._queued.pop(0))
        return self._limited(action)

    def _without_action(self) -> np.ndarray | None:
        if self._uncertainty.exceeded:
            self.report.holds += 1
            return self._hold()
        if self._settings.mode == "sync" or not self.report.chunks:
            self.report.waits += 1
            return self._hold()
        self.report.holds += 1
        self._consecutive_held += 1
        if self._consecutive_held == math.ceil(HELD_SECONDS * self.control_hz):
            _log.warning("No chunk for %g s: the robot is held until one arrives", HELD_SECONDS)
        self._mark_late()
        if self._settings.late == "stop":
            raise _Stop("A chunk is late: the actions ran out before it arrived")
        return self._hold()

    def _mark_late(self) -> None:
        if self._request is not None and not self._request.late:
            self._request.late = True
            self.report.late_chunks += 1

    def _is_overdue(self) -> bool:
        """True if the chunk should have arrived by now."""
        delay = self._latency.steps(self.control_hz)
        return self._request is not None and delay is not None and self.report.steps - self._request.step >= delay

    def _hold(self) -> np.ndarray | None:
        if self._last is None:
            return None
        command = hold_command(self._last, self._commands)
        return command if self._limits is None else self._counted(self._limits.hold(command, self._last))

    def _limited(self, command: np.ndarray) -> np.ndarray:
        return command if self._limits is None else self._counted(self._limits.apply(command, self._last))

    def _counted(self, limited: Limited) -> np.ndarray:
        self.report.range_clipped += limited.range_clipped
        self.report.step_clipped += limited.step_clipped
        return limited.action

    def _act(self, command: np.ndarray) -> None:
        self._last = np.asarray(command, np.float32)
        if self._run_log is not None:
            self._run_log.execute(self._clock.now() - self._log_start, self._last)
        if not self._settings.dry_run:
            self._robot.act(self._last.copy())

    def _account(self, tick: Tick) -> None:
        """Count an overrun. If it delays the rest of the chunk, alone or with earlier ones, beyond the chunk's maximum
        age, the rest is stale and dropped."""
        if not tick.overrun:
            return
        self.report.overruns.add(tick.overrun)
        self.report.missed_steps += tick.missed
        self._behind += tick.missed / self.control_hz
        if max(tick.overrun, self._behind) > self._stale_after:
            self._clear()
            self.report.stale_chunks += 1

    def _clear(self) -> None:
        """Drop the rest of the current chunk."""
        self._schedule.clear()
        self._queued.clear()
        self._stale_after = math.inf

    def _halt(self) -> None:
        """Send a last command that holds the robot still, regardless of limits. Position control needs none."""
        needs_hold = any(command in ("velocity", "increment") for command in self._commands)
        if self.report.actions and needs_hold and self._last is not None:
            self._act(hold_command(self._last, self._commands))

    @property
    def _reconnects(self) -> int:
        return getattr(self._policy, "reconnects", 0)

    # ---- checks ----

    def _checked_chunk(self, answer: Answer) -> np.ndarray:
        """The answer's actions, float32 [H, a]. NaN and infinity are checked later, in each step."""
        if answer.error is not None:
            raise answer.error
        if not isinstance(answer.content, Mapping):
            found = f"a value of type {type(answer.content).__name__}"
            raise ValueError(f'{self._name} answered {found}; expected a dict with "actions".')
        if "actions" not in answer.content:
            raise ValueError(f"{self._name} answered {', '.join(answer.content) or 'nothing'}; expected actions.")
        chunk = np.asarray(answer.content["actions"])
        is_valid = chunk.ndim == 2 and len(chunk) and chunk.dtype.kind == "f"
        commands = self._settings.action_commands
        if is_valid and commands is not None and chunk.shape[1] != len(commands):
            raise ValueError(wrong_count(commands, chunk.shape[1], self.report.names))
        if not is_valid or chunk.shape[1] != len(self._commands):
            raise ValueError(
                f"{self._name} returned actions {chunk.dtype} {list(chunk.shape)}; "
                f"expected floats [H, {len(self._commands)}], one dimension per action command."
            )
        self._uncertainty.read(answer.content)  # in the warm-up, raises an error before the robot moves
        if self._on_chunk is not None:
            self._on_chunk(chunk)
        return chunk.astype(np.float32)

    def _check_length(self, name: str, value: np.ndarray | None) -> None:
        if value is not None and len(value) != len(self._commands):
            raise ValueError(f"{name} has {len(value)} dimensions; the actions have {len(self._commands)}.")


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise a SystemExit, as Ctrl-C raises a KeyboardInterrupt: by default they kill the process
    without a last command to the robot. Python sets handlers in the main thread only."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        numbers = []

    def end(number: int, frame: Any) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)  # a second signal must not interrupt the last command
        raise SystemExit(128 + number)

    try:
        for number in numbers:
            signal.signal(number, end)
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _require_members(name: str, value: Any, *members: str) -> None:
    missing = [member for member in members if not hasattr(value, member)]
    if missing:
        raise ValueError(f"The {name} is {value!r:.80}, without {' and '.join(missing)}; see `torchpi_client.robot`.")


def _is_unanswered(answer: Answer) -> bool:
    """True if the request exceeded its deadline or a busy server refused it: the next one may succeed."""
    return isinstance(answer.error, TimeoutError) or getattr(answer.error, "code", None) in BUSY


class _Stop(Exception):
    """The run ends early; the message is the reason."""


@dataclasses.dataclass
class _Pending:
    """Request in progress."""

    request: Request
    observed_at: float
    """Time of the observation, on the loop's clock."""
    step: int
    late: bool = False
    """True if the actions ran out before the answer."""

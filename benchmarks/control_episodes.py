"""Episodes of a simulated robot under torchpi-client's control loop, with delayed policy answers."""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float

from torchpi.policy import Policy, load_policy
from torchpi.sim import LatestEnvironment
from torchpi.sim.actors import noise_shape
from torchpi.sim.environment import Environment, UnstableError, environment_seed
from torchpi.sim.rollout import episode_noise
from torchpi.types import PreviousChunk
from torchpi_client import ControlLoop, ControlSettings
from torchpi_client.inference import Answer
from torchpi_client.protocol import RTC
from torchpi_client.protocol import PreviousChunk as WirePreviousChunk
from torchpi_client.report import ControlReport
from torchpi_client.schedule import ActionQueue, Ensemble, Request

STEP_SECONDS = 0.05
"""Control step on the virtual clock. Delays are whole steps, so its length does not affect the results."""

TRAINED = "rtc-trained"
MODES: dict[str, tuple[str, Literal["trained", "guidance"] | None]] = {
    "sync": ("sync", None),
    "async": ("async", None),
    "ensemble": ("ensemble", None),
    "rtc": ("rtc", "guidance"),
    TRAINED: ("rtc", "trained"),
}
"""Modes by name: the control loop's mode, and `PreviousChunk.method`."""


class VirtualClock:
    """Clock that jumps to the time that is waited for."""

    def __init__(self) -> None:
        self._time = 0.0

    def now(self) -> float:
        """Seconds since the start."""
        return self._time

    def sleep_until(self, moment: float) -> None:
        """Advance to this time."""
        self._time = max(self._time, moment)


class DelayedPolicy:
    """Policy and `Inference` of the control loop, whose answers arrive a fixed number of steps after the request."""

    def __init__(
        self,
        policy: Policy,
        clock: VirtualClock,
        *,
        delay: int,
        noise: Callable[[int], np.ndarray],
        method: Literal["trained", "guidance"] | None = None,
    ) -> None:
        """Wrap a policy.

        Args:
            delay: delay in control steps.
            noise: returns a chunk's initial noise [H, action_dim] by the chunk's number.
            method: see `PreviousChunk.method`.
        """
        self._policy, self._clock, self._delay, self._noise, self._method = policy, clock, delay, noise, method
        self.metadata = {**policy.metadata, RTC: True}
        self._chunks = 0
        self._answer: Answer | None = None

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Infer a chunk, which continues the rest of the old one if the request has it."""
        observation = dict(observation)
        sent = WirePreviousChunk.from_wire(observation.pop(RTC)) if RTC in observation else None
        prefix = PreviousChunk(sent.actions, sent.delay, sent.execution_horizon, self._method) if sent else None
        noise = self._noise(self._chunks)
        self._chunks += 1
        return dict(self._policy.infer_batch([observation], noise=noise[None], prefixes=[prefix])[0])

    @property
    def busy(self) -> bool:
        """True while a request's answer has not been taken."""
        return self._answer is not None

    def start(self, observation: dict[str, Any]) -> None:
        """Infer; the answer becomes available after the delay."""
        arrival = self._clock.now() + self._delay * STEP_SECONDS
        self._answer = Answer(self.infer(observation), None, arrival)

    def poll(self) -> Answer | None:
        """Take the answer, or None if it has not arrived."""
        if self._answer is None or self._answer.finished > self._clock.now() + STEP_SECONDS / 1000:
            return None
        answer, self._answer = self._answer, None
        return answer

    def wait(self, seconds: float) -> Answer:
        """Wait for the answer. The loop only does this in its warm-up, whose chunks do not count."""
        assert self._answer is not None
        self._clock.sleep_until(self._answer.finished)
        answer, self._answer, self._chunks = self._answer, None, 0
        return answer


class SimulatedRobot:
    """Environment as the control loop's robot; each command is one step."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self.steps, self.success, self.unstable = 0, False, False

    @property
    def over(self) -> bool:
        """True if the task is done, the steps are used up, or the simulation became unstable."""
        return self.success or self.unstable or self.steps == self._environment.max_steps

    def observe(self) -> dict[str, Any]:
        """Current observation of the environment."""
        return self._environment.observe()

    def act(self, action: np.ndarray) -> None:
        """Execute one step, unless the episode is over (the loop ends with a command that holds the robot)."""
        if self.over:
            return
        try:
            self.success = self._environment.step(action)
        except UnstableError:
            self.unstable = True
        self.steps += 1


class _WatchedSchedule:
    """Wrapper of the loop's schedule that records jumps at chunk borders."""

    def __init__(self, schedule: ActionQueue | Ensemble) -> None:
        self._schedule = schedule
        self._chunk, self._start = np.empty((0, 0), np.float32), 0  # the latest
        self._expected: np.ndarray | None = None
        self.chunks = 0
        self.executed = 0
        self.jumps: list[np.ndarray] = []

    @property
    def due(self) -> bool:
        return self._schedule.due

    @property
    def empty(self) -> bool:
        return False  # observe before a hold command, too: here each command advances the world by one step

    def request(self) -> Request:
        return self._schedule.request()

    def arrive(self, request: Request, chunk: np.ndarray) -> int | None:
        expected = self._without_new_chunk()
        discarded = self._schedule.arrive(request, chunk)
        if discarded is not None:
            self._expected, self._chunk, self._start = expected, chunk, request.start
            self.chunks += 1
        return discarded

    def next(self) -> np.ndarray | None:
        action = self._schedule.next()
        if action is not None:
            if self._expected is not None:
                self.jumps.append(action - self._expected)
            self._expected = None
            self.executed += 1
        return action

    def _without_new_chunk(self) -> np.ndarray | None:
        """Action for the next step according to the chunks so far."""
        if isinstance(self._schedule, Ensemble):
            return copy.deepcopy(self._schedule).next()
        index = self.executed - self._start  # exists even in "sync", which would not execute it
        return self._chunk[index] if index < len(self._chunk) else None


class _WatchedLoop(ControlLoop):
    """Control loop that records its commands and ends with the episode."""

    def __init__(self, robot: SimulatedRobot, *arguments: Any, **options: Any) -> None:
        super().__init__(robot, *arguments, **options)
        self._simulated = robot
        self.commands: list[tuple[np.ndarray, int | None]] = []
        """Commands with the number of their chunk; None if the robot was held."""

    def _make_schedule(self, length: int) -> Any:
        self.watched = _WatchedSchedule(super()._make_schedule(length))
        return self.watched

    def _request_chunk(self) -> None:
        super()._request_chunk()
        self._receive()  # with delay 0 an answer arrives in the same step, unlike real ones

    def _next_command(self) -> np.ndarray | None:
        executed = self.watched.executed
        command = super()._next_command()
        if command is not None:
            self.commands.append((command, self.watched.chunks if self.watched.executed > executed else None))
        return command

    def _act(self, command: np.ndarray) -> None:
        super()._act(command)
        if self._simulated.over:
            self.stop()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of an episode; differences are absolute values in the robot's units."""

    success: bool
    steps: int
    report: ControlReport
    jumps: Float[np.ndarray, "_ a"]
    changes_at_borders: Float[np.ndarray, "_ a"]
    changes_inside: Float[np.ndarray, "_ a"]


def _changes(commands: Sequence[tuple[np.ndarray, int | None]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Changes between consecutive commands at chunk borders and within chunks, except while the robot is held."""
    borders: list[np.ndarray] = []
    inside: list[np.ndarray] = []
    for (before, old), (after, new) in itertools.pairwise(commands):
        if old is not None or new is not None:
            (inside if old == new else borders).append(after - before)
    return borders, inside


@dataclasses.dataclass(frozen=True)
class Job:
    """Episode to run."""

    mode: str
    delay: int
    task: str
    index: int

    def label(self) -> str:
        """Label for messages."""
        return f"episode {self.index} of {self.task}, {self.mode} at delay {self.delay}"


class Episodes:
    """Runs episodes in one process with one thread; keeps the policy and the latest task's simulation."""

    def __init__(self, policy: str | Policy, env: str, seed: int, execute_steps: int | None, late: str) -> None:
        self._policy = load_policy(policy, device="cpu") if isinstance(policy, str) else policy
        self._latest = LatestEnvironment(env)
        self._seed, self._execute_steps, self._late = seed, execute_steps, late
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sums depend on the number of threads

    def __call__(self, job: Job) -> Outcome:
        """Run one episode."""
        environment = self._latest.of(job.task)
        environment.reset(environment_seed("eval", self._seed, job.task, job.index))
        mode, method = MODES[job.mode]
        clock = VirtualClock()
        noise = episode_noise(self._seed, job.task, job.index, _noise_shape(self._policy))
        policy = DelayedPolicy(self._policy, clock, delay=job.delay, noise=noise, method=method)
        settings = ControlSettings(
            mode=mode,
            execute_steps=None if mode == "ensemble" else self._execute_steps,
            control_hz=1 / STEP_SECONDS,
            resample="as_is",
            late=self._late,
        )
        robot = SimulatedRobot(environment)
        loop = _WatchedLoop(robot, policy, settings, clock=clock, inference=policy)
        report = loop.run()
        size = environment.embodiment.action_size
        found = (loop.watched.jumps, *_changes(loop.commands))
        return Outcome(
            robot.success, robot.steps, report, *(np.abs(np.reshape(rows, (-1, size))).astype(float) for rows in found)
        )

    def close(self) -> None:
        """Free the simulation."""
        torch.set_num_threads(self._threads)
        self._latest.close()


def _noise_shape(policy: Policy) -> tuple[int, int]:
    shape = noise_shape(policy)
    assert shape is not None
    return shape

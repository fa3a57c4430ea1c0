"""Demonstrations of scripted experts, as a LeRobot dataset."""

import contextlib
import dataclasses
import importlib.metadata
import pathlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from torchpi.data import LeRobotWriter
from torchpi.data.format import ACTION, IMAGES, INFO, STATE
from torchpi.errors import SimulationError
from torchpi.randomness import generator_at
from torchpi.schema import read_json, write_json
from torchpi.sim import LatestEnvironment, check_tasks, simulator
from torchpi.sim.environment import Environment, UnstableError, environment_seed
from torchpi.sim.processes import default_workers, message_of, rephrased, run_jobs
from torchpi.sim.rollout import camera_keys
from torchpi.ui.progress import progress_bar

RECORDING_FILE = "meta/torchpi_recording.json"
"""The file of a dataset that says how it was recorded."""
TAIL = 5
"""Frames after success, so that the last chunks before it have actions to the end."""
MAX_ATTEMPTS = 10
"""Seeds that are tried for one episode."""
_MIN_ATTEMPTS = 8  # before it is judged that an expert fails too often
_PUSH_STEPS = (5, 20)  # the duration of a push; at one centimetre per step Meta-World's hand is then next to its goal


@dataclasses.dataclass(frozen=True)
class Recording:
    """The result of `record`."""

    path: str
    episodes: int
    frames: int
    failures: dict[str, int]
    """Per task: episodes in which the expert did not succeed, and which were left out."""
    seconds: float
    """On the clock."""


@dataclasses.dataclass(frozen=True)
class _Settings:
    env: str
    seed: int
    noise: float | int
    noisy_fraction: float | int
    push_rate: float | int
    image_size: int

    def __post_init__(self) -> None:
        fractions = 0 <= self.noisy_fraction <= 1 and 0 <= self.push_rate <= 1
        if not self.noise >= 0 or not fractions or self.image_size < 1:
            raise SimulationError(
                "Expected noise of at least 0, a noisy_fraction and a push_rate from 0 to 1 and a positive image_size, "
                f"got {self.noise:g}, {self.noisy_fraction:g}, {self.push_rate:g} and {self.image_size}."
            )


@dataclasses.dataclass(frozen=True)
class _Job:
    task: str
    index: int

    def __str__(self) -> str:
        return f"episode {self.index} of {self.task}"


@dataclasses.dataclass(frozen=True)
class _Demonstration:
    """One successful episode."""

    frames: dict[str, np.ndarray]
    """By the keys of the dataset, [T, …]."""
    description: dict[str, Any]
    """Task, seed, noisy and length, for the dataset's description."""
    failures: int
    """Attempts before it."""


def record(
    env: str,
    tasks: Sequence[str],
    episodes: int,
    out: str | pathlib.Path,
    *,
    seed: int = 0,
    noise: float | int = 0.4,
    noisy_fraction: float | int = 0.5,
    push_rate: float | int = 0.02,
    video: bool = False,
    image_size: int | None = None,
    workers: int | None = None,
    progress: bool = True,
    command: str | None = None,
) -> Recording:
    """Record episodes in which the scripted expert succeeds.

    In some of them its actions are disturbed as they are executed, and the dataset has the undisturbed ones: it shows
    how to come back from where the expert alone would not go. The same arguments give the same dataset, whatever the
    number of workers. After an error or Ctrl-C the complete episodes are a dataset; the message says how many.

    Args:
        env: one of `ENVIRONMENTS` that has experts; tasks: by name; episodes: per task.
        out: the dataset's folder, new or empty.
        seed: of the whole recording. No evaluation has the same episodes, whatever its seed.
        noise: standard deviation of the noise on each dimension of an executed action; actions are ±1.
        noisy_fraction: the part of each task's episodes that is disturbed.
        push_rate: how probable it is at each step of a disturbed episode that a push begins: for 5 to 20 steps the arm
            goes somewhere else. Noise alone never leads far enough away to show how to begin again after a miss.
        video: cameras as video (small, lossy), otherwise as PNG (exact).
        image_size: height and width of the cameras; None: the environment's.
        workers: processes; None: as many as the CPU's cores and the memory allow; 1: this process alone. More than one
            need the usual `if __name__ == "__main__"` in a script.
        progress: show a progress bar on stderr.
        command: the command line to note in the dataset.
    """
    start = time.perf_counter()
    check_tasks(env, tasks)
    if episodes < 1:
        raise SimulationError(f"Expected at least one episode, got {episodes}.")
    if not simulator(env).has_experts:
        raise SimulationError(f"{env} has no scripted experts to record; metaworld has.")
    size = simulator(env).image_size if image_size is None else image_size
    settings = _Settings(env, seed, noise, noisy_fraction, push_rate, size)
    jobs = [_Job(task, index) for task in tasks for index in range(episodes)]
    workers = default_workers(len(jobs)) if workers is None else workers
    done = _Done(pathlib.Path(out), settings, command)
    try:
        _record(done, jobs, workers, video, progress)
    except (KeyboardInterrupt, ModuleNotFoundError, KeyError, ValueError, OSError) as error:
        if not (complete := done.describe_complete(error)):
            raise
        problem = f"{message_of(error).rstrip('.')}. ".lstrip(". ")
        kept = f"{problem}The {complete} episodes that were complete are in {out}."
        raise rephrased(error, kept) from error
    done.describe(len(done.episodes))
    frames = sum(episode["length"] for episode in done.episodes)
    return Recording(str(out), len(done.episodes), frames, dict(done.failures), time.perf_counter() - start)


def _record(done: "_Done", jobs: Sequence[_Job], workers: int, video: bool, progress: bool) -> None:
    start = time.perf_counter()
    instructions = simulator(done.settings.env).instructions
    with (
        _writer(done.root, done.settings, video) as writer,
        progress_bar("recording", len(jobs), shown=progress) as advance,
        contextlib.closing(
            run_jobs(partial(_Recorder, done.settings), jobs, workers=workers, label=str, window=4 * workers)
        ) as demonstrations,
    ):
        for job, demonstration in zip(jobs, demonstrations, strict=True):
            done.add(demonstration)
            writer.add_episode(demonstration.frames, instructions[job.task])
            advance(f"{len(done.episodes) / (time.perf_counter() - start):.1f} episodes/s")


class _Done:
    """The episodes that have been recorded so far, and their description next to the dataset."""

    def __init__(self, root: pathlib.Path, settings: _Settings, command: str | None) -> None:
        self.root, self.settings, self._command = root, settings, command
        self.episodes: list[dict[str, Any]] = []
        self.failures: Counter[str] = Counter()

    def add(self, demonstration: _Demonstration) -> None:
        """Note an episode."""
        task = demonstration.description["task"]
        self.failures[task] += demonstration.failures
        successes = 1 + sum(episode["task"] == task for episode in self.episodes)
        failures, attempts = self.failures[task], self.failures[task] + successes
        if attempts >= _MIN_ATTEMPTS and failures > attempts / 2:
            raise SimulationError(_fails_too_often(task, failures, attempts))
        self.episodes.append(demonstration.description)

    def describe_complete(self, error: BaseException) -> int:
        """Describe the dataset as an error left it; the number of its episodes, 0 where there is none."""
        info = self.root / INFO  # not even this had room: the writer's error says what to do
        if not self.episodes or not info.exists():
            return 0
        complete = int(read_json(info)["total_episodes"])
        try:
            self.describe(complete)
        except OSError as second:
            error.add_note(f"{second} while writing {self.root / RECORDING_FILE}, which the dataset lacks.")
        return complete

    def describe(self, complete: int) -> None:
        """Write the recording's settings next to the dataset's metadata."""
        episodes = self.episodes[:complete]  # an interrupt may come before the last one was saved
        instructions = simulator(self.settings.env).instructions
        tasks = {episode["task"]: instructions[episode["task"]] for episode in episodes}
        packages = ("torchpi", "metaworld", "mujoco")
        document = {
            **dataclasses.asdict(self.settings),
            "tasks": tasks,
            "failures": {task: self.failures[task] for task in tasks},
            "versions": {package: importlib.metadata.version(package) for package in packages},
            "command": self._command,
            "episodes": episodes,
        }
        write_json(self.root / RECORDING_FILE, document)


class _Recorder:
    """Records episodes in one process; keeps the simulation of the latest task."""

    def __init__(self, settings: _Settings) -> None:
        self._settings = settings
        self._latest = LatestEnvironment(settings.env, image_size=settings.image_size)

    def __call__(self, job: _Job) -> _Demonstration:
        """Record one episode."""
        settings, environment = self._settings, self._latest.of(job.task)
        # Spread evenly, so that a part of the dataset has its part of noisy episodes.
        noisy = int((job.index + 1) * settings.noisy_fraction) > int(job.index * settings.noisy_fraction)
        for attempt in range(MAX_ATTEMPTS):
            seed = environment_seed("record", settings.seed, job.task, job.index, attempt)
            generator = generator_at(settings.seed, "record noise", job.task, job.index, attempt)
            disturbance = _Disturbance(settings.noise, settings.push_rate, generator) if noisy else None
            frames = _demonstrate(environment, seed, disturbance)
            if frames is not None:
                length = len(frames[ACTION])
                description = {"task": job.task, "seed": seed, "noisy": noisy, "length": length}
                return _Demonstration(frames, description, failures=attempt)
        raise SimulationError(_fails_too_often(job.task, MAX_ATTEMPTS, MAX_ATTEMPTS))

    def close(self) -> None:
        """Free the simulation."""
        self._latest.close()


class _Disturbance:
    """The arm's actions in place of the expert's."""

    def __init__(self, noise: float | int, push_rate: float | int, generator: np.random.Generator) -> None:
        self._noise, self._push_rate, self._generator = noise, push_rate, generator
        self._push, self._steps_left = np.zeros(0), 0

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """The next action that is executed."""
        noise = self._noise * self._generator.standard_normal(action.shape)
        if not self._steps_left and self._generator.random() < self._push_rate:
            self._push = self._generator.standard_normal(action.shape)
            self._steps_left = int(self._generator.integers(*_PUSH_STEPS, endpoint=True))
        if self._steps_left:
            self._steps_left -= 1
            return np.clip(self._push, -1, 1)
        return np.clip(action + noise, -1, 1)


def _demonstrate(
    environment: Environment, seed: int, disturbance: Callable[[np.ndarray], np.ndarray] | None
) -> dict[str, np.ndarray] | None:
    """An episode of the expert by the keys of the dataset, [T, …]; None if it does not succeed."""
    environment.reset(seed)
    frames: dict[str, list[Any]] = defaultdict(list)
    success_at: int | None = None
    for step in range(environment.max_steps):
        observation, action = environment.observe(), environment.expert_action()
        for camera in camera_keys(environment.embodiment):
            frames[f"{IMAGES}{camera}"].append(observation[camera])
        frames[STATE].append(observation["state"])
        frames[ACTION].append(action)
        try:
            success = environment.step(disturbance(action) if disturbance else action)
        except UnstableError:
            return None
        if success and success_at is None:
            success_at = step
        if success_at is not None and step >= success_at + TAIL:
            break
    return None if success_at is None else {key: np.stack(values) for key, values in frames.items()}


def _fails_too_often(task: str, failures: int, attempts: int) -> str:
    return (
        f"The expert of {task} failed in {failures} of {attempts} episodes; record with less noise, or with a smaller "
        "fraction of noisy episodes."
    )


def _writer(root: pathlib.Path, settings: _Settings, video: bool) -> LeRobotWriter:
    robot, size = simulator(settings.env).embodiment, settings.image_size
    assert robot.control_hz is not None
    return LeRobotWriter(
        root,
        fps=int(robot.control_hz),
        cameras=dict.fromkeys(camera_keys(robot), (size, size, 3)),
        state_names=robot.state_names,
        action_names=[action.name for action in robot.actions],
        robot_type=robot.name,
        video=video,
    )

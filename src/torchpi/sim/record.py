"""Demonstrations of scripted experts, as a LeRobot data set."""

import contextlib
import dataclasses
import importlib.metadata
import json
import pathlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import numpy as np

from torchpi.data import LeRobotWriter
from torchpi.data.format import ACTION, IMAGES, INFO, STATE
from torchpi.errors import SimulationError
from torchpi.randomness import generator_at
from torchpi.sim import LatestEnvironment, check_tasks, simulator
from torchpi.sim.environment import Environment, UnstableError, environment_seed
from torchpi.sim.rollout import camera_keys
from torchpi.sim.workers import default_workers, message_of, rephrased, run_jobs
from torchpi.ui.progress import progress_bar

RECORDING_FILE = "meta/torchpi_recording.json"
"""Where a data set says how it was recorded."""
TAIL = 5
"""Frames after success, so that the last chunks before it have actions to the end."""
MAX_ATTEMPTS = 10
"""Seeds that are tried for one episode."""
_MIN_ATTEMPTS = 8  # before it is judged that an expert fails too often
_PUSH_STEPS = (5, 20)  # how long a push lasts; at one centimetre per step Meta-World's hand is then beside its goal


@dataclasses.dataclass(frozen=True)
class Recording:
    """What `record` has written."""

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


@dataclasses.dataclass(frozen=True)
class _Job:
    task: str
    index: int


@dataclasses.dataclass(frozen=True)
class _Demonstration:
    """One successful episode."""

    frames: dict[str, np.ndarray]
    """By the keys of the data set, [T, …]."""
    seed: int
    noisy: bool
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

    In some of them its actions are disturbed as they are executed, and the data set has the undisturbed ones: it shows
    how to come back from where the expert alone would not go. The same arguments give the same data set, whatever the
    number of workers.

    Args:
        env: one of `ENVIRONMENTS` that has experts.
        tasks: by name.
        episodes: per task.
        out: the data set's folder, new or empty.
        seed: of the whole recording. No evaluation has the same episodes, whatever its seed.
        noise: standard deviation of what is added to each dimension of an executed action; actions are ±1.
        noisy_fraction: the part of each task's episodes that is disturbed.
        push_rate: how probable it is at each step of a disturbed episode that a push begins: for 5 to 20 steps the arm
            goes somewhere else, whatever the expert says. Noise alone never leads far enough away to show how to begin
            again after a miss.
        video: cameras as video (small, lossy), otherwise as PNG (exact).
        image_size: height and width of the cameras; None: the environment's.
        workers: processes; None: as many as the CPU's cores and the memory allow; 1: this process alone. More than one
            need the usual `if __name__ == "__main__"` in a script.
        progress: show a progress bar on stderr.
        command: how this was called, to be written down.

    Raises:
        KeyError, ValueError: something is wrong with an argument; an expert fails too often.
        OSError: the disk is full.
        KeyboardInterrupt: Ctrl-C.
        ModuleNotFoundError: the extra "sim" is not installed; the message says how.
        OpenGLError: no OpenGL that renders without a screen.

        After any of these the episodes that were complete are a data set; the message says how many. Without any there
        is none.
    """
    start = time.perf_counter()
    check_tasks(env, tasks)
    image_size = simulator(env).image_size if image_size is None else image_size
    fractions = 0 <= noisy_fraction <= 1 and 0 <= push_rate <= 1
    if episodes < 1 or not noise >= 0 or not fractions or image_size < 1:
        raise SimulationError(
            "Expected at least one episode, noise of at least 0, a noisy_fraction and a push_rate from 0 to 1 and a "
            f"positive image_size, got {episodes}, {noise:g}, {noisy_fraction:g}, {push_rate:g} and {image_size}."
        )
    if not simulator(env).has_experts:
        raise SimulationError(f"{env} has no scripted experts to record; metaworld has.")
    settings = _Settings(env, seed, noise, noisy_fraction, push_rate, image_size)
    jobs = [_Job(task, index) for task in tasks for index in range(episodes)]
    workers = default_workers(len(jobs)) if workers is None else workers
    root, done = pathlib.Path(out), _Done()
    try:
        with (
            _writer(root, settings, video) as writer,
            progress_bar("recording", len(jobs), shown=progress) as advance,
            contextlib.closing(_in_order(partial(_Recorder, settings), jobs, workers)) as demonstrations,
        ):
            for job, demonstration in demonstrations:
                done.add(job, demonstration)
                writer.add_episode(demonstration.frames, simulator(env).instructions[job.task])
                advance(f"{len(done.episodes) / (time.perf_counter() - start):.1f} episodes/s")
    except (KeyboardInterrupt, ModuleNotFoundError, KeyError, ValueError, OSError) as error:
        complete = _num_complete(root) if done.episodes else 0
        if not complete:
            raise
        try:
            _describe(root, settings, done, command, complete)
        except OSError as second:
            error.add_note(f"{second} while writing {root / RECORDING_FILE}, which the data set lacks")
        kept = f"the {complete} episodes that were complete are in {root}"
        raise rephrased(error, "; ".join(filter(None, [message_of(error), kept]))) from error
    _describe(root, settings, done, command, len(done.episodes))
    return Recording(str(root), len(done.episodes), done.frames, dict(done.failures), time.perf_counter() - start)


class _Done:
    """What has been recorded so far."""

    def __init__(self) -> None:
        self.episodes: list[dict[str, Any]] = []
        self.failures: Counter[str] = Counter()
        self._successes: Counter[str] = Counter()
        self.frames = 0

    def add(self, job: _Job, demonstration: _Demonstration) -> None:
        """Note an episode."""
        length = len(demonstration.frames[ACTION])
        noisy, seed = demonstration.noisy, demonstration.seed
        self.failures[job.task] += demonstration.failures
        self._successes[job.task] += 1
        failures, attempts = self.failures[job.task], self.failures[job.task] + self._successes[job.task]
        if attempts >= _MIN_ATTEMPTS and failures > attempts / 2:
            raise SimulationError(_fails_too_often(job.task, failures, attempts))
        self.episodes.append({"task": job.task, "seed": seed, "noisy": noisy, "length": length})
        self.frames += length


class _Recorder:
    """Records episodes in one process; keeps the simulation of the latest task."""

    def __init__(self, settings: _Settings) -> None:
        self._settings = settings
        self._latest = LatestEnvironment(settings.env, image_size=settings.image_size)

    def __call__(self, job: _Job) -> _Demonstration:
        """Record one episode."""
        settings, environment = self._settings, self._latest.of(job.task)
        # Spread evenly, so that a part of the data set has its part of noisy episodes.
        noisy = int((job.index + 1) * settings.noisy_fraction) > int(job.index * settings.noisy_fraction)
        for attempt in range(MAX_ATTEMPTS):
            seed = environment_seed("record", settings.seed, job.task, job.index, attempt)
            generator = generator_at(settings.seed, "record noise", job.task, job.index, attempt)
            disturbance = _Disturbance(settings.noise, settings.push_rate, generator) if noisy else None
            frames = _demonstrate(environment, seed, disturbance)
            if frames is not None:
                return _Demonstration(frames, seed, noisy, failures=attempt)
        raise SimulationError(_fails_too_often(job.task, MAX_ATTEMPTS, MAX_ATTEMPTS))

    def close(self) -> None:
        """Free the simulation."""
        self._latest.close()


class _Disturbance:
    """What the arm does in place of what the expert says."""

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
    """An episode of the expert by the keys of the data set, [T, …]; None if it does not succeed."""
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


def _in_order(
    make_work: Callable[[], Callable[[_Job], _Demonstration]], jobs: Sequence[_Job], workers: int
) -> Generator[tuple[_Job, _Demonstration], None, None]:
    """The jobs with their demonstrations, in the order of the jobs."""
    waiting: dict[int, _Demonstration] = {}
    results = run_jobs(make_work, jobs, workers=workers, label=_label, window=4 * workers)
    with contextlib.closing(results):
        for number, job in enumerate(jobs):
            while number not in waiting:
                done, demonstration = next(results)
                waiting[done] = demonstration
            yield job, waiting.pop(number)


def _label(job: _Job) -> str:
    return f"episode {job.index} of {job.task}"


def _fails_too_often(task: str, failures: int, attempts: int) -> str:
    return (
        f"the expert of {task} failed in {failures} of {attempts} episodes; record with less noise, or with a smaller "
        "fraction of noisy episodes"
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


def _num_complete(root: pathlib.Path) -> int:
    """How many episodes the data set has; 0: not even its metadata had room, and the writer's error says what to do."""
    info = root / INFO
    return int(json.loads(info.read_text(encoding="utf-8"))["total_episodes"]) if info.exists() else 0


def _describe(root: pathlib.Path, settings: _Settings, done: _Done, command: str | None, complete: int) -> None:
    """Write beside the data set's metadata how it was recorded."""
    episodes = done.episodes[:complete]  # an interrupt may come before the last one was saved
    tasks = {episode["task"]: simulator(settings.env).instructions[episode["task"]] for episode in episodes}
    document = {
        **dataclasses.asdict(settings),
        "tasks": tasks,
        "failures": {task: done.failures[task] for task in tasks},
        "versions": {package: importlib.metadata.version(package) for package in ("torchpi", "metaworld", "mujoco")},
        "command": command,
        "episodes": episodes,
    }
    text = json.dumps(document, indent=1, ensure_ascii=False)
    (root / RECORDING_FILE).write_text(f"{text}\n", encoding="utf-8")

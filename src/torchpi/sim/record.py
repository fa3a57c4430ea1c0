"""Demonstrations of scripted experts, as a LeRobot dataset."""

import contextlib
import dataclasses
import importlib.metadata
import pathlib
import re
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from torchpi.data import LeRobotWriter
from torchpi.data.edit import merge_datasets
from torchpi.data.format import ACTION, IMAGES, INFO, NEW_IMAGES, RECORDING_FOLDER, STATE
from torchpi.errors import DatasetError, SimulationError, counted, listed
from torchpi.randomness import checked_seed, generator_at
from torchpi.robots import Embodiment
from torchpi.robots.keys import flatten
from torchpi.schema import read_json, write_json
from torchpi.sim import ENVIRONMENTS, LatestEnvironment, check_tasks, simulator
from torchpi.sim.environment import Environment, RendersLater, UnstableError, environment_seed
from torchpi.sim.processes import default_workers, explaining, run_jobs
from torchpi.sim.rollout import camera_keys
from torchpi.ui.progress import progress_bar

RECORDING_FILE = "meta/torchpi_recording.json"
"""The file of a dataset that says how it was recorded."""
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
class RecordSettings:
    """The settings that decide each episode of a recording."""

    env: str
    """One of `ENVIRONMENTS` that has experts."""
    image_size: int
    """Height and width of the cameras."""
    render_every: int = 1
    """Each n-th frame is rendered, and the others repeat its images, as of slow cameras: where rendering is dear, there
    are more episodes in its time. A column of the dataset says which are new; training begins at those alone."""
    seed: int = 0
    """Seed of the recording. No evaluation has the same episodes, whatever its seed."""
    noise: float | int = 0.4
    """Standard deviation of the noise on each dimension of an executed action, in parts of the simulator's
    `disturbance`."""
    noisy_fraction: float | int = 0.5
    """The part of each task's episodes that is disturbed."""
    push_rate: float | int = 0.02
    """Probability at each step of a disturbed episode that a push begins: the arm then goes somewhere else for 5 to 20
    steps. Noise alone never leads far enough away to show how to begin again after a miss."""

    def __post_init__(self) -> None:
        checked_seed(self.seed)
        if self.render_every < 1:
            raise SimulationError(f"render_every is {self.render_every}; expected a whole number of at least 1.")
        fractions = 0 <= self.noisy_fraction <= 1 and 0 <= self.push_rate <= 1
        if not self.noise >= 0 or not fractions or self.image_size < 1:
            raise SimulationError(
                "Expected noise of at least 0, a noisy_fraction and a push_rate from 0 to 1 and a positive image_size, "
                f"got {self.noise:g}, {self.noisy_fraction:g}, {self.push_rate:g} and {self.image_size}."
            )


def record(
    env: str,
    tasks: Sequence[str],
    episodes: int,
    out: str | pathlib.Path,
    *,
    image_size: int | None = None,
    video: bool = False,
    workers: int | None = None,
    progress: bool = True,
    command: str | None = None,
    **settings: Any,
) -> Recording:
    """Record episodes in which the scripted expert succeeds.

    In some of them its actions are disturbed as they are executed, and the dataset has the undisturbed ones: it shows
    how to come back from where the expert alone would not go. The same arguments give the same dataset, whatever the
    number of workers. After an error or Ctrl-C the complete episodes are a dataset; the message says how many, and the
    same call again records the others. So it does after the process was killed. The images' statistics,
    which nothing here reads, then differ a little: a finished dataset has no histograms to add up.

    Args:
        env: one of `ENVIRONMENTS` that has experts; tasks: by name; episodes: per task.
        out: the dataset's folder: new, empty, or of a recording with the same arguments that was interrupted.
        image_size: height and width of the cameras; None: the environment's.
        video: cameras as video (small, lossy), otherwise as PNG (exact).
        workers: processes; None: as many as the CPU's cores and the memory allow; 1: this process alone. More than one
            need the usual `if __name__ == "__main__"` in a script.
        progress: show a progress bar on stderr.
        command: the command line to note in the dataset.
        settings: of `RecordSettings`.
    """
    start = time.perf_counter()
    check_tasks(env, tasks)
    if episodes < 1:
        raise SimulationError(f"Expected at least one episode, got {episodes}.")
    place = simulator(env)
    _check_experts(env, tasks)
    size = place.image_size if image_size is None else image_size
    done = _Done(pathlib.Path(out), RecordSettings(env, size, **settings), command)
    jobs = [(task, index) for task in tasks for index in range(episodes)]
    jobs = jobs[done.resume(jobs, video) :]
    most = default_workers(len(jobs), bytes_each=place.memory_bytes)
    with explaining(done.describe_complete):
        if jobs:
            _record(done, jobs, most if workers is None else workers, video, progress)
        done.join()
    frames = sum(episode["length"] for episode in done.episodes)
    return Recording(str(out), len(done.episodes), frames, _failures_of(done.episodes), time.perf_counter() - start)


def _check_experts(env: str, tasks: Sequence[str]) -> None:
    able = simulator(env).expert_tasks
    if not able:
        others = listed(name for name in ENVIRONMENTS if simulator(name).expert_tasks)
        raise SimulationError(f"{env} has no scripted experts to record; expected {others}.")
    if without := [task for task in tasks if task not in able]:
        raise SimulationError(
            f"There is no scripted expert for {listed(without)} of {env}; there is one for {listed(able)}."
        )


def _record(done: "_Done", jobs: Sequence[tuple[str, int]], workers: int, video: bool, progress: bool) -> None:
    start, settings = time.perf_counter(), done.settings
    place = simulator(settings.env)
    robot = place.embodiment
    assert robot.control_hz is not None
    make_work = partial(_Recorder, settings)

    def label(job: tuple[str, int]) -> str:
        return f"episode {job[1]} of {job[0]}"

    with (
        LeRobotWriter(
            done.part,
            fps=int(robot.control_hz),
            cameras=dict.fromkeys(_cameras(robot), (settings.image_size, settings.image_size, 3)),
            state_names=robot.state_names,
            action_names=robot.action_names,
            robot_type=robot.name,
            video=video,
            slow_cameras=settings.render_every > 1,
        ) as writer,
        progress_bar("recording episodes", len(jobs), shown=progress) as advance,
        contextlib.closing(
            run_jobs(make_work, jobs, workers=workers, label=label, window=4 * workers)
        ) as demonstrations,
    ):
        for frames, description in demonstrations:
            done.add(description)
            if len(done.episodes) > 1:  # a killed process leaves a dataset, too
                done.describe(len(done.episodes))
            writer.add_episode(frames, place.instructions[description["task"]])
            if len(done.episodes) == 1:  # not before: an error in the first one leaves nothing
                done.describe(1)
            advance(f"{len(done.episodes) / (time.perf_counter() - start):.1f} episodes/s")


class _Done:
    """The episodes that have been recorded so far, and their description next to the dataset."""

    def __init__(self, root: pathlib.Path, settings: RecordSettings, command: str | None) -> None:
        self.root, self.settings, self._command = root, settings, command
        self.part = root
        """The folder that is recorded into: `_rest`, next to the dataset's, if that has episodes already."""
        self._rest, self._joined = (root.with_name(f"{root.name}.{name}") for name in ("rest", "joined"))
        self.episodes: list[dict[str, Any]] = []
        """Task, seed, noisy, length and failures, the attempts before it, of each."""
        self._versions: dict[str, str] = {}  # of the packages that recorded them

    def resume(self, jobs: Sequence[tuple[str, int]], video: bool) -> int:
        """Take over the episodes of an interrupted recording with the same arguments; their number."""
        for folder in (self.root, self._rest):
            _recover(folder)
        if (self._joined / RECORDING_FILE).is_file():  # a process was killed as it put this one in their place
            self._replace_by_joined()
        if not (self.root / RECORDING_FILE).is_file() or not (self.root / INFO).is_file():
            if self._rest.exists():
                raise SimulationError(
                    f"{self._rest} goes on from a recording that is not in {self.root} any more: move or delete it."
                )
            return 0
        document = read_json(self.root / RECORDING_FILE)
        self.part = self._rest
        self.join()
        info, settings = read_json(self.root / INFO), dataclasses.asdict(self.settings)
        complete = int(info["total_episodes"])
        self.episodes, self._versions = document["episodes"][:complete], document.get("versions", {})
        recorded = {name: document.get(name) for name in settings}, info["video_path"] is not None
        tasks = [episode["task"] for episode in self.episodes]
        if recorded != (settings, video) or len(tasks) != complete or tasks != [task for task, _ in jobs[:complete]]:
            raise SimulationError(
                f"{self.root} exists already, with {complete} episodes of other arguments ({document['command']}); "
                "give the same ones to go on, or choose another path."
            )
        return complete

    def join(self) -> None:
        """Add the episodes of a resumed recording to those before them."""
        if self.part == self.root or not (self.part / INFO).is_file():
            return
        shutil.rmtree(self._joined, ignore_errors=True)
        merge_datasets([self.root, self.part], self._joined)
        # Last: from now on it has all episodes, and none may be joined again.
        write_json(self._joined / RECORDING_FILE, read_json(self.root / RECORDING_FILE))
        self._replace_by_joined()

    def _replace_by_joined(self) -> None:
        for folder in (self._rest, self.root):
            if folder.exists():
                shutil.rmtree(folder)
        self._joined.rename(self.root)

    def add(self, description: dict[str, Any]) -> None:
        """Note an episode."""
        task, episodes = description["task"], [*self.episodes, description]
        failures = _failures_of(episodes)[task]
        attempts = failures + sum(episode["task"] == task for episode in episodes)
        if attempts >= _MIN_ATTEMPTS and failures > attempts / 2:
            raise SimulationError(_fails_too_often(task, failures, attempts))
        self.episodes = episodes

    def describe_complete(self, error: BaseException) -> str:
        """Describe the dataset as an error left it; a sentence on its episodes, where there are some."""
        out, info = self.root, self.root / INFO  # not even this had room: the writer's error says what to do
        try:
            self.join()
            if self.episodes and info.exists():
                self.describe(int(read_json(info)["total_episodes"]))
        except OSError as second:
            error.add_note(f"{second} while finishing {self.root}; the same call again goes on from there.")
        if not self.episodes or not info.exists():
            return ""
        complete = int(read_json(info)["total_episodes"])
        return f"The {counted(complete, 'episode that was complete is', 'episodes that were complete are')} in {out}."

    def describe(self, complete: int) -> None:
        """Write the recording's settings next to the dataset's metadata."""
        episodes = self.episodes[:complete]  # an interrupt may come before the last one was saved
        place = simulator(self.settings.env)
        tasks = {episode["task"]: place.instructions[episode["task"]] for episode in episodes}
        versions = dict(self._versions)
        for package in ("torchpi", place.package, "mujoco"):
            now = importlib.metadata.version(package)
            before = versions.get(package, now)
            versions[package] = before if now in before.split(", ") else f"{before}, {now}"
        document = {
            **dataclasses.asdict(self.settings),
            "tasks": tasks,
            "failures": _failures_of(episodes),
            "versions": versions,
            "command": self._command,
            "episodes": episodes,
        }
        write_json(self.root / RECORDING_FILE, document)


def _failures_of(episodes: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The number of failures of each task, see `Recording`."""
    failures = Counter[str]()
    for episode in episodes:
        failures[episode["task"]] += episode["failures"]
    return dict(failures)


def _recover(folder: pathlib.Path) -> None:
    """Make a dataset of the episodes that a killed process has saved."""
    recording = folder / RECORDING_FOLDER
    if not recording.is_dir():
        return
    try:
        LeRobotWriter.recover(folder)
    except DatasetError:
        if recording.is_dir():
            raise
        # It was killed before it had saved one, and is removed.


class _Recorder:
    """Records the demonstrations of one process; keeps the simulation of the latest task."""

    def __init__(self, settings: RecordSettings) -> None:
        self._settings = settings
        self._latest = LatestEnvironment(settings.env, image_size=settings.image_size)
        self.close = self._latest.close

    def __call__(self, job: tuple[str, int]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The frames of a successful episode by the keys of the dataset, [T, …], and its description."""
        (task, index), settings = job, self._settings
        environment = self._latest.of(task)
        # Spread evenly, so that a part of the dataset has its part of noisy episodes.
        noisy = int((index + 1) * settings.noisy_fraction) > int(index * settings.noisy_fraction)
        for attempt in range(MAX_ATTEMPTS):
            seed = environment_seed("record", settings.seed, task, index, attempt)
            generator = generator_at(settings.seed, "record noise", task, index, attempt)
            disturbance = _Disturbance(settings, generator) if noisy else None
            frames = _demonstrate(environment, seed, disturbance, settings)
            if frames is not None:
                description = {"task": task, "seed": seed, "noisy": noisy, "length": len(frames[ACTION])}
                return frames, description | {"failures": attempt}
        raise SimulationError(_fails_too_often(task, MAX_ATTEMPTS, MAX_ATTEMPTS))


class _Disturbance:
    """The arm's actions in place of the expert's."""

    def __init__(self, settings: RecordSettings, generator: np.random.Generator) -> None:
        self._noise, self._push_rate, self._generator = settings.noise, settings.push_rate, generator
        self._scale = simulator(settings.env).disturbance
        self._push, self._steps_left = np.zeros(0), 0

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """The next action that is executed."""
        noise = self._noise * self._generator.standard_normal(action.shape)
        if not self._steps_left and self._generator.random() < self._push_rate:
            self._push = self._generator.standard_normal(action.shape)
            self._steps_left = int(self._generator.integers(*_PUSH_STEPS, endpoint=True))
        is_pushed, self._steps_left = self._steps_left > 0, max(0, self._steps_left - 1)
        if self._scale is not None:
            return action + (self._push if is_pushed else noise) * self._scale
        return np.clip(self._push if is_pushed else action + noise, -1, 1)


def _demonstrate(
    environment: Environment,
    seed: int,
    disturbance: Callable[[np.ndarray], np.ndarray] | None,
    settings: RecordSettings,
) -> dict[str, np.ndarray] | None:
    """An episode of the expert by the keys of the dataset, [T, …]; None if it does not succeed."""
    environment.reset(seed)
    place = simulator(settings.env)
    moments, actions = list[Any](), list[np.ndarray]()
    success, end = False, environment.max_steps
    while len(actions) < end:
        moments.append(environment.moment() if isinstance(environment, RendersLater) else environment.observe())
        actions.append(environment.expert_action())
        try:
            done = environment.step(disturbance(actions[-1]) if disturbance else actions[-1])
        except UnstableError:
            return None
        if done and not success:
            end = len(actions) + place.tail if place.success_lasts else min(end, len(actions) + place.tail)
            success = True
    if not success or (place.success_lasts and not done):
        return None
    return _frames(environment, moments, actions, settings.render_every)


def _frames(
    environment: Environment, moments: Sequence[Any], actions: Sequence[np.ndarray], render_every: int
) -> dict[str, np.ndarray]:
    robot = environment.embodiment
    frames: dict[str, list[Any]] = defaultdict(list)
    are_new = np.arange(len(actions)) % render_every == 0
    for moment, is_new in zip(moments, are_new.tolist(), strict=True):
        if isinstance(environment, RendersLater):
            moment = environment.observe_moment(moment, images=is_new)
        observation = flatten(moment)
        for camera, key in _cameras(robot).items():
            images = frames[f"{IMAGES}{camera}"]
            images.append(observation[key] if is_new else images[-1])
        frames[STATE].append(np.concatenate([observation[part.key] for part in robot.state]))
    columns = {NEW_IMAGES: are_new} if render_every > 1 else {}
    return {**{key: np.stack(values) for key, values in frames.items()}, ACTION: np.stack(actions), **columns}


def _cameras(robot: Embodiment) -> dict[str, str]:
    """The dataset's name of each camera, the last part of its key, to the key."""
    return {re.split("[./]", key)[-1]: key for key in camera_keys(robot)}


def _fails_too_often(task: str, failures: int, attempts: int) -> str:
    return (
        f"The expert of {task} failed in {failures} of {attempts} episodes; record with less noise, or with a smaller "
        "fraction of noisy episodes."
    )

"""Recording of scripted experts' demonstrations as a LeRobot dataset."""

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
from torchpi.sim.environment import DefersRendering, Environment, UnstableError, environment_seed
from torchpi.sim.processes import append_to_errors, default_workers, run_jobs
from torchpi.sim.rollout import camera_keys
from torchpi.ui.progress import progress_bar

RECORDING_FILE = "meta/torchpi_recording.json"
"""The file of a dataset that describes how it was recorded."""
MAX_ATTEMPTS = 10
"""Number of seeds to try for one episode."""
_MIN_ATTEMPTS = 8  # attempts at a task before its failure rate is judged
_PUSH_STEPS = (5, 20)  # range of a push's duration in steps; Meta-World's hand moves one centimetre per step


@dataclasses.dataclass(frozen=True)
class Recording:
    """Result of `record`."""

    path: str
    episodes: int
    frames: int
    failures: dict[str, int]
    """Per task: number of episodes that were left out because the expert failed."""
    seconds: float
    """Wall-clock duration."""


@dataclasses.dataclass(frozen=True)
class RecordSettings:
    """Settings that determine each episode of a recording."""

    env: str
    """One of `ENVIRONMENTS` that has experts."""
    image_size: int
    """Height and width of the camera images in pixels."""
    render_every: int = 1
    """Render every n-th frame only, and repeat its images in the frames between, as slow cameras do: expensive
    rendering then leaves time for more episodes. A column of the dataset marks the frames with new images, and training
    samples begin only there."""
    seed: int = 0
    """Seed of the recording. No evaluation has the same episodes, whatever its seed."""
    noise: float | int = 0.4
    """Standard deviation of the noise on each executed action, as a multiple of the simulator's `disturbance`."""
    noisy_fraction: float | int = 0.5
    """Fraction of each task's episodes that are disturbed."""
    push_rate: float | int = 0.02
    """Probability per step of a disturbed episode that a push begins, which moves the arm elsewhere for 5 to 20 steps.
    Noise alone never moves it far enough away to show how to recover from a miss."""

    def __post_init__(self) -> None:
        checked_seed(self.seed)
        if self.render_every < 1:
            raise SimulationError(f"render_every is {self.render_every}; expected a whole number of at least 1.")
        valid_fractions = 0 <= self.noisy_fraction <= 1 and 0 <= self.push_rate <= 1
        if not self.noise >= 0 or not valid_fractions or self.image_size < 1:
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

    In some episodes the executed actions are disturbed, while the dataset has the expert's own: it shows how to return
    from states that the expert alone would not reach. The same arguments give the same dataset, whatever the number of
    workers.

    After an error or Ctrl-C, the complete episodes are a dataset, whose size is in the error message. The same call
    then records the remaining episodes, also after the process was killed. The image statistics, which nothing here
    reads, then differ slightly, because finished datasets have no histograms to merge.

    Args:
        env: one of `ENVIRONMENTS` that has experts.
        tasks: names of tasks.
        episodes: episodes per task.
        out: the dataset's folder: new, empty, or with an interrupted recording of the same arguments.
        image_size: height and width of the camera images in pixels; None: the environment's default.
        video: write the cameras as video (small, lossy) instead of PNG (exact).
        workers: number of processes; 1: this process. None: as many as the CPU's cores and the memory allow. A script
            that uses several needs the usual `if __name__ == "__main__"`.
        progress: show a progress bar on stderr.
        command: command line to note in the dataset.
        settings: fields of `RecordSettings`.
    """
    start = time.perf_counter()
    check_tasks(env, tasks)
    if episodes < 1:
        raise SimulationError(f"Expected at least one episode, got {episodes}.")
    sim = simulator(env)
    _check_experts(env, tasks)
    size = sim.image_size if image_size is None else image_size
    folder = _RecordingFolder(pathlib.Path(out), RecordSettings(env, size, **settings), command)
    jobs = [(task, index) for task in tasks for index in range(episodes)]
    jobs = jobs[folder.resume(jobs, video) :]
    if workers is None:
        workers = default_workers(len(jobs), bytes_each=sim.memory_bytes)
    with append_to_errors(folder.finish_after_error):
        if jobs:
            _record(folder, jobs, workers, video, progress)
        folder.merge()
    frames = sum(episode["length"] for episode in folder.episodes)
    failures, seconds = _count_failures(folder.episodes), time.perf_counter() - start
    return Recording(str(out), len(folder.episodes), frames, failures, seconds)


def _check_experts(env: str, tasks: Sequence[str]) -> None:
    expert_tasks = simulator(env).expert_tasks
    if not expert_tasks:
        others = listed(name for name in ENVIRONMENTS if simulator(name).expert_tasks)
        raise SimulationError(f"{env} has no scripted experts to record; expected {others}.")
    if missing := [task for task in tasks if task not in expert_tasks]:
        raise SimulationError(
            f"There is no scripted expert for {listed(missing)} of {env}; there is one for {listed(expert_tasks)}."
        )


def _record(
    folder: "_RecordingFolder", jobs: Sequence[tuple[str, int]], workers: int, video: bool, progress: bool
) -> None:
    start, settings = time.perf_counter(), folder.settings
    sim = simulator(settings.env)
    robot = sim.embodiment
    assert robot.control_hz is not None

    def label(job: tuple[str, int]) -> str:
        return f"episode {job[1]} of {job[0]}"

    with (
        LeRobotWriter(
            folder.target,
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
            run_jobs(partial(_Recorder, settings), jobs, workers=workers, label=label, window=4 * workers)
        ) as demonstrations,
    ):
        for frames, episode in demonstrations:
            folder.add(episode)
            if len(folder.episodes) > 1:  # before saving: a killed process must leave a described dataset
                folder.write_description(len(folder.episodes))
            writer.add_episode(frames, sim.instructions[episode["task"]])
            if len(folder.episodes) == 1:  # after saving: an error in the first episode must leave no files
                folder.write_description(1)
            advance(f"{len(folder.episodes) / (time.perf_counter() - start):.1f} episodes/s")


class _RecordingFolder:
    """The dataset's folder with its description, and the episodes recorded so far."""

    def __init__(self, root: pathlib.Path, settings: RecordSettings, command: str | None) -> None:
        self.root, self.settings, self._command = root, settings, command
        self.target = root
        """The folder to record into: `_rest`, next to the dataset, if the dataset has episodes already."""
        self._rest, self._merged = (root.with_name(f"{root.name}.{suffix}") for suffix in ("rest", "joined"))
        self.episodes: list[dict[str, Any]] = []
        """Each with its task, seed, noisy, length, and failures, the number of failed attempts before it."""
        self._versions: dict[str, str] = {}  # of the packages that recorded the earlier episodes

    def resume(self, jobs: Sequence[tuple[str, int]], video: bool) -> int:
        """Read the episodes of an interrupted recording with the same arguments, and return their number."""
        for folder in (self.root, self._rest):
            _recover(folder)
        if (self._merged / RECORDING_FILE).is_file():  # a process was killed while it replaced the dataset
            self._replace_by_merged()
        if not (self.root / RECORDING_FILE).is_file() or not (self.root / INFO).is_file():
            if self._rest.exists():
                raise SimulationError(
                    f"{self._rest} continues a recording that is no longer in {self.root}: move or delete it."
                )
            return 0
        document = read_json(self.root / RECORDING_FILE)
        self.target = self._rest
        self.merge()
        info, settings = read_json(self.root / INFO), dataclasses.asdict(self.settings)
        complete = int(info["total_episodes"])
        self.episodes, self._versions = document["episodes"][:complete], document.get("versions", {})
        tasks = [episode["task"] for episode in self.episodes]
        same_settings = {name: document.get(name) for name in settings} == settings
        same_video = (info["video_path"] is not None) == video
        if not same_settings or not same_video or len(tasks) != complete or tasks != [t for t, _ in jobs[:complete]]:
            raise SimulationError(
                f"{self.root} has {complete} episodes that were recorded with other arguments "
                f"({document['command']}); use the same arguments to continue, or choose another path."
            )
        return complete

    def merge(self) -> None:
        """Append the newly recorded episodes to those of the interrupted recording."""
        if self.target == self.root or not (self.target / INFO).is_file():
            return
        shutil.rmtree(self._merged, ignore_errors=True)
        merge_datasets([self.root, self.target], self._merged)
        # This file is written last: it marks the merged dataset as complete, so that nothing is merged twice.
        write_json(self._merged / RECORDING_FILE, read_json(self.root / RECORDING_FILE))
        self._replace_by_merged()

    def _replace_by_merged(self) -> None:
        for folder in (self._rest, self.root):
            if folder.exists():
                shutil.rmtree(folder)
        self._merged.rename(self.root)

    def add(self, episode: dict[str, Any]) -> None:
        """Add an episode; an error if the expert fails too often."""
        task, episodes = episode["task"], [*self.episodes, episode]
        failures = _count_failures(episodes)[task]
        attempts = failures + sum(each["task"] == task for each in episodes)
        if attempts >= _MIN_ATTEMPTS and failures > attempts / 2:
            raise SimulationError(_fails_too_often(task, failures, attempts))
        self.episodes = episodes

    def finish_after_error(self, error: BaseException) -> str:
        """Complete the dataset after an error; return a sentence about its episodes, empty if there are none."""
        info = self.root / INFO  # missing if not even this file could be written; the writer's error explains it
        try:
            self.merge()
            if self.episodes and info.exists():
                self.write_description(int(read_json(info)["total_episodes"]))
        except OSError as second:
            error.add_note(f"{second} while finishing {self.root}; run the same command to continue.")
        if not self.episodes or not info.exists():
            return ""
        count = int(read_json(info)["total_episodes"])
        return (
            f"The {counted(count, 'episode that was complete is', 'episodes that were complete are')} in {self.root}."
        )

    def write_description(self, complete: int) -> None:
        """Write the settings and the complete episodes next to the dataset's metadata."""
        episodes = self.episodes[:complete]  # an interrupt may come before the last one was saved
        sim = simulator(self.settings.env)
        versions = dict(self._versions)
        for package in ("torchpi", sim.package, "mujoco"):
            current = importlib.metadata.version(package)
            earlier = versions.get(package, current)
            versions[package] = earlier if current in earlier.split(", ") else f"{earlier}, {current}"
        document = {
            **dataclasses.asdict(self.settings),
            "tasks": {episode["task"]: sim.instructions[episode["task"]] for episode in episodes},
            "failures": _count_failures(episodes),
            "versions": versions,
            "command": self._command,
            "episodes": episodes,
        }
        write_json(self.root / RECORDING_FILE, document)


def _count_failures(episodes: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Number of failed attempts per task."""
    failures = Counter[str]()
    for episode in episodes:
        failures[episode["task"]] += episode["failures"]
    return dict(failures)


def _recover(folder: pathlib.Path) -> None:
    """Make a dataset of the episodes that a killed process has saved."""
    recording = folder / RECORDING_FOLDER
    if recording.is_dir():
        try:
            LeRobotWriter.recover(folder)
        except DatasetError:
            if recording.is_dir():
                raise
            # The process had saved no episode, and `recover` has removed the folder.


class _Recorder:
    """Records demonstrations in one process, with the environment of the latest task."""

    def __init__(self, settings: RecordSettings) -> None:
        self._settings = settings
        self._latest = LatestEnvironment(settings.env, image_size=settings.image_size)
        self.close = self._latest.close

    def __call__(self, job: tuple[str, int]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The frames of a successful episode by the dataset's keys, [T, …], and the episode's description."""
        (task, index), settings = job, self._settings
        environment = self._latest.of(task)
        # Noisy episodes are spread evenly, so that each part of the dataset has the same fraction of them.
        noisy = int((index + 1) * settings.noisy_fraction) > int(index * settings.noisy_fraction)
        for attempt in range(MAX_ATTEMPTS):
            seed = environment_seed("record", settings.seed, task, index, attempt)
            generator = generator_at(settings.seed, "record noise", task, index, attempt)
            disturbance = _Disturbance(settings, generator) if noisy else None
            frames = _demonstrate(environment, seed, disturbance, settings)
            if frames is not None:
                length = len(frames[ACTION])
                episode = {"task": task, "seed": seed, "noisy": noisy, "length": length, "failures": attempt}
                return frames, episode
        raise SimulationError(_fails_too_often(task, MAX_ATTEMPTS, MAX_ATTEMPTS))


class _Disturbance:
    """Noise and pushes on the expert's actions."""

    def __init__(self, settings: RecordSettings, generator: np.random.Generator) -> None:
        self._noise, self._push_rate, self._generator = settings.noise, settings.push_rate, generator
        self._scale = simulator(settings.env).disturbance
        self._push, self._steps_left = np.zeros(0), 0

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """The action to execute in place of the expert's next one."""
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
    """The frames of one episode of the expert by the dataset's keys, [T, …]; None if it does not succeed."""
    environment.reset(seed)
    sim = simulator(settings.env)
    states, actions = list[Any](), list[np.ndarray]()  # states are observations, or snapshots to render later
    success, max_steps = False, environment.max_steps
    while len(actions) < max_steps:
        states.append(environment.snapshot() if isinstance(environment, DefersRendering) else environment.observe())
        actions.append(environment.expert_action())
        try:
            done = environment.step(disturbance(actions[-1]) if disturbance else actions[-1])
        except UnstableError:
            return None
        if done and not success:
            end = len(actions) + sim.tail
            max_steps = end if sim.success_lasts else min(max_steps, end)
            success = True
    if not success or (sim.success_lasts and not done):
        return None
    return _frames(environment, states, actions, settings.render_every)


def _frames(
    environment: Environment, states: Sequence[Any], actions: Sequence[np.ndarray], render_every: int
) -> dict[str, np.ndarray]:
    robot = environment.embodiment
    frames: dict[str, list[Any]] = defaultdict(list)
    are_new = np.arange(len(actions)) % render_every == 0
    for state, is_new in zip(states, are_new.tolist(), strict=True):
        if isinstance(environment, DefersRendering):
            observation = flatten(environment.observe_snapshot(state, images=is_new))
        else:
            observation = flatten(state)
        for camera, key in _cameras(robot).items():
            images = frames[f"{IMAGES}{camera}"]
            images.append(observation[key] if is_new else images[-1])
        frames[STATE].append(np.concatenate([observation[part.key] for part in robot.state]))
    columns = {NEW_IMAGES: are_new} if render_every > 1 else {}
    return {**{key: np.stack(values) for key, values in frames.items()}, ACTION: np.stack(actions), **columns}


def _cameras(robot: Embodiment) -> dict[str, str]:
    """Name of each camera in the dataset, the last part of its key, to the key."""
    return {re.split("[./]", key)[-1]: key for key in camera_keys(robot)}


def _fails_too_often(task: str, failures: int, attempts: int) -> str:
    return (
        f"The expert of {task} failed in {failures} of {attempts} episodes; record with less noise, or with a smaller "
        "fraction of noisy episodes."
    )

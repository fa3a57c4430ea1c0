"""Recording of requests and their chunks as a LeRobot dataset.

A frame is one request: the cameras that the policy reads, the state as the robot sent it, and as its action the whole
chunk, [H, a] flattened row by row. An episode holds the requests of one client with one prompt, in parts where
`EPISODE_MB` requires it.

A dataset has one shape per camera: that of the first image that came from it. When the first episode is saved, a
camera that has sent none yet gets the shape of another one. Frames of other shapes are lost, and the rest is kept.
"""

import concurrent.futures
import contextlib
import dataclasses
import logging
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from torchpi.data.format import ACTION, IMAGES, STATE
from torchpi.data.writer import LeRobotWriter
from torchpi.errors import ServingError, counted
from torchpi.robots import Embodiment
from torchpi.robots.keys import flatten
from torchpi.serving.memory import size_of
from torchpi.serving.metrics import Metrics
from torchpi.transforms.prompt import as_text

_log = logging.getLogger(__name__)

EPISODE_MB = 256
"""MiB of frames that the episodes of one policy's clients may hold in memory together; the largest is saved then."""
MAX_WAITING, MAX_WAITING_MB = 256, 256
"""Requests that may wait to be recorded; more are lost, and counted, because robots don't wait for disks."""
NO_INSTRUCTION = "(no instruction)"
"""The task of an empty prompt; LeRobot's format has no empty tasks."""


class Recorder:
    """Writes one dataset per policy, in a thread of its own; robots never wait for it.

        with Recorder({"default": "my_recording"}) as recorder:
            recorder.keep("default", client, policy, observation, actions)

    The folders, by the policies' names, are new or empty. Datasets appear when the block ends; see `LeRobotWriter` for
    what is left if the process is killed. The metrics count kept and lost requests.
    """

    def __init__(self, paths: Mapping[str, Path], metrics: Metrics) -> None:
        self._paths = {name: path.expanduser() for name, path in paths.items()}
        for path in self._paths.values():
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise ServingError(
                    f"{path} exists already and is not an empty folder; choose another path to record to."
                )
        self.metrics = metrics
        self._recordings: dict[str, _Recording] = {}
        self._bytes: deque[int] = deque()
        """Of each request that waits."""
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="torchpi-recorder")

    def keep(self, name: str, client: int, policy: Any, observation: Mapping[str, Any], actions: np.ndarray) -> None:
        """Record one request of a client to the policy of this name, and its chunk [H, a]; returns at once."""
        size = size_of(observation)
        if len(self._bytes) < MAX_WAITING and sum(self._bytes) + size <= MAX_WAITING_MB * 2**20:
            self._bytes.append(size)
            self._thread.submit(self._keep, name, client, policy, observation, actions)
        else:
            self.metrics.recorded.labels("lost").inc()
            _log.error("a request is not recorded: %d wait for the disk already", len(self._bytes))

    def end(self, client: int) -> None:
        """End the episode of a client that has left."""
        self._thread.submit(self._for_each, lambda recording: recording.end(client))

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.submit(self._for_each, lambda recording: recording.finish())
        self._thread.shutdown()

    def _for_each(self, action: Callable[["_Recording"], None]) -> None:
        for recording in self._recordings.values():
            action(recording)

    def _keep(self, name: str, client: int, policy: Any, observation: Mapping[str, Any], actions: np.ndarray) -> None:
        self._bytes.popleft()
        with _counted_failures(1, self.metrics):
            frame = request_frame(policy.embodiment, observation, actions)
            prompt = observation.get("prompt")
            task = as_text(policy.metadata["default_prompt"] if prompt is None else prompt)
            if name not in self._recordings:
                self._recordings[name] = _Recording(self._paths[name], policy.embodiment, len(actions), self.metrics)
            self._recordings[name].add(client, task if task.strip() else NO_INSTRUCTION, frame)


@contextlib.contextmanager
def _counted_failures(num_requests: int, metrics: Metrics) -> Iterator[None]:
    """Log and count what fails, such as a full disk: it must not stop the robots."""
    try:
        yield
    except Exception as error:
        metrics.recorded.labels("lost").inc(num_requests)
        _log.exception("recording failed, and %s lost: %s", counted(num_requests, "request is", "requests are"), error)


@dataclasses.dataclass
class _Episode:
    """The requests of one client with one prompt, as far as they are in memory."""

    task: str
    frames: list[Mapping[str, np.ndarray]] = dataclasses.field(default_factory=list)
    num_bytes: int = 0


class _Recording:
    """The dataset of one policy, and the unfinished episodes of its clients."""

    def __init__(self, path: Path, embodiment: Embodiment, horizon: int, metrics: Metrics) -> None:
        path.mkdir(parents=True, exist_ok=True)  # a folder that can't be written is found out before an episode is over
        self._path, self._embodiment, self._horizon, self._metrics = path, embodiment, horizon, metrics
        self._writer: LeRobotWriter | None = None
        """Comes with the first episode that is saved: until then cameras may send their first image."""
        self._num_kept = 0
        """Requests in saved episodes."""
        self._episodes: dict[int, _Episode] = {}
        """By client; each has a frame."""
        self._misfits: set[int] = set()
        """Connected clients of which the log says that a request did not fit."""
        self._cameras = list(camera_fields(embodiment).values())
        self._shapes: dict[str, tuple[int, ...]] = {}
        """Known shapes of a frame's values, by name."""

    def add(self, client: int, task: str, frame: Mapping[str, np.ndarray]) -> None:
        """Continue the client's episode, or begin it; episodes are saved where the memory requires it."""
        if client in self._episodes and self._episodes[client].task != task:
            self._save(client)
        if misfit := self._misfit(frame):
            self._metrics.recorded.labels("lost").inc()
            if client not in self._misfits:
                self._misfits.add(client)
                text = "a request of client %d is not recorded in %s: %s; others of it that do not fit are only counted"
                _log.error(text, client, self._path, misfit)
            return
        num_bytes = sum(value.nbytes for value in frame.values())
        room = EPISODE_MB * 2**20 - num_bytes
        while self._episodes and sum(each.num_bytes for each in self._episodes.values()) > room:
            self._save(max(self._episodes, key=lambda each: self._episodes[each].num_bytes))
        for key, value in frame.items():
            self._shapes.setdefault(key, value.shape)
        episode = self._episodes.setdefault(client, _Episode(task))
        episode.frames.append(frame)
        episode.num_bytes += num_bytes

    def end(self, client: int) -> None:
        self._save(client)
        self._misfits.discard(client)

    def finish(self) -> None:
        """Save the last episodes, and complete the dataset."""
        for client in list(self._episodes):
            self._save(client)
        if self._writer is not None:  # else not even the first episode could be begun; the log says why
            num_episodes = self._writer.num_episodes
            with _counted_failures(0, self._metrics):
                self._writer.finalize()
                kept = f"{counted(self._num_kept, 'request')} in {counted(num_episodes, 'episode')}"
                _log.info("recorded %s: %s", kept, self._path)

    def _misfit(self, frame: Mapping[str, np.ndarray]) -> str | None:
        """The reason why the dataset can't have this frame; None: it can."""
        for key, value in frame.items():
            if value.shape != (shape := self._shapes.get(key, value.shape)):
                return f"its {key} has the shape {list(value.shape)}, and that of the dataset {list(shape)}"
        for key in frame.keys() & {STATE, ACTION}:
            if not np.isfinite(frame[key]).all():
                return f"its {key} has NaN or infinity as float32"
        return None

    def _save(self, client: int) -> None:
        """Write the client's episode, if it has one; absent cameras are black."""
        if (episode := self._episodes.pop(client, None)) is None:
            return
        with _counted_failures(len(episode.frames), self._metrics):
            if self._writer is None:
                self._writer = self._begin()
            numbers = [key for key in (STATE, ACTION) if key in self._shapes]
            columns = {key: [frame[key] for frame in episode.frames] for key in numbers}
            for key in self._cameras:
                black = np.zeros(self._shapes[key], np.uint8)
                columns[key] = [frame.get(key, black) for frame in episode.frames]
            self._writer.add_episode(columns, episode.task)
            self._num_kept += len(episode.frames)
            self._metrics.recorded.labels("kept").inc(len(episode.frames))

    def _begin(self) -> LeRobotWriter:
        """The writer of the shapes that are known now; from now on cameras that have sent nothing have one, too."""
        known = next(self._shapes[key] for key in self._cameras if key in self._shapes)
        shapes = dict.fromkeys(self._cameras, known) | self._shapes
        embodiment = self._embodiment
        rate = (embodiment.control_hz or 1) / (embodiment.execute_steps or self._horizon)
        writer = LeRobotWriter(
            self._path,
            fps=max(1, round(rate)),  # as if each client asked whenever it had executed what is recommended
            cameras={key.removeprefix(IMAGES): shapes[key] for key in self._cameras},
            state_names=embodiment.state_names[: shapes[STATE][0]] if embodiment.state else None,
            action_names=[f"{dim.name}@{step}" for step in range(self._horizon) for dim in embodiment.actions],
            robot_type=embodiment.name,
        )
        self._shapes = shapes
        return writer


def request_frame(embodiment: Embodiment, observation: Mapping[str, Any], actions: np.ndarray) -> dict[str, np.ndarray]:
    """One request as a dataset's frame: by `camera_fields` uint8 [h, w, 3], nothing where an optional camera is absent;
    "observation.state" [s] in the robot's units and "action" [H·a], float32."""
    found, fields = flatten(observation), camera_fields(embodiment)
    frame = {
        fields[camera.key]: camera.read(found[camera.key])
        for camera in embodiment.read_cameras
        if camera.key is not None and found.get(camera.key) is not None
    }
    with np.errstate(over="ignore"):  # infinity is a frame that does not fit
        frame[ACTION] = actions.reshape(-1).astype(np.float32)
        if embodiment.state:
            state = np.concatenate([np.atleast_1d(found[part.key]) for part in embodiment.state])
            frame[STATE] = state.astype(np.float32)
    return frame


def camera_fields(embodiment: Embodiment) -> dict[str, str]:
    """The dataset's name of each camera that the policy reads and the robot has, by the camera's key.

    That is "observation.images." and the key's last part; the whole key, with '_' for '.' and '/', of cameras whose
    last parts are the same.
    """
    keys = list(dict.fromkeys(camera.key for camera in embodiment.read_cameras if camera.key is not None))
    last = {key: re.split("[./]", key)[-1] for key in keys}
    count = Counter(last.values())
    names: dict[str, str] = {}
    for key in keys:
        name = last[key] if count[last[key]] == 1 else re.sub("[./]", "_", key)
        while name in names.values():  # "a.b" and "a/b", for example
            name += "_"
        names[key] = name
    return {key: f"{IMAGES}{name}" for key, name in names.items()}

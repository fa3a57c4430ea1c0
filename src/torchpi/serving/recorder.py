"""Recording of requests and their chunks as LeRobot datasets.

A frame is one request: the cameras that the policy reads, the state as the robot sent it, and the whole chunk [H, a],
flattened row by row, as its action. An episode has the requests of one client with one prompt; it is split where
`EPISODE_MB` requires it.

A dataset has one image shape per camera: that of the camera's first image or, if it has sent none before the first
episode is saved, that of another camera. Frames with other shapes are not recorded.
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
"""Memory in MiB for unsaved frames per policy. At the limit, the largest of the clients' episodes is saved."""
MAX_WAITING, MAX_WAITING_MB = 256, 256
"""Number and MiB of requests that may wait for the disk. More are lost and counted: robots do not wait for it."""
NO_INSTRUCTION = "(no instruction)"
"""Task for an empty prompt, because LeRobot's format does not allow empty tasks."""


class Recorder:
    """Writes one dataset per policy, in its own thread. Robots never wait for it.

        with Recorder({"default": Path("my_recording")}, Metrics()) as recorder:
            recorder.keep("default", client, policy, observation, actions)

    `paths` maps policies to folders, which must be new or empty. The datasets are complete when the block ends;
    `LeRobotWriter` says what remains if the process is killed. The metrics count kept and lost requests.
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
        self._waiting_bytes: deque[int] = deque()
        """Size of each waiting request."""
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="torchpi-recorder")

    def keep(self, name: str, client: int, policy: Any, observation: Mapping[str, Any], actions: np.ndarray) -> None:
        """Record a client's request to policy `name` and its chunk [H, a]. Does not block."""
        size = size_of(observation)
        if len(self._waiting_bytes) < MAX_WAITING and sum(self._waiting_bytes) + size <= MAX_WAITING_MB * 2**20:
            self._waiting_bytes.append(size)
            self._thread.submit(self._keep, name, client, policy, observation, actions)
        else:
            self.metrics.recorded.labels("lost").inc()
            _log.error("a request is not recorded: %d are waiting for the disk already", len(self._waiting_bytes))

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
        self._waiting_bytes.popleft()
        with _counted_failures(1, self.metrics):
            frame = request_frame(policy.embodiment, observation, actions)
            prompt = observation.get("prompt")
            task = as_text(policy.metadata["default_prompt"] if prompt is None else prompt)
            if name not in self._recordings:
                self._recordings[name] = _Recording(self._paths[name], policy.embodiment, len(actions), self.metrics)
            self._recordings[name].add(client, task if task.strip() else NO_INSTRUCTION, frame)


@contextlib.contextmanager
def _counted_failures(num_requests: int, metrics: Metrics) -> Iterator[None]:
    """Log an error, such as a full disk, and count the lost requests: recording must not stop the robots."""
    try:
        yield
    except Exception as error:
        metrics.recorded.labels("lost").inc(num_requests)
        _log.exception("recording failed, and %s lost: %s", counted(num_requests, "request is", "requests are"), error)


@dataclasses.dataclass
class _Episode:
    """Requests of one client with one prompt that are not saved yet."""

    task: str
    frames: list[Mapping[str, np.ndarray]] = dataclasses.field(default_factory=list)
    num_bytes: int = 0


class _Recording:
    """Dataset of one policy, and the unfinished episodes of its clients."""

    def __init__(self, path: Path, embodiment: Embodiment, horizon: int, metrics: Metrics) -> None:
        path.mkdir(parents=True, exist_ok=True)  # now, to detect a read-only folder before an episode has ended
        self._path, self._embodiment, self._horizon, self._metrics = path, embodiment, horizon, metrics
        self._writer: LeRobotWriter | None = None
        """Created for the first saved episode, because it needs the shape of every camera's images."""
        self._num_kept = 0
        """Requests in saved episodes."""
        self._episodes: dict[int, _Episode] = {}
        """Unfinished episodes by client, none of them empty."""
        self._warned: set[int] = set()
        """Connected clients for which a lost request was logged."""
        self._cameras = list(camera_fields(embodiment).values())
        self._shapes: dict[str, tuple[int, ...]] = {}
        """Known shapes of a frame's values, by name."""

    def add(self, client: int, task: str, frame: Mapping[str, np.ndarray]) -> None:
        """Continue or begin the client's episode. The largest episodes are saved if they exceed the memory limit."""
        if client in self._episodes and self._episodes[client].task != task:
            self._save(client)
        mismatch = self._mismatch(frame)
        if mismatch is not None:
            self._metrics.recorded.labels("lost").inc()
            if client not in self._warned:
                self._warned.add(client)
                text = "a request of client %d is not recorded in %s: %s; further ones like it are only counted"
                _log.error(text, client, self._path, mismatch)
            return
        num_bytes = sum(value.nbytes for value in frame.values())
        allowed = EPISODE_MB * 2**20 - num_bytes
        while self._episodes and sum(episode.num_bytes for episode in self._episodes.values()) > allowed:
            self._save(max(self._episodes, key=lambda number: self._episodes[number].num_bytes))
        for key, value in frame.items():
            self._shapes.setdefault(key, value.shape)
        episode = self._episodes.setdefault(client, _Episode(task))
        episode.frames.append(frame)
        episode.num_bytes += num_bytes

    def end(self, client: int) -> None:
        self._save(client)
        self._warned.discard(client)

    def finish(self) -> None:
        """Save the remaining episodes and complete the dataset."""
        for client in list(self._episodes):
            self._save(client)
        if self._writer is not None:  # None if there was no episode, or creating the dataset failed, which was logged
            num_episodes = self._writer.num_episodes
            with _counted_failures(0, self._metrics):
                self._writer.finalize()
                kept = f"{counted(self._num_kept, 'request')} in {counted(num_episodes, 'episode')}"
                _log.info("recorded %s: %s", kept, self._path)

    def _mismatch(self, frame: Mapping[str, np.ndarray]) -> str | None:
        """The reason why this frame cannot be in the dataset, or None."""
        for key, value in frame.items():
            shape = self._shapes.get(key, value.shape)
            if value.shape != shape:
                return f"its {key} has the shape {list(value.shape)}, but the dataset has {list(shape)}"
        for key in frame.keys() & {STATE, ACTION}:
            if not np.isfinite(frame[key]).all():
                return f"its {key} has NaN or infinity as float32"
        return None

    def _save(self, client: int) -> None:
        """Write the client's episode, if it has one. Absent cameras become black images."""
        episode = self._episodes.pop(client, None)
        if episode is None:
            return
        with _counted_failures(len(episode.frames), self._metrics):
            if self._writer is None:
                self._writer = self._create_writer()
            numbers = [key for key in (STATE, ACTION) if key in self._shapes]
            columns = {key: [frame[key] for frame in episode.frames] for key in numbers}
            for key in self._cameras:
                black = np.zeros(self._shapes[key], np.uint8)
                columns[key] = [frame.get(key, black) for frame in episode.frames]
            self._writer.add_episode(columns, episode.task)
            self._num_kept += len(episode.frames)
            self._metrics.recorded.labels("kept").inc(len(episode.frames))

    def _create_writer(self) -> LeRobotWriter:
        """Create the dataset. Cameras that have sent nothing yet get the image shape of another camera."""
        default = next(self._shapes[key] for key in self._cameras if key in self._shapes)
        shapes = dict.fromkeys(self._cameras, default) | self._shapes
        embodiment = self._embodiment
        rate = (embodiment.control_hz or 1) / (embodiment.execute_steps or self._horizon)
        writer = LeRobotWriter(
            self._path,
            fps=max(1, round(rate)),  # the rate of a client that executes the recommended number of actions per chunk
            cameras={key.removeprefix(IMAGES): shapes[key] for key in self._cameras},
            state_names=embodiment.state_names[: shapes[STATE][0]] if embodiment.state else None,
            action_names=[f"{dim.name}@{step}" for step in range(self._horizon) for dim in embodiment.actions],
            robot_type=embodiment.name,
        )
        self._shapes = shapes
        return writer


def request_frame(embodiment: Embodiment, observation: Mapping[str, Any], actions: np.ndarray) -> dict[str, np.ndarray]:
    """One request as a frame of a dataset.

    It has uint8 [h, w, 3] per camera, named by `camera_fields` and without absent optional cameras; "observation.state"
    [s], float32 in the robot's units; and "action" [H·a], float32.
    """
    values, fields = flatten(observation), camera_fields(embodiment)
    frame = {
        fields[camera.key]: camera.read(values[camera.key])
        for camera in embodiment.read_cameras
        if camera.key is not None and values.get(camera.key) is not None
    }
    with np.errstate(over="ignore"):  # `_mismatch` refuses infinity
        frame[ACTION] = actions.reshape(-1).astype(np.float32)
        if embodiment.state:
            state = np.concatenate([np.atleast_1d(values[part.key]) for part in embodiment.state])
            frame[STATE] = state.astype(np.float32)
    return frame


def camera_fields(embodiment: Embodiment) -> dict[str, str]:
    """Name in the dataset for each camera that the policy reads and the robot has, by the camera's key.

    The name is "observation.images." and the last part of the key or, for cameras that share it, the whole key with '_'
    for '.' and '/'.
    """
    keys = list(dict.fromkeys(camera.key for camera in embodiment.read_cameras if camera.key is not None))
    last_parts = {key: re.split("[./]", key)[-1] for key in keys}
    counts = Counter(last_parts.values())
    names: dict[str, str] = {}
    for key in keys:
        name = last_parts[key] if counts[last_parts[key]] == 1 else re.sub("[./]", "_", key)
        while name in names.values():  # "a.b" and "a/b", for example
            name += "_"
        names[key] = name
    return {key: f"{IMAGES}{name}" for key, name in names.items()}

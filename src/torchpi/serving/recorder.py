"""Keeping requests and their chunks as a LeRobot data set.

A frame is one request: the cameras that the policy reads, the state as the robot sent it, and as its action the whole
chunk, [H, a] flattened row by row. An episode is what one client asked with one prompt, in parts where `EPISODE_MB`
asks for them.

A data set has one shape per camera: that of the first image that came from it. When the first episode is saved, a
camera that has sent none yet gets the shape of another one. Frames of other shapes are lost, and the rest is kept.
"""

import dataclasses
import functools
import logging
import queue
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from torchpi.data.format import ACTION, IMAGES, STATE
from torchpi.data.writer import LeRobotWriter
from torchpi.errors import ServingError
from torchpi.robots import Camera, Embodiment
from torchpi.robots.embodiment import value_at
from torchpi.serving.metrics import Metrics
from torchpi.transforms.images import to_uint8_hwc
from torchpi.transforms.prompt import as_text

_log = logging.getLogger(__name__)

EPISODE_MB = 256
"""MiB of frames that the episodes of one policy's clients may hold in memory together; the largest is saved then."""
MAX_WAITING = 256
"""Requests that may wait to be recorded; more are lost, and counted, because robots don't wait for disks."""
NO_INSTRUCTION = "(no instruction)"
"""The task of an empty prompt; LeRobot's format has no empty tasks."""


class Recorder:
    """Writes one data set per policy, in a thread of its own; robots never wait for it.

        with Recorder({"default": "my_recording"}) as recorder:
            recorder.keep("default", client, policy, observation, actions)

    Data sets appear when the block ends; see `LeRobotWriter` for what is left if the process is killed.
    """

    def __init__(self, paths: Mapping[str, Path], metrics: Metrics) -> None:
        """
        Args:
            paths: per policy's name the folder of its data set, new or empty.
            metrics: where kept and lost requests are counted.
        """
        paths = {name: path.expanduser() for name, path in paths.items()}
        for path in paths.values():
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise ServingError(
                    f"{path} exists already and is not an empty folder; choose another path to record to."
                )
        self.metrics = metrics
        self._paths = paths
        self._sets: dict[str, _PolicySet] = {}
        self._waiting: queue.Queue[tuple[Any, ...] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="torchpi-recorder", daemon=True)

    def keep(self, name: str, client: int, policy: Any, observation: Mapping[str, Any], actions: np.ndarray) -> None:
        """Record one request; returns at once.

        Args:
            name: the policy's.
            client: number of the connection.
            actions: [H, a], the chunk that it was sent.
        """
        if self._waiting.qsize() >= MAX_WAITING:
            self.metrics.recorded.labels("lost").inc()
            _log.error("a request is not recorded: %d wait for the disk already", MAX_WAITING)
            return
        self._waiting.put((name, client, policy, observation, actions))

    def end(self, client: int) -> None:
        """The client has left: what it asked becomes an episode."""
        self._waiting.put((client,))

    def __enter__(self) -> "Recorder":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while item := self._waiting.get():
            if len(item) > 1:
                self._try(1, functools.partial(self._add, *item))
            else:
                for policy_set in self._sets.values():
                    self._save(policy_set, item[0])
                    policy_set.misfits.discard(item[0])
        for policy_set in self._sets.values():
            for client in list(policy_set.episodes):
                self._save(policy_set, client)
            self._finish(policy_set)

    def _add(self, name: str, client: int, policy: Any, observation: Mapping[str, Any], actions: np.ndarray) -> None:
        frame = request_frame(policy.embodiment, observation, actions)
        prompt = observation.get("prompt")
        task = as_text(policy.metadata["default_prompt"] if prompt is None else prompt)
        if not task.strip():
            task = NO_INSTRUCTION
        if name not in self._sets:
            self._sets[name] = _PolicySet(self._paths[name], policy.embodiment, len(actions))
        policy_set = self._sets[name]
        episode = policy_set.episodes.get(client)
        if episode is not None and episode.task != task:
            self._save(policy_set, client)
        if misfit := policy_set.misfit(frame):
            self.metrics.recorded.labels("lost").inc()
            if client not in policy_set.misfits:
                policy_set.misfits.add(client)
                _log.error(
                    "a request of client %d is not recorded in %s: %s; others of it that do not fit are only counted",
                    client,
                    policy_set.path,
                    misfit,
                )
            return
        num_bytes = sum(value.nbytes for value in frame.values())
        while policy_set.episodes and policy_set.num_bytes + num_bytes > EPISODE_MB * 2**20:
            self._save(policy_set, policy_set.largest)
        policy_set.add(client, task, frame, num_bytes)

    def _save(self, policy_set: "_PolicySet", client: int) -> None:
        """Write the client's episode, if it has one."""
        episode = policy_set.take(client)
        if episode is not None and self._try(len(episode.frames), lambda: policy_set.write(episode)):
            self.metrics.recorded.labels("kept").inc(len(episode.frames))

    def _finish(self, policy_set: "_PolicySet") -> None:
        """Make the data set of the saved episodes."""
        writer = policy_set.writer
        if writer is None:  # not even the first episode could be begun; the log says why
            return
        num_episodes = writer.num_episodes
        if self._try(0, writer.finalize):
            _log.info("recorded %d requests in %d episodes: %s", policy_set.num_kept, num_episodes, policy_set.path)

    def _try(self, num_requests: int, action: Callable[[], None]) -> bool:
        """Whether it worked. A full disk must not stop the robots: what is lost is said and counted."""
        try:
            action()
        except Exception as error:
            self.metrics.recorded.labels("lost").inc(num_requests)
            _log.exception("recording failed, %d requests are lost: %s", num_requests, error)
            return False
        return True


@dataclasses.dataclass
class _Episode:
    """What one client asks with one prompt, as far as it is in memory."""

    task: str
    frames: list[Mapping[str, np.ndarray]] = dataclasses.field(default_factory=list)
    num_bytes: int = 0


class _PolicySet:
    """The data set of one policy, and the episodes that its clients are in."""

    def __init__(self, path: Path, embodiment: Embodiment, horizon: int) -> None:
        path.mkdir(parents=True, exist_ok=True)  # a folder that can't be written is found out before an episode is over
        self.path = path
        self.writer: LeRobotWriter | None = None
        """Comes with the first episode that is saved: until then cameras may send their first image."""
        self.num_kept = 0
        """Requests in saved episodes."""
        self.episodes: dict[int, _Episode] = {}
        """By client; each has a frame."""
        self.num_bytes = 0
        """Of all their frames."""
        self.misfits: set[int] = set()
        """Connected clients of which the log says that a request did not fit."""
        self._embodiment, self._horizon = embodiment, horizon
        self._cameras = list(camera_fields(embodiment).values())
        self._shapes: dict[str, tuple[int, ...]] = {}
        """Of a frame's values, as far as they are known."""

    def misfit(self, frame: Mapping[str, np.ndarray]) -> str | None:
        """Why the set can't have this frame; None: it can."""
        for key, value in frame.items():
            if value.shape != (shape := self._shapes.get(key, value.shape)):
                return f"its {key} has the shape {list(value.shape)}, and that of the data set {list(shape)}"
        for key in (STATE, ACTION):
            if not np.isfinite(frame[key]).all():
                return f"its {key} has NaN or infinity as float32"
        return None

    @property
    def largest(self) -> int:
        """The client whose episode takes most memory; there must be one."""
        return max(self.episodes, key=lambda client: self.episodes[client].num_bytes)

    def add(self, client: int, task: str, frame: Mapping[str, np.ndarray], num_bytes: int) -> None:
        """Continue the client's episode, or begin it, with a frame that fits."""
        for key, value in frame.items():
            self._shapes.setdefault(key, value.shape)
        episode = self.episodes.setdefault(client, _Episode(task))
        episode.frames.append(frame)
        episode.num_bytes += num_bytes
        self.num_bytes += num_bytes

    def take(self, client: int) -> _Episode | None:
        """The client's episode, which is not in memory any more."""
        episode = self.episodes.pop(client, None)
        if episode is not None:
            self.num_bytes -= episode.num_bytes
        return episode

    def write(self, episode: _Episode) -> None:
        """Save an episode that was taken; absent cameras are black."""
        if self.writer is None:
            self.writer = self._begin()
        columns: dict[str, list[np.ndarray]] = {
            key: [frame[key] for frame in episode.frames] for key in (STATE, ACTION)
        }
        for key in self._cameras:
            black = np.zeros(self._shapes[key], np.uint8)
            columns[key] = [frame.get(key, black) for frame in episode.frames]
        self.writer.add_episode(columns, episode.task)
        self.num_kept += len(episode.frames)

    def _begin(self) -> LeRobotWriter:
        """The writer of the shapes that are known now; from now on cameras that have sent nothing have one, too."""
        known = next(self._shapes[key] for key in self._cameras if key in self._shapes)
        shapes = dict.fromkeys(self._cameras, known) | self._shapes
        embodiment = self._embodiment
        rate = (embodiment.control_hz or 1) / (embodiment.execute_steps or self._horizon)
        writer = LeRobotWriter(
            self.path,
            fps=max(1, round(rate)),  # as if each client asked whenever it had executed what is recommended
            cameras={key.removeprefix(IMAGES): shapes[key] for key in self._cameras},
            state_names=embodiment.state_names[: shapes[STATE][0]],
            action_names=[f"{dim.name}@{step}" for step in range(self._horizon) for dim in embodiment.actions],
            robot_type=embodiment.name,
        )
        self._shapes = shapes
        return writer


def request_frame(embodiment: Embodiment, observation: Mapping[str, Any], actions: np.ndarray) -> dict[str, np.ndarray]:
    """One request as a data set's frame.

    Returns:
        by `camera_fields` uint8 [h, w, 3], nothing where an optional camera is absent; "observation.state" [s] in the
        robot's units and "action" [H·a], float32.
    """
    fields = camera_fields(embodiment)
    images = {
        fields[camera.key]: image
        for camera in embodiment.read_cameras
        if camera.key is not None and (image := camera_image(camera, observation)) is not None
    }
    state = np.concatenate([np.atleast_1d(value_at(observation, part.key)) for part in embodiment.state])
    with np.errstate(over="ignore"):  # infinity is a frame that does not fit
        return {
            **images,
            STATE: state.astype(np.float32),
            ACTION: actions.reshape(-1).astype(np.float32),
        }


def camera_fields(embodiment: Embodiment) -> dict[str, str]:
    """By key of each camera that the policy reads and the robot has: what it is called in a data set.

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


def camera_image(camera: Camera, observation: Mapping[str, Any]) -> np.ndarray | None:
    """uint8 [h, w, 3] of one camera in a request; None: it was not sent."""
    value = None if camera.key is None else value_at(observation, camera.key)
    if value is None:
        return None
    return to_uint8_hwc(value, layout=camera.layout, dtype=camera.dtype, camera=str(camera.name))

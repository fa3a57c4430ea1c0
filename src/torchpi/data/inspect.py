"""A look at a dataset: what is in it, what it seems to mean, and what is wrong with it. Nothing is changed.

Where training refuses a dataset, the reasons are collected here, and the rest is looked at all the same.
"""

import contextlib
import dataclasses
import math
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from torchpi.assets import assets
from torchpi.data import format as lerobot
from torchpi.data.clock import check_clock, check_tolerance
from torchpi.data.guesses import OTHER_UNIT, Guess, guess_command, guess_units, is_gripper, unit_of_action
from torchpi.data.idle import idle_frames
from torchpi.data.lerobot import LeRobotDataset
from torchpi.data.metadata import Metadata, open_metadata
from torchpi.data.pixels import is_depth_map
from torchpi.data.spans import VideoSpans
from torchpi.data.video import VideoPool
from torchpi.errors import TorchpiError, UnknownKeyError, counted

_TEXTS = tomllib.loads((assets() / "dataset.toml").read_text(encoding="utf-8"))
"""Messages by rule."""
_ANY_CLOCK = 1e9
"""A tolerance in seconds by which a dataset with a wrong clock is read; clock and videos are checked by themselves."""
_REASONS = 20
"""At most so many unreadable episodes are explained."""
_JUMP_OF_RANGE, _JUMP_OF_USUAL = 0.25, 5
"""A change from one frame to the next is a jump beyond this part of the range, and so many times the 90 % quantile of
changes: also a fast movement takes several frames."""
_PAIRS = 4
"""Frames of an episode that are compared with the next one."""
_REPEATED = 1 / 4
"""The part of them from which on a camera is said to be too slow."""
_MUCH_IDLE = 0.05
_Read = Callable[..., LeRobotDataset]
_SAME_LEVELS = 0.15
"""Mean difference of two images, of 255 levels, below which they are the same one; encoders' noise is less."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that is wrong, or that a person should look at, and how to go on."""

    subject: str
    text: str


@dataclasses.dataclass(frozen=True)
class Dimension:
    """A dimension of state or action over all frames that can be read."""

    name: str
    low: float
    q01: float
    q99: float
    high: float
    unit: Guess
    command: Guess | None = None
    """Of an action."""


@dataclasses.dataclass(frozen=True)
class Jump:
    """A sudden change from the frame before."""

    dimension: str
    episode: int
    frame: int
    before: float
    after: float


@dataclasses.dataclass(frozen=True)
class CameraFacts:
    """A camera, and some of its frames."""

    key: str
    shape: tuple[int, ...]
    """As meta/info.json states it."""
    kind: str
    """"image", "video", or either as depth."""
    video_fps: float | None
    """Of its first video file, by the times of its frames."""
    repeated: tuple[int, int]
    """Frames in motion that are the same image as the one before, and how many were looked at."""
    depths: tuple[float, float] | None
    """Of a depth camera the 2 % and the 98 % quantile of its pictures' depths, in metres."""
    pictures: Mapping[str, np.ndarray]
    """Frames by their place in the dataset, uint8 [h, w, 3], of a depth camera metres; not in documents."""


@dataclasses.dataclass(eq=False)
class Inspection:
    """The result of `inspect_dataset`."""

    path: str
    version: str
    robot_type: str | None
    fps: float | int
    lengths: tuple[int, ...]
    """Frames of each episode, as the metadata state them."""
    tasks: Mapping[str, int]
    """Episodes of each instruction."""
    problems: list[Problem] = dataclasses.field(default_factory=list)
    cameras: list[CameraFacts] = dataclasses.field(default_factory=list)
    dataset: LeRobotDataset | None = None
    """The episodes that can be read, without cameras; not in documents. The fields below are about these."""
    clock_fps: float | None = None
    """Frames per second by the timestamps."""
    state: list[Dimension] = dataclasses.field(default_factory=list)
    actions: list[Dimension] = dataclasses.field(default_factory=list)
    idle_share: float | None = None
    """Part of the frames that are idle, see `idle_frames`."""
    jumps: list[Jump] = dataclasses.field(default_factory=list)

    def note(self, rule: str, subject: str, **found: Any) -> None:
        self.problems.append(Problem(subject, _TEXTS[rule].format(**found)))

    @contextlib.contextmanager
    def noting(self, subject: str) -> Iterator[None]:
        """Note an error as a problem, once, and go on."""
        try:
            yield
        except (TorchpiError, OSError) as error:
            if (problem := Problem(subject, str(error))) not in self.problems:
                self.problems.append(problem)

    def to_dict(self) -> dict[str, Any]:
        document = dataclasses.asdict(dataclasses.replace(self, dataset=None))
        del document["dataset"]
        for camera in document["cameras"]:
            camera["pictures"] = list(camera["pictures"])
        return document | {"episodes": len(self.lengths), "frames": sum(self.lengths)}


def inspect_dataset(path: str | Path, *, rename: Mapping[str, str] | None = None, pictures: int = 4) -> Inspection:
    """Look at a dataset.

    Args:
        path: a folder, or hf://org/name[@revision], of which everything is downloaded.
        rename: other names for columns and cameras, see `LeRobotDataset`.
        pictures: frames per camera.
    """
    metadata = open_metadata(path, rename=rename)
    info, episodes, prompt = metadata.info, metadata.episodes, None if metadata.tasks else ""
    tasks = Counter(task for episode in episodes for task in episode.tasks).most_common()
    lengths = tuple(episode.length for episode in episodes)
    found = Inspection(str(path), info.codebase_version, info.robot_type, info.fps, lengths, dict(tasks))
    if not metadata.tasks:
        found.note("no_tasks", "tasks")
    read: _Read = partial(
        LeRobotDataset, path, action_horizon=1, columns=(), rename=rename, prompt=prompt, tolerance_s=_ANY_CLOCK
    )
    readable = _readable(found, partial(read, cameras=()), [episode.index for episode in episodes])
    if not readable:
        found.cameras = [_camera(found, metadata, key) for key in info.cameras]
        return found
    found.dataset = dataset = read(cameras=(), episodes=readable)
    indices = dataset.episode_indices
    with found.noting("clock"):
        known, tolerance_s = set(indices), check_tolerance(None, info.fps)
        chosen = [episode for episode in episodes if episode.index in known]
        check_clock(dataset.columns["timestamp"], chosen, fps=info.fps, tolerance_s=tolerance_s)
    shown = np.unique(np.linspace(0, len(indices) - 1, pictures).round().astype(int))
    read = partial(read, episodes=[indices[i] for i in shown])
    found.cameras = [_camera(found, metadata, key, read) for key in info.cameras]
    follows = np.diff(dataset.columns["episode_index"]) == 0  # [F - 1]: the next frame is of the same episode
    steps = np.diff(dataset.columns["timestamp"].astype(np.float64))[follows]
    found.clock_fps = float(1 / np.median(steps)) if len(steps) and np.median(steps) > 0 else None
    found.state, found.actions = (_dimensions(dataset, key, follows) for key in (lerobot.STATE, lerobot.ACTION))
    found.idle_share = float(idle_frames(dataset).mean())
    found.jumps = list(_jumps(found, dataset, follows))
    _check(found, metadata, dataset)
    return found


def _readable(found: Inspection, read: _Read, episodes: Sequence[int]) -> list[int]:
    """The episodes whose numbers can be read; of a group that can't be, each half is tried."""
    reasons: dict[str, list[int]] = {}

    def readable(group: Sequence[int]) -> list[int]:
        if sum(map(len, reasons.values())) > _REASONS:
            return []
        try:
            read(episodes=group)
        except UnknownKeyError as error:  # of the dataset, not of an episode
            found.problems.append(Problem("columns", str(error)))
            return []
        except (TorchpiError, OSError) as error:
            if len(group) == 1:
                reasons.setdefault(str(error), []).extend(group)
                return []
            middle = len(group) // 2
            return readable(group[:middle]) + readable(group[middle:])
        return list(group)

    indices = readable(episodes)
    found.problems += [Problem(f"episode {', '.join(map(str, group))}", text) for text, group in reasons.items()]
    return indices


def _camera(found: Inspection, metadata: Metadata, key: str, read: _Read | None = None) -> CameraFacts:
    """Check a camera's videos, and `read` it of some episodes; problems are noted."""
    feature, fps, pool = metadata.info.features[key], metadata.info.fps, VideoPool()
    video_fps, repeated, pictures = None, (0, 0), dict[str, np.ndarray]()
    with found.noting(key):
        spans = VideoSpans(metadata.episodes, metadata.episodes, [key], fps, None)
        for path in dict.fromkeys(each.videos[key].path for each in metadata.episodes if key in each.videos):
            with found.noting(key):
                times = pool.frame_times(path, fps)
                video_fps = video_fps or (float(1 / np.median(np.diff(times))) if len(times) > 1 else None)
                spans.check(path, partial(np.asarray, times))
    with found.noting(key):
        if read is not None:
            frames = read(cameras=[key])
            for index, rows in zip(frames.episode_indices, frames.episode_rows, strict=True):
                i = (rows.start + rows.stop) // 2
                pictures[f"episode {index}, frame {frames.columns['frame_index'][i]}"] = frames[i][key]
            repeated = _repeated(frames, key)
    depths = None
    if is_depth_map(feature) and pictures:
        metres = np.concatenate([image[np.isfinite(image) & (image > 0)] for image in pictures.values()])
        depths = tuple(np.quantile(metres, [0.02, 0.98]).tolist()) if metres.size else None
    kind = f"{feature['dtype']}{', depth' if is_depth_map(feature) else ''}"
    return CameraFacts(key, tuple(feature.get("shape") or ()), kind, video_fps, repeated, depths, pictures)


def _repeated(frames: LeRobotDataset, key: str) -> tuple[int, int]:
    """The frames in each episode's fastest motion that show the image before once more, and their number."""
    numbers = np.concatenate([frames.columns[lerobot.STATE], frames.columns[lerobot.ACTION]], axis=1)
    motion = np.abs(np.diff(numbers, axis=0))  # [F - 1, s + a]
    moved = (motion / np.maximum(motion.max(axis=0, initial=0), 1e-9)).sum(axis=1)
    moved[~np.isin(np.arange(1, len(frames)), frames.new_images)] = 0  # slow cameras, which the dataset states
    rows = ((rows.start, rows.stop - 1) for rows in frames.episode_rows)
    fastest = np.concatenate([start + np.argsort(moved[start:last])[-_PAIRS:] for start, last in rows])
    pairs = [(frames[i][key], frames[i + 1][key]) for i in fastest if moved[i] > 0]
    return sum(_are_same(*pair) for pair in pairs), len(pairs)


def _are_same(before: np.ndarray, after: np.ndarray) -> bool:
    if before.dtype != np.uint8:  # depth, which is stored exactly, or whose noise changes in any case
        return np.array_equal(before, after, equal_nan=True)
    return bool(np.abs(before.astype(np.float64) - after).mean() < _SAME_LEVELS)


def as_picture(image: np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    """A camera's frame as RGB: depths in grey, near to far."""
    if image.dtype == np.uint8:
        return image
    near, far = np.nanquantile(image, [0.02, 0.98])
    grey = np.clip((image - near) / max(far - near, 1e-9), 0, 1) * 255
    return np.repeat(np.nan_to_num(grey).astype(np.uint8).reshape(*image.shape[:2], 1), 3, axis=2)


def names_of(dataset: LeRobotDataset, column: str) -> tuple[str, ...]:
    """The dimensions' names of state or action; numbered ones where the dataset has none."""
    names = dataset.state_names if column == lerobot.STATE else dataset.action_names
    return names or tuple(f"{column.removeprefix('observation.')}_{i}" for i in range(dataset.columns[column].shape[1]))


def _dimensions(dataset: LeRobotDataset, column: str, follows: Bool[np.ndarray, " n"]) -> list[Dimension]:
    values, names, states = dataset.columns[column], names_of(dataset, column), names_of(dataset, lerobot.STATE)
    ranges = np.quantile(values, (0, 0.01, 0.99, 1), axis=0)  # [4, d]
    found = []
    for i, (name, unit) in enumerate(zip(names, guess_units(names, ranges[0], ranges[-1]), strict=True)):
        command = None
        if column == lerobot.ACTION:
            command = Guess("", "the state has no dimension of this name")
            if name in states or len(names) == len(states):
                state = dataset.columns[lerobot.STATE][:, states.index(name) if name in states else i]
                command = guess_command(values[:, i], state, np.flatnonzero(follows), dataset.fps)
            unit = unit_of_action(unit, command)
        low, q01, q99, high = ranges[:, i].tolist()
        found.append(Dimension(name, low, q01, q99, high, unit, command))
    return found


def _jumps(found: Inspection, dataset: LeRobotDataset, follows: Bool[np.ndarray, " n"]) -> Iterator[Jump]:
    for column, dimensions in ((lerobot.STATE, found.state), (lerobot.ACTION, found.actions)):
        for dimension, values in zip(dimensions, dataset.columns[column].T.astype(np.float64), strict=True):
            may_jump = dimension.command and dimension.command.value != "position"  # a controller's increments, speeds
            if may_jump or len(np.unique(values)) <= 8:  # a gripper that is open or closed
                continue
            change = np.abs(np.diff(values)) * follows
            limit = max(_JUMP_OF_RANGE * (dimension.q99 - dimension.q01), _JUMP_OF_USUAL * np.quantile(change, 0.9))
            for frame in np.flatnonzero(change > limit).tolist():
                place = (int(dataset.columns[name][frame + 1]) for name in ("episode_index", "frame_index"))
                yield Jump(f"{column} {dimension.name}", *place, *values[[frame, frame + 1]].tolist())


def _check(found: Inspection, metadata: Metadata, dataset: LeRobotDataset) -> None:
    for camera in found.cameras:
        repeated, looked_at = camera.repeated
        if repeated and repeated >= _REPEATED * looked_at:
            found.note("repeated", camera.key, repeated=repeated, looked_at=looked_at, fps=found.fps)
    for column, names, dimensions in (
        (lerobot.STATE, dataset.state_names, found.state),
        (lerobot.ACTION, dataset.action_names, found.actions),
    ):
        if not dimensions:
            found.note("none", column)
        elif names is None:
            found.note("unnamed", column)
        if twice := [name for name, count in Counter(names or ()).items() if count > 1]:
            found.note("named_twice", column, names=", ".join(twice))
        if still := [dim.name for dim in dimensions if dim.low == dim.high]:
            found.note("still", column, names=", ".join(still))
    other = [dim.name for dim in found.actions if dim.command and dim.command.reason == OTHER_UNIT]
    if joints := [name for name in other if not is_gripper(name)]:
        found.note("other_unit", lerobot.ACTION, names=", ".join(joints))
    for name, count in Counter(jump.dimension for jump in found.jumps).items():
        first = next(jump for jump in found.jumps if jump.dimension == name)
        is_turn = any(abs(abs(first.after - first.before) / turn - 1) < 0.05 for turn in (2 * math.pi, 360))
        found.note("turn" if is_turn else "jump", name, count=count, **vars(first))
    median = float(np.median(found.lengths))
    shortest = max(0.2 * median, 0.5 * found.fps)
    if short := [str(episode.index) for episode in metadata.episodes if episode.length < shortest]:
        found.note("short", "episodes", episodes=", ".join(short), frames=counted(round(median), "frame"))
    if found.idle_share and found.idle_share > _MUCH_IDLE:
        found.note("idle", "idle frames", idle=found.idle_share)

"""Inspection of a dataset: its contents, guesses of its units and commands, and its problems. Nothing is changed.

Reasons for which training would refuse the dataset are collected as problems, and the rest is inspected all the same.
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
"""Message templates by rule."""
_ANY_CLOCK = 1e9
"""Tolerance in seconds with which any timestamps can be read; clock and videos are checked separately."""
_MAX_REASONS = 20
"""Limit of the unreadable episodes that are explained."""
_JUMP_OF_RANGE, _JUMP_OF_USUAL = 0.25, 5
"""A change between consecutive frames is a jump if it exceeds both this fraction of the range and this multiple of the
90 % quantile of changes. Even a fast movement takes several frames."""
_PAIRS = 4
"""Number of pairs of consecutive frames that are compared per episode."""
_REPEATED = 1 / 4
"""Fraction of repeated images from which a camera is reported as too slow."""
_MUCH_IDLE = 0.05
_SAME_LEVELS = 0.15
"""Mean difference of two images, of 255 levels, below which they are the same image; encoder noise is less."""
_Read = Callable[..., LeRobotDataset]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem, or something that a person should check, with advice."""

    subject: str
    text: str


@dataclasses.dataclass(frozen=True)
class Dimension:
    """A dimension of state or action, over all readable frames."""

    name: str
    low: float
    q01: float
    q99: float
    high: float
    unit: Guess
    command: Guess | None = None
    """None for a dimension of the state."""


@dataclasses.dataclass(frozen=True)
class Jump:
    """A sudden change between two consecutive frames."""

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
    """Stated in meta/info.json."""
    kind: str
    """"image" or "video", followed by ", depth" for a depth camera."""
    video_fps: float | None
    """Frame rate of its first video file, measured from the frame times."""
    repeated: tuple[int, int]
    """Number of frames in motion that repeat the previous image, and number of frames compared."""
    depths: tuple[float, float] | None
    """2 % and 98 % quantiles of a depth camera's sampled frames, in metres."""
    pictures: Mapping[str, np.ndarray]
    """Sampled frames by position ("episode 3, frame 20"), uint8 [h, w, 3] or depth in metres; omitted in documents."""


@dataclasses.dataclass(eq=False)
class Inspection:
    """The result of `inspect_dataset`."""

    path: str
    version: str
    robot_type: str | None
    fps: float | int
    lengths: tuple[int, ...]
    """Number of frames per episode, from the metadata."""
    tasks: Mapping[str, int]
    """Number of episodes by instruction."""
    problems: list[Problem] = dataclasses.field(default_factory=list)
    cameras: list[CameraFacts] = dataclasses.field(default_factory=list)
    dataset: LeRobotDataset | None = None
    """Readable episodes, without cameras; omitted in documents. The fields below describe these."""
    clock_fps: float | None = None
    """Frames per second, measured from the timestamps."""
    state: list[Dimension] = dataclasses.field(default_factory=list)
    actions: list[Dimension] = dataclasses.field(default_factory=list)
    idle_share: float | None = None
    """Fraction of idle frames, see `idle_frames`."""
    jumps: list[Jump] = dataclasses.field(default_factory=list)

    def add_problem(self, rule: str, subject: str, **values: Any) -> None:
        self.problems.append(Problem(subject, _TEXTS[rule].format(**values)))

    @contextlib.contextmanager
    def collecting(self, subject: str) -> Iterator[None]:
        """Turn an error of the block into a problem, unless it is known already."""
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
    """Inspect a dataset.

    Args:
        path: a folder, or hf://org/name[@revision], which is downloaded completely.
        rename: new names for columns and cameras, see `LeRobotDataset`.
        pictures: number of sampled frames per camera.
    """
    metadata = open_metadata(path, rename=rename)
    info, episodes = metadata.info, metadata.episodes
    tasks = Counter(task for episode in episodes for task in episode.tasks).most_common()
    lengths = tuple(episode.length for episode in episodes)
    result = Inspection(str(path), info.codebase_version, info.robot_type, info.fps, lengths, dict(tasks))
    prompt = None if metadata.tasks else ""
    if not metadata.tasks:
        result.add_problem("no_tasks", "tasks")
    read: _Read = partial(
        LeRobotDataset, path, action_horizon=1, columns=(), rename=rename, prompt=prompt, tolerance_s=_ANY_CLOCK
    )
    readable = _readable_episodes(result, partial(read, cameras=()), [episode.index for episode in episodes])
    if not readable:
        result.cameras = [_inspect_camera(result, metadata, key) for key in info.cameras]
        return result
    result.dataset = dataset = read(cameras=(), episodes=readable)
    indices = dataset.episode_indices
    with result.collecting("clock"):
        read_episodes = [episode for episode in episodes if episode.index in set(indices)]
        tolerance_s = check_tolerance(None, info.fps)
        check_clock(dataset.columns["timestamp"], read_episodes, fps=info.fps, tolerance_s=tolerance_s)
    sampled = np.unique(np.linspace(0, len(indices) - 1, pictures).round().astype(int))
    read_sampled = partial(read, episodes=[indices[i] for i in sampled])
    result.cameras = [_inspect_camera(result, metadata, key, read_sampled) for key in info.cameras]
    has_next = np.diff(dataset.columns["episode_index"]) == 0  # [F - 1]: the next frame is of the same episode
    steps = np.diff(dataset.columns["timestamp"].astype(np.float64))[has_next]
    result.clock_fps = float(1 / np.median(steps)) if len(steps) and np.median(steps) > 0 else None
    result.state = _dimensions(dataset, lerobot.STATE, has_next)
    result.actions = _dimensions(dataset, lerobot.ACTION, has_next)
    result.idle_share = float(idle_frames(dataset).mean())
    result.jumps = list(_jumps(result, dataset, has_next))
    _add_problems(result, metadata, dataset)
    return result


def _readable_episodes(result: Inspection, read: _Read, episodes: Sequence[int]) -> list[int]:
    """The episodes whose numeric columns can be read. Groups that fail are bisected."""
    reasons: dict[str, list[int]] = {}

    def readable(group: Sequence[int]) -> list[int]:
        if sum(map(len, reasons.values())) > _MAX_REASONS:
            return []
        try:
            read(episodes=group)
        except UnknownKeyError as error:  # a problem of the whole dataset
            result.problems.append(Problem("columns", str(error)))
            return []
        except (TorchpiError, OSError) as error:
            if len(group) == 1:
                reasons.setdefault(str(error), []).extend(group)
                return []
            middle = len(group) // 2
            return readable(group[:middle]) + readable(group[middle:])
        return list(group)

    indices = readable(episodes)
    result.problems += [Problem(f"episode {', '.join(map(str, group))}", text) for text, group in reasons.items()]
    return indices


def _inspect_camera(result: Inspection, metadata: Metadata, key: str, read: _Read | None = None) -> CameraFacts:
    """Check a camera's videos and sample its frames with `read`. Problems are added to the result."""
    feature, fps, pool = metadata.info.features[key], metadata.info.fps, VideoPool()
    video_fps, repeated, pictures = None, (0, 0), dict[str, np.ndarray]()
    with result.collecting(key):
        spans = VideoSpans(metadata.episodes, metadata.episodes, [key], fps, None)
        for path in dict.fromkeys(each.videos[key].path for each in metadata.episodes if key in each.videos):
            with result.collecting(key):
                times = pool.frame_times(path, fps)
                video_fps = video_fps or (float(1 / np.median(np.diff(times))) if len(times) > 1 else None)
                spans.check(path, partial(np.asarray, times))
    with result.collecting(key):
        if read is not None:
            frames = read(cameras=[key])
            for index, rows in zip(frames.episode_indices, frames.episode_rows, strict=True):
                middle = (rows.start + rows.stop) // 2
                position = f"episode {index}, frame {frames.columns['frame_index'][middle]}"
                pictures[position] = frames[middle][key]
            repeated = _count_repeated(frames, key)
    kind, depths = feature["dtype"], None
    if is_depth_map(feature):
        kind = f"{kind}, depth"
        if pictures:
            metres = np.concatenate([image[np.isfinite(image) & (image > 0)] for image in pictures.values()])
            depths = tuple(np.quantile(metres, [0.02, 0.98]).tolist()) if metres.size else None
    return CameraFacts(key, tuple(feature.get("shape") or ()), kind, video_fps, repeated, depths, pictures)


def _count_repeated(frames: LeRobotDataset, key: str) -> tuple[int, int]:
    """Compare consecutive images where each episode moves fastest: number of equal pairs, and of pairs compared."""
    numbers = np.concatenate([frames.columns[lerobot.STATE], frames.columns[lerobot.ACTION]], axis=1)
    change = np.abs(np.diff(numbers, axis=0))  # [F - 1, s + a]
    motion = (change / np.maximum(change.max(axis=0, initial=0), 1e-9)).sum(axis=1)
    motion[~np.isin(np.arange(1, len(frames)), frames.new_images)] = 0  # repetitions that the dataset states
    pairs = []
    for rows in frames.episode_rows:
        fastest = rows.start + np.argsort(motion[rows.start : rows.stop - 1])[-_PAIRS:]
        pairs += [(frames[i][key], frames[i + 1][key]) for i in fastest if motion[i] > 0]
    return sum(_are_same(*pair) for pair in pairs), len(pairs)


def _are_same(before: np.ndarray, after: np.ndarray) -> bool:
    if before.dtype != np.uint8:  # depth: stored exactly, or with noise that changes in every frame
        return np.array_equal(before, after, equal_nan=True)
    return bool(np.abs(before.astype(np.float64) - after).mean() < _SAME_LEVELS)


def as_picture(image: np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    """Convert a camera's frame to RGB; depths become grey levels."""
    if image.dtype == np.uint8:
        return image
    near, far = np.nanquantile(image, [0.02, 0.98])
    grey = np.clip((image - near) / max(far - near, 1e-9), 0, 1) * 255
    return np.repeat(np.nan_to_num(grey).astype(np.uint8).reshape(*image.shape[:2], 1), 3, axis=2)


def names_of(dataset: LeRobotDataset, column: str) -> tuple[str, ...]:
    """Names of the dimensions of state or action; numbered names if the dataset has none."""
    names = dataset.state_names if column == lerobot.STATE else dataset.action_names
    return names or tuple(f"{column.removeprefix('observation.')}_{i}" for i in range(dataset.columns[column].shape[1]))


def _dimensions(dataset: LeRobotDataset, column: str, has_next: Bool[np.ndarray, " n"]) -> list[Dimension]:
    values, names, state_names = dataset.columns[column], names_of(dataset, column), names_of(dataset, lerobot.STATE)
    ranges = np.quantile(values, (0, 0.01, 0.99, 1), axis=0)  # [4, d]
    units = guess_units(names, ranges[0], ranges[-1])
    dimensions = []
    for i, (name, unit) in enumerate(zip(names, units, strict=True)):
        command = None
        if column == lerobot.ACTION:
            command = Guess("", "the state has no dimension of this name")
            if name in state_names or len(names) == len(state_names):
                state = dataset.columns[lerobot.STATE][:, state_names.index(name) if name in state_names else i]
                command = guess_command(values[:, i], state, np.flatnonzero(has_next), dataset.fps)
            unit = unit_of_action(unit, command)
        low, q01, q99, high = ranges[:, i].tolist()
        dimensions.append(Dimension(name, low, q01, q99, high, unit, command))
    return dimensions


def _jumps(result: Inspection, dataset: LeRobotDataset, has_next: Bool[np.ndarray, " n"]) -> Iterator[Jump]:
    for column, dimensions in ((lerobot.STATE, result.state), (lerobot.ACTION, result.actions)):
        for dimension, values in zip(dimensions, dataset.columns[column].T.astype(np.float64), strict=True):
            may_jump = dimension.command and dimension.command.value != "position"  # increments and velocities
            if may_jump or len(np.unique(values)) <= 8:  # an open-or-closed gripper
                continue
            change = np.abs(np.diff(values)) * has_next
            limit = max(_JUMP_OF_RANGE * (dimension.q99 - dimension.q01), _JUMP_OF_USUAL * np.quantile(change, 0.9))
            for i in np.flatnonzero(change > limit).tolist():
                episode, frame = (int(dataset.columns[name][i + 1]) for name in ("episode_index", "frame_index"))
                yield Jump(f"{column} {dimension.name}", episode, frame, float(values[i]), float(values[i + 1]))


def _add_problems(result: Inspection, metadata: Metadata, dataset: LeRobotDataset) -> None:
    for camera in result.cameras:
        repeated, compared = camera.repeated
        if repeated and repeated >= _REPEATED * compared:
            result.add_problem("repeated", camera.key, repeated=repeated, compared=compared, fps=result.fps)
    for column, names, dimensions in (
        (lerobot.STATE, dataset.state_names, result.state),
        (lerobot.ACTION, dataset.action_names, result.actions),
    ):
        if not dimensions:
            result.add_problem("none", column)
        elif names is None:
            result.add_problem("unnamed", column)
        if twice := [name for name, count in Counter(names or ()).items() if count > 1]:
            result.add_problem("named_twice", column, names=", ".join(twice))
        if still := [dim.name for dim in dimensions if dim.low == dim.high]:
            result.add_problem("still", column, names=", ".join(still))
    other_unit = [dim.name for dim in result.actions if dim.command and dim.command.reason == OTHER_UNIT]
    if joints := [name for name in other_unit if not is_gripper(name)]:
        result.add_problem("other_unit", lerobot.ACTION, names=", ".join(joints))
    for name, count in Counter(jump.dimension for jump in result.jumps).items():
        first = next(jump for jump in result.jumps if jump.dimension == name)
        is_turn = any(abs(abs(first.after - first.before) / turn - 1) < 0.05 for turn in (2 * math.pi, 360))
        result.add_problem("turn" if is_turn else "jump", name, count=count, **vars(first))
    median = float(np.median(result.lengths))
    shortest = max(0.2 * median, 0.5 * result.fps)
    if short := [str(episode.index) for episode in metadata.episodes if episode.length < shortest]:
        result.add_problem("short", "episodes", episodes=", ".join(short), frames=counted(round(median), "frame"))
    if result.idle_share and result.idle_share > _MUCH_IDLE:
        result.add_problem("idle", "idle frames", idle=result.idle_share)

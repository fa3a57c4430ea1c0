"""A look at a dataset: what is in it, what it seems to mean, and what is wrong with it. Nothing is changed.

Where training refuses a dataset, the reasons are collected here, and the rest is looked at all the same.
"""

import contextlib
import dataclasses
import math
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from torchpi.assets import assets
from torchpi.data import format as lerobot
from torchpi.data.clock import check_clock, check_tolerance
from torchpi.data.guesses import Guess, guess_command, guess_units, unit_of_action
from torchpi.data.idle import idle_frames
from torchpi.data.lerobot import LeRobotDataset
from torchpi.data.metadata import Metadata, open_metadata
from torchpi.data.pixels import is_depth_map
from torchpi.data.spans import VideoSpans
from torchpi.data.video import VideoPool
from torchpi.errors import DatasetError, TorchpiError, UnknownKeyError

_TEXTS = tomllib.loads((assets() / "dataset.toml").read_text(encoding="utf-8"))
"""Messages by rule."""
_ANY_CLOCK = 1e9
"""A tolerance in seconds by which the numbers of a dataset with a wrong clock are read."""
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
_SAME_LEVELS = 0.15
"""Mean difference of two images, of 255 levels, below which they are the same one; encoders' noise is less."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that is wrong, or that a person should look at."""

    subject: str
    text: str
    """The finding, and how to go on."""


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
    pictures: Mapping[str, np.ndarray]
    """Frames by their place in the dataset, uint8 [h, w, 3], of a depth camera metres; not in documents."""

    @property
    def depths(self) -> tuple[float, float] | None:
        """Of a depth camera the 2 % and the 98 % quantile of its pictures' depths, in metres."""
        found = [image[np.isfinite(image) & (image > 0)] for image in self.pictures.values() if image.dtype != np.uint8]
        measured = np.concatenate(found) if found else np.zeros(0)
        return (float(np.quantile(measured, 0.02)), float(np.quantile(measured, 0.98))) if measured.size else None


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The result of `inspect_dataset`."""

    path: str
    version: str
    robot_type: str | None
    fps: float | int
    clock_fps: float | None
    """Frames per second by the timestamps."""
    lengths: tuple[int, ...]
    """Frames of each episode, as the metadata state them."""
    tasks: Mapping[str, int]
    """Episodes of each instruction."""
    cameras: tuple[CameraFacts, ...]
    state: tuple[Dimension, ...]
    actions: tuple[Dimension, ...]
    idle_share: float | None
    """Part of the frames that are idle, see `idle_frames`."""
    jumps: tuple[Jump, ...]
    problems: tuple[Problem, ...]
    dataset: LeRobotDataset | None
    """The episodes that can be read, without cameras; not in documents."""

    def to_dict(self) -> dict[str, Any]:
        """JSON document."""
        cameras = [
            {**vars(camera), "depths": camera.depths, "pictures": list(camera.pictures)} for camera in self.cameras
        ]
        document = dataclasses.asdict(dataclasses.replace(self, cameras=(), dataset=None))
        del document["dataset"]
        return document | {"episodes": len(self.lengths), "frames": sum(self.lengths), "cameras": cameras}


def inspect_dataset(path: str | Path, *, rename: Mapping[str, str] | None = None, pictures: int = 4) -> Inspection:
    """Look at a dataset.

    Args:
        path: a folder, or hf://org/name[@revision], of which everything is downloaded.
        rename: other names for columns and cameras, see `LeRobotDataset`.
        pictures: frames per camera.

    Raises:
        ValueError, FileNotFoundError, KeyError: it is no dataset, or its metadata can't be read at all.
    """
    look = _Look(path, rename)
    look.find_readable()
    cameras = list(look.cameras(pictures))
    state: tuple[Dimension, ...] = ()
    actions: tuple[Dimension, ...] = ()
    jumps: list[Jump] = []
    idle = None
    if (dataset := look.dataset) is not None:
        state, actions = _dimensions(dataset, lerobot.STATE), _dimensions(dataset, lerobot.ACTION)
        jumps, idle = list(_jumps(dataset, state, actions)), float(idle_frames(dataset).mean())
        look.problems += _problems(look.metadata, dataset, cameras, jumps, idle)
    tasks = Counter(task for episode in look.metadata.episodes for task in episode.tasks)
    info = look.metadata.info
    return Inspection(
        path=str(path),
        version=info.codebase_version,
        robot_type=info.robot_type,
        fps=info.fps,
        clock_fps=None if dataset is None else _clock_fps(dataset),
        lengths=tuple(episode.length for episode in look.metadata.episodes),
        tasks=dict(tasks.most_common()),
        cameras=tuple(cameras),
        state=state,
        actions=actions,
        idle_share=idle,
        jumps=tuple(jumps),
        problems=tuple(look.problems),
        dataset=dataset,
    )


class _Look:
    """A dataset, opened piece by piece, and the errors on the way."""

    def __init__(self, path: str | Path, rename: Mapping[str, str] | None) -> None:
        self._path, self._rename = path, rename
        self.metadata = open_metadata(path, rename=rename)
        self.problems: list[Problem] = []
        self.dataset: LeRobotDataset | None = None
        """The episodes that can be read, without cameras."""
        self._tolerance_s: float | None = None

    def find_readable(self) -> None:
        """Open the episodes whose numbers can be read, and check their clock."""
        if not self.metadata.tasks:
            self.problems.append(_problem("no_tasks", "tasks"))
        reasons: dict[str, list[int]] = {}
        readable = list(self._readable([episode.index for episode in self.metadata.episodes], reasons))
        for text, episodes in reasons.items():
            self.problems.append(Problem(f"episode {', '.join(map(str, episodes))}", text))
        if not readable:
            return
        self.dataset = self._open(readable, tolerance_s=_ANY_CLOCK)
        self._check_clock(self.dataset)

    def cameras(self, pictures: int) -> Iterator[CameraFacts]:
        """The cameras, each with its problems noted and some pictures, if it can be read."""
        pool, fps = VideoPool(), self.metadata.info.fps
        for key, feature in self.metadata.info.features.items():
            if key not in self.metadata.info.cameras:
                continue
            spans = [episode.videos[key] for episode in self.metadata.episodes if key in episode.videos]
            rate = None
            with self._noting(key):
                checked = VideoSpans(self.metadata.episodes, self.metadata.episodes, [key], fps, None)
                for path in dict.fromkeys(span.path for span in spans):
                    with self._noting(key):
                        times = pool.frame_times(path, fps)
                        rate = rate or (float(1 / np.median(np.diff(times))) if len(times) > 1 else None)
                        checked.check(path, partial(np.asarray, times))
            found: dict[str, np.ndarray] = {}
            repeated = (0, 0)
            if self.dataset is not None:
                with self._noting(key):
                    found, repeated = self._pictures(self.dataset.episode_indices, key, pictures)
            kind = f"{feature['dtype']}, depth" if is_depth_map(feature) else feature["dtype"]
            yield CameraFacts(key, tuple(feature.get("shape") or ()), kind, rate, repeated, found)

    def _check_clock(self, dataset: LeRobotDataset) -> None:
        """Note the episodes whose timestamps don't fit the frames per second."""
        errors, end, by_index = [], 0, {episode.index: episode for episode in self.metadata.episodes}
        tolerance_s = check_tolerance(None, dataset.fps)
        for index, length in zip(dataset.episode_indices, dataset.episode_lengths, strict=True):
            start, end = end, end + length
            timestamps = dataset.columns["timestamp"][start:end]
            try:
                check_clock(timestamps, [by_index[index]], fps=dataset.fps, tolerance_s=tolerance_s)
            except DatasetError as error:
                errors.append(error)
        if errors:
            of = len(dataset.episode_indices)
            self.problems.append(_problem("clock", "clock", first=errors[0], count=len(errors), of=of))
            self._tolerance_s = _ANY_CLOCK  # for the pictures

    def _open(
        self, episodes: Sequence[int], cameras: Sequence[str] = (), tolerance_s: float | None = None
    ) -> LeRobotDataset:
        return LeRobotDataset(
            self._path,
            action_horizon=1,
            episodes=episodes,
            cameras=cameras,
            columns=(),
            rename=self._rename,
            prompt=None if self.metadata.tasks else "",
            tolerance_s=tolerance_s or self._tolerance_s,
        )

    @contextlib.contextmanager
    def _noting(self, subject: str) -> Iterator[None]:
        """Note an error as a problem, and go on."""
        try:
            yield
        except (TorchpiError, OSError) as error:
            if (problem := Problem(subject, str(error))) not in self.problems:
                self.problems.append(problem)

    def _readable(self, episodes: Sequence[int], reasons: dict[str, list[int]]) -> Iterator[int]:
        """The episodes that can be read, of the others the reasons; where one can't be, each half of them is tried."""
        if sum(map(len, reasons.values())) > _REASONS:
            return
        try:
            self._open(episodes, tolerance_s=_ANY_CLOCK)
        except UnknownKeyError as error:  # of the dataset, not of an episode
            self.problems.append(Problem("columns", str(error)))
        except (TorchpiError, OSError) as error:
            if len(episodes) == 1:
                reasons.setdefault(str(error), []).extend(episodes)
                return
            middle = len(episodes) // 2
            yield from self._readable(episodes[:middle], reasons)
            yield from self._readable(episodes[middle:], reasons)
        else:
            yield from episodes

    def _pictures(self, indices: Sequence[int], key: str, count: int) -> tuple[dict[str, np.ndarray], tuple[int, int]]:
        """A picture of the middle of some episodes, by its place; and how many frames of them are repeated."""
        places = np.unique(np.linspace(0, len(indices) - 1, count).round().astype(int)).tolist()
        frames = self._open([indices[place] for place in places], [key])
        middles = np.cumsum(frames.episode_lengths) - (np.array(frames.episode_lengths) + 1) // 2
        pictures = {
            f"episode {index}, frame {frames.columns['frame_index'][i]}": frames[i][key]
            for index, i in zip(frames.episode_indices, middles.tolist(), strict=True)
        }
        return pictures, _repeated(frames, key)


def _repeated(frames: LeRobotDataset, key: str) -> tuple[int, int]:
    """The frames around each episode's fastest motion that show the image before once more, and their number."""
    numbers = np.concatenate([frames.columns[lerobot.STATE], frames.columns[lerobot.ACTION]], axis=1)
    motion = np.abs(np.diff(numbers, axis=0))  # [F - 1, s + a]
    moved = (motion / np.maximum(motion.max(axis=0, initial=0), 1e-9)).sum(axis=1) * _same_episode(frames)
    looked_at, end = list[int](), 0
    for length in frames.episode_lengths:
        start, end = end, end + length
        fastest = start + int(np.argmax(moved[start : end - 1])) if length > 1 else start
        around = range(max(start, fastest - _PAIRS // 2), min(end - 1, fastest + _PAIRS // 2))
        looked_at += [i for i in around if moved[i] > 0]
    pairs = [(as_picture(frames[i][key]), as_picture(frames[i + 1][key])) for i in looked_at]
    changes = [np.abs(before.astype(np.float64) - after).mean() for before, after in pairs]
    return sum(bool(change < _SAME_LEVELS) for change in changes), len(changes)


def _dimensions(dataset: LeRobotDataset, column: str) -> tuple[Dimension, ...]:
    values = dataset.columns[column]  # [F, d]
    names = names_of(dataset, column)
    low, q01, q99, high = (np.quantile(values, q, axis=0) for q in (0, 0.01, 0.99, 1))
    units = guess_units(names, low, high)
    commands: Sequence[Guess | None] = [None] * len(names)
    if column == lerobot.ACTION:
        commands = guesses = list(_commands(dataset, names))
        units = [unit_of_action(unit, command) for unit, command in zip(units, guesses, strict=True)]
    ranges = (values.tolist() for values in (low, q01, q99, high))
    return tuple(Dimension(*row) for row in zip(names, *ranges, units, commands, strict=True))


def _commands(dataset: LeRobotDataset, names: Sequence[str]) -> Iterator[Guess]:
    state, action = dataset.columns[lerobot.STATE], dataset.columns[lerobot.ACTION]
    state_names = names_of(dataset, lerobot.STATE)
    inside = np.flatnonzero(_same_episode(dataset))
    for i, name in enumerate(names):
        same = state_names.index(name) if name in state_names else i if len(names) == len(state_names) else None
        if same is None:
            yield Guess("", "the state has no dimension of this name", False)
        else:
            yield guess_command(action[:, i], state[:, same], inside, dataset.fps)


def names_of(dataset: LeRobotDataset, column: str) -> tuple[str, ...]:
    """The dimensions' names of state or action; numbered ones where the dataset has none."""
    names = dataset.state_names if column == lerobot.STATE else dataset.action_names
    return names or tuple(f"{column.removeprefix('observation.')}_{i}" for i in range(dataset.columns[column].shape[1]))


def _same_episode(dataset: LeRobotDataset) -> Bool[np.ndarray, " n"]:
    """True for each frame whose next one belongs to the same episode."""
    return np.diff(dataset.columns["episode_index"]) == 0


def _jumps(dataset: LeRobotDataset, *columns: Sequence[Dimension]) -> Iterator[Jump]:
    inside = _same_episode(dataset)
    for column, dimensions in zip((lerobot.STATE, lerobot.ACTION), columns, strict=True):
        for i, dimension in enumerate(dimensions):
            values = dataset.columns[column][:, i].astype(np.float64)
            change = np.abs(np.diff(values)) * inside
            if not len(change) or (dimension.command and dimension.command.value != "position"):
                continue  # a controller's increments, velocities and efforts may change at once
            limit = max(_JUMP_OF_RANGE * (dimension.q99 - dimension.q01), _JUMP_OF_USUAL * np.quantile(change, 0.9))
            if len(np.unique(values)) <= 8:  # a gripper that is open or closed
                continue
            for frame in np.flatnonzero(change > limit).tolist():
                place = int(dataset.columns["episode_index"][frame + 1]), int(dataset.columns["frame_index"][frame + 1])
                yield Jump(f"{column} {dimension.name}", *place, float(values[frame]), float(values[frame + 1]))


def _clock_fps(dataset: LeRobotDataset) -> float | None:
    """Frames per second by the timestamps."""
    steps = np.diff(dataset.columns["timestamp"].astype(np.float64).ravel())[_same_episode(dataset)]
    step = float(np.median(steps)) if len(steps) else 0.0
    return 1 / step if step > 0 else None


def as_picture(image: np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    """A camera's frame as RGB: depths in grey, near to far."""
    if image.dtype == np.uint8:
        return image
    near, far = np.nanquantile(image, [0.02, 0.98])
    grey = np.clip((image - near) / max(far - near, 1e-9), 0, 1) * 255
    return np.repeat(np.nan_to_num(grey).astype(np.uint8).reshape(*image.shape[:2], 1), 3, axis=2)


def _problems(
    metadata: Metadata, dataset: LeRobotDataset, cameras: Sequence[CameraFacts], jumps: Sequence[Jump], idle: float
) -> Iterator[Problem]:
    for camera in cameras:
        repeated, looked_at = camera.repeated
        if repeated and repeated >= _REPEATED * looked_at:
            yield _problem("repeated", camera.key, repeated=repeated, looked_at=looked_at, fps=dataset.fps)
    for column, names in ((lerobot.STATE, dataset.state_names), (lerobot.ACTION, dataset.action_names)):
        moves = np.ptp(dataset.columns[column], axis=0) > 0  # [d]
        if not len(moves):
            yield _problem("none", column)
        elif names is None:
            yield _problem("unnamed", column)
        if twice := [name for name, count in Counter(names or ()).items() if count > 1]:
            yield _problem("named_twice", column, names=", ".join(twice))
        if still := [name for name, moved in zip(names_of(dataset, column), moves, strict=True) if not moved]:
            yield _problem("still", column, names=", ".join(still))
    for name, count in Counter(jump.dimension for jump in jumps).items():
        first = next(jump for jump in jumps if jump.dimension == name)
        is_turn = any(abs(abs(first.after - first.before) / turn - 1) < 0.05 for turn in (2 * math.pi, 360))
        yield _problem("turn" if is_turn else "jump", name, count=count, **vars(first))
    lengths = {episode.index: episode.length for episode in metadata.episodes}
    median = float(np.median(list(lengths.values())))
    if short := [index for index, length in lengths.items() if length < max(0.2 * median, 0.5 * dataset.fps)]:
        yield _problem("short", "episodes", episodes=", ".join(map(str, short)), median=median)
    if idle > _MUCH_IDLE:
        yield _problem("idle", "idle frames", idle=idle)


def _problem(rule: str, subject: str, **found: Any) -> Problem:
    return Problem(subject, _TEXTS[rule].format(**found))

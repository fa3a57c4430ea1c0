"""Videos of episodes: camera views, the hands' executed and predicted paths, and the actions."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from torchpi.atomic import atomic_file
from torchpi.data.video import encode_video, find_encoder
from torchpi.extras import require
from torchpi.robots import Embodiment
from torchpi.sim.environment import Environment, ShowsHands
from torchpi.sim.rollout import Callback, RolloutStep, camera_keys
from torchpi.ui.palette import PALETTE

VIEW, SINGLE_VIEW = 240, 360
"""Height of a camera view in pixels: one of several views, and a single view."""
EVERY = 2
"""Steps per frame."""
FPS = 20
_HOLD = FPS  # number of times that the last frame is shown: one second
_ENCODERS = ("libx264", "libopenh264", "libsvtav1")  # in order of preference

_CAPTION, _ROW, _LEGEND, _GAP, _LABEL, _MARGIN = 30, 24, 16, 4, 92, 8
_PLOT = _ROW - 4
_PAST, _FUTURE = 64, 20  # steps shown to the left and right of the current one
_TRAIL = 100  # steps of the executed path that are shown
_SMOOTH = 3  # scale at which lines are drawn, before they are reduced to smooth them


def _color(name: str) -> tuple[int, ...]:
    return ImageColor.getrgb(PALETTE[name][1])  # for a dark background


BACKGROUND, PANEL, TEXT, FAINT, LINE = map(_color, ("paper", "panel", "ink", "faint", "line"))
EXECUTED, PREDICTED, SUCCESS, FAILURE = map(_color, ("prefix", "suffix", "vision", "time"))


@contextlib.contextmanager
def record_video(
    path: str | pathlib.Path | None, environment: Environment, instruction: str
) -> Iterator[Callback | None]:
    """Yield a callback for `run_episode` that records a video, and write the file when the block ends without an error.

    Args:
        path: the .mp4 file to write; None: no video, and no callback.
        environment: the episode's environment. If it `ShowsHands`, the hands' paths are drawn.
        instruction: the policy's prompt, for the caption.
    """
    if path is None:
        yield None
        return
    encoder = find_encoder(_ENCODERS)
    options = {"crf": "20", "preset": "medium"} if encoder == "libx264" else {}
    recorder = _Recorder(environment, instruction)
    yield recorder
    path = pathlib.Path(path)
    with atomic_file(path) as part:
        encode_video(part, recorder.frames(), fps=FPS, encoder=encoder, options=options, threads=1, fast_start=True)


def is_whole_video(path: str | pathlib.Path) -> bool:
    """True for a complete video; False for a missing, truncated or empty file."""
    av = require("av", "data")
    try:
        with av.open(str(path)) as container:
            return sum(packet.size > 0 for packet in container.demux(video=0)) == container.streams.video[0].frames
    except (av.FFmpegError, IndexError):
        return False


@dataclasses.dataclass(frozen=True)
class _Snapshot:
    """A step with the views to draw."""

    step: RolloutStep
    views: dict[str, np.ndarray]
    overlay: tuple[str, np.ndarray, np.ndarray] | None
    """Name of the view that shows the hands, and their executed [n, t, 2] and predicted [n, H, 2] paths in pixels."""


class _Recorder:
    """Records an episode, and draws it at the end, when the ranges of its plots are known."""

    def __init__(self, environment: Environment, instruction: str) -> None:
        self._environment, self._instruction = environment, instruction
        self._hands = environment if isinstance(environment, ShowsHands) else None
        self._size = VIEW if len(camera_keys(environment.embodiment)) > 1 else SINGLE_VIEW
        self._steps: list[RolloutStep] = []
        self._snapshots: list[_Snapshot] = []
        self._path: list[np.ndarray] = []  # positions of the hands, [n, 3] each
        self._predicted = np.zeros((0, 0, 3))

    def __call__(self, step: RolloutStep) -> None:
        self._steps.append(step)
        if self._hands:
            if step.executed == 0:
                self._predicted = self._hands.hands_after(step.chunk)
            if step.executed or step.step == 0:
                self._path.append(self._hands.hands())
        # Only the first new chunk makes a frame.
        if step.step == 0 or (step.executed and (step.step % EVERY == 0 or step.last)):
            self._snapshots.append(_Snapshot(step, self._environment.render(self._size), self._overlay()))

    def _overlay(self) -> tuple[str, np.ndarray, np.ndarray] | None:
        if not self._hands:
            return None
        view, paths = "", []
        for path in (np.stack(self._path[-_TRAIL:]), self._predicted):
            view, pixels = self._hands.project(path.reshape(-1, 3), self._size)
            paths.append(pixels.reshape(*path.shape[:2], 2).swapaxes(0, 1))
        return view, paths[0], paths[1]

    def frames(self) -> Iterator[np.ndarray]:
        """The frames of the video, uint8 [h, w, 3] each."""
        width = _even(sum(view.shape[1] + _GAP for view in self._snapshots[0].views.values()) + _GAP)
        plots = _ActionPlots(self._environment.embodiment, self._steps, width)
        for snapshot in self._snapshots:
            frame = self._frame(snapshot, plots, width)
            for _ in range(_HOLD if snapshot.step.last else 1):
                yield frame

    def _frame(self, snapshot: _Snapshot, plots: "_ActionPlots", width: int) -> np.ndarray:
        canvas = Image.new("RGB", (width, _even(_CAPTION + self._size + plots.height)), BACKGROUND)
        left = _GAP
        for name, view in snapshot.views.items():
            image = Image.fromarray(view)
            if snapshot.overlay and snapshot.overlay[0] == name:
                _draw_paths(image, *snapshot.overlay[1:])
            ImageDraw.Draw(image).text((6, 4), name, TEXT, font=_font(11), stroke_width=1, stroke_fill=BACKGROUND)
            canvas.paste(image, (left, _CAPTION))
            left += image.width + _GAP
        self._draw_caption(ImageDraw.Draw(canvas), snapshot.step, width)
        plots.draw(canvas, _CAPTION + self._size, snapshot.step.step)
        return np.asarray(canvas)

    def _draw_caption(self, draw: ImageDraw.ImageDraw, step: RolloutStep, width: int) -> None:
        hz = self._environment.embodiment.control_hz
        speed = f"  {EVERY * FPS / hz:.2g}× speed" if hz else ""
        right, color = f"step {step.step}{speed}", FAINT
        if step.last:
            right = f"{'✓ success' if step.success else '✗ not done'}  step {step.step}"
            color = SUCCESS if step.success else FAILURE
            frame = (0, _CAPTION - _GAP, width - 1, _CAPTION + self._size + _GAP - 1)
            draw.rectangle(frame, outline=color, width=_GAP)
        draw.text((width - _MARGIN, _CAPTION / 2 - 2), right, color, font=_font(12), anchor="rm")
        room = width - 3 * _MARGIN - draw.textlength(right, font=_font(12))
        text, font = self._instruction, _font(14, bold=True)
        while draw.textlength(text, font=font) > room and len(text) > 1:
            text = f"{text[:-2]}…"
        draw.text((_MARGIN, _CAPTION / 2 - 2), text, TEXT, font=font, anchor="lm")


class _ActionPlots:
    """A row per dimension of the actions, with the executed actions and the current chunk."""

    def __init__(self, robot: Embodiment, steps: Sequence[RolloutStep], width: int) -> None:
        self._names = robot.action_names
        self._chunks = [(step.step, step.chunk) for step in steps if not step.executed]
        self._actions = np.stack([step.chunk[step.executed - 1] for step in steps if step.executed])
        predicted = np.concatenate([chunk for _, chunk in self._chunks])
        self._low, self._high = predicted.min(axis=0), predicted.max(axis=0)
        columns = 1 if len(self._names) <= 7 else 2
        self._rows, self._column = -(-len(self._names) // columns), (width - _MARGIN) // columns
        self.height = self._rows * _ROW + _LEGEND + 2 * _MARGIN

    def draw(self, canvas: Image.Image, top: int, now: int) -> None:
        start, chunk = next(entry for entry in reversed(self._chunks) if entry[0] <= max(0, now - 1))
        draw, width = ImageDraw.Draw(canvas), self._column - _LABEL - _MARGIN
        for i, name in enumerate(self._names):
            column, row = divmod(i, self._rows)
            left, y = _MARGIN + column * self._column, top + _MARGIN + row * _ROW
            draw.text((left, y + _ROW / 2), name, FAINT, font=_font(10), anchor="lm")
            executed = self._pixels(i, np.arange(now), self._actions[:now, i], now, width)
            predicted = self._pixels(i, start + np.arange(len(chunk)), chunk[:, i], now, width)
            plot = Image.new("RGB", (width * _SMOOTH, _PLOT * _SMOOTH), PANEL)
            large, middle = ImageDraw.Draw(plot), _PAST / (_PAST + _FUTURE) * width
            _line(large, np.array([(middle, 0), (middle, _PLOT)]), LINE, 1)
            _line(large, executed, EXECUTED, 1.5)
            _dots(large, predicted, PREDICTED, 1.2)
            canvas.paste(plot.resize((width, _PLOT), Image.Resampling.BOX), (left + _LABEL, y + 2))
        x, y = _MARGIN + _LABEL, top + _MARGIN + self._rows * _ROW + _LEGEND // 2
        for text, color in (("executed", EXECUTED), ("predicted: the current chunk", PREDICTED)):
            draw.rectangle((x, y - 1, x + 14, y + 1), fill=color)
            draw.text((x + 20, y), text, FAINT, font=_font(10), anchor="lm")
            x += 96

    def _pixels(self, i: int, steps: np.ndarray, values: np.ndarray, now: int, width: int) -> np.ndarray:
        """Points of dimension i in its plot, [k, 2], without those outside of the shown steps."""
        shown = (steps >= now - _PAST) & (steps <= now + _FUTURE)
        x = (steps[shown] - (now - _PAST)) / (_PAST + _FUTURE) * width
        low, span = self._low[i], max(self._high[i] - self._low[i], 1e-6)
        y = 3 + (1 - (values[shown] - low) / span) * (_PLOT - 6)
        return np.stack([x, y], axis=-1)


def _draw_paths(image: Image.Image, executed: np.ndarray, predicted: np.ndarray) -> None:
    """Draw the hands' paths [n, t, 2] into a view."""
    layer = Image.new("RGBA", (image.width * _SMOOTH, image.height * _SMOOTH), (*EXECUTED, 0))
    draw = ImageDraw.Draw(layer)
    for path in executed:
        _line(draw, path, EXECUTED, 2)
    for path in predicted:
        points = path[:1]
        for point in path[1:]:  # only dots that do not touch
            if np.linalg.norm(point - points[-1]) >= 5:
                points = np.concatenate([points, point[None]])
        _dots(draw, points, BACKGROUND, 2.5)
        _dots(draw, points, PREDICTED, 1.7)
    small = layer.resize(image.size, Image.Resampling.BOX)
    image.paste(small, mask=small.getchannel("A"))


def _line(draw: ImageDraw.ImageDraw, points: np.ndarray, color: tuple[int, ...], width: float | int) -> None:
    points = _drawable(points)
    if len(points) > 1:
        draw.line([tuple(point) for point in points * _SMOOTH], color, round(width * _SMOOTH), joint="curve")


def _dots(draw: ImageDraw.ImageDraw, points: np.ndarray, color: tuple[int, ...], radius: float | int) -> None:
    for x, y in _drawable(points):
        draw.ellipse([_SMOOTH * edge for edge in (x - radius, y - radius, x + radius, y + radius)], fill=color)


def _drawable(points: np.ndarray) -> np.ndarray:
    """Points [k, 2] without those behind the camera, clipped to coordinates that Pillow can draw."""
    return points[np.isfinite(points).all(axis=1)].clip(-10_000, 10_000)


def _even(size: int) -> int:
    """Round up to an even size: video stores colours per two by two pixels."""
    return size + size % 2


@functools.cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    import matplotlib  # includes the font

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}", size)

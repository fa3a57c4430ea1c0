"""Films of episodes: what the cameras see, where the hands go and where the policy wants them to go."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from torchpi.errors import SimulationError
from torchpi.extras import require
from torchpi.sim.environment import Environment, ShowsHands
from torchpi.sim.rollout import Moment, Onlooker, camera_keys

VIEW, SINGLE_VIEW = 240, 360
"""Height of the cameras' views, in pixels: of one of several, and of the only one."""
EVERY = 2
"""Steps from one picture to the next."""
FPS = 20
_HOLD = FPS  # pictures that the last one stays: a second
_ENCODERS = ("libx264", "libopenh264", "libsvtav1")  # the first one that this build of FFmpeg has

_CAPTION, _ROW, _LEGEND, _GAP, _LABEL, _MARGIN = 30, 24, 16, 4, 92, 8
_PAST, _FUTURE = 64, 20  # steps to the left and to the right of now
_TRAIL = 100  # steps of the executed path that stay in the picture
_SMOOTH = 3  # lines are drawn so many times larger, and reduced
_BACKGROUND, _PANEL, _TEXT, _FAINT = (22, 24, 29), (33, 36, 43), (235, 237, 240), (140, 146, 156)
_EXECUTED, _PREDICTED = (56, 189, 248), (251, 146, 60)
_GOOD, _BAD = (74, 222, 128), (248, 113, 113)


@contextlib.contextmanager
def film(path: str | pathlib.Path | None, environment: Environment, instruction: str) -> Iterator[Onlooker | None]:
    """An onlooker for `run_episode` that films the episode; the file is there when the block ends without an error.

    Args:
        path: an .mp4 file to write; None: no film, and no onlooker.
        environment: of the episode. One that `ShowsHands` gets the hands' paths drawn.
        instruction: what the policy is told, for the caption.
    """
    if path is None:
        yield None
        return
    encoder = _encoder()
    onlooker = _Film(environment, instruction)
    yield onlooker
    _encode(pathlib.Path(path), onlooker.pictures(), encoder)


@dataclasses.dataclass(frozen=True)
class _Shot:
    """What is kept of a moment until the film is drawn."""

    moment: Moment
    views: dict[str, np.ndarray]
    overlay: tuple[str, np.ndarray, np.ndarray] | None
    """The view with the hands in it, their executed paths [n, t, 2] and their predicted ones [n, H, 2], in pixels."""


class _Film:
    """Watches an episode, then draws it: only at the end are the ranges of its plots known."""

    def __init__(self, environment: Environment, instruction: str) -> None:
        self._environment, self._instruction = environment, instruction
        self._size = VIEW if len(camera_keys(environment.embodiment)) > 1 else SINGLE_VIEW
        self._shots: list[_Shot] = []
        self._actions: list[np.ndarray] = []
        self._chunks: list[tuple[int, np.ndarray]] = []  # the step at which each began
        self._path: list[np.ndarray] = []  # of the hands, [n, 3] each
        self._predicted = np.zeros((0, 0, 3))

    def __call__(self, moment: Moment) -> None:
        """Take note of a moment."""
        hands = self._environment if isinstance(self._environment, ShowsHands) else None
        if moment.executed == 0:
            self._chunks.append((moment.step, np.asarray(moment.chunk)))
            if hands:
                self._predicted = hands.hands_after(moment.chunk)
        else:
            self._actions.append(np.asarray(moment.chunk)[moment.executed - 1])
        if hands and (moment.executed or moment.step == 0):
            self._path.append(hands.hands())
        # A new chunk is no new picture, the first excepted.
        if moment.step == 0 or (moment.executed and (moment.step % EVERY == 0 or moment.last)):
            overlay = self._overlay(hands) if hands else None
            self._shots.append(_Shot(moment, self._environment.render(self._size), overlay))

    def _overlay(self, hands: ShowsHands) -> tuple[str, np.ndarray, np.ndarray]:
        paths = []
        for path in (np.stack(self._path[-_TRAIL:]), self._predicted):
            view, pixels = hands.project(path.reshape(-1, 3), self._size)
            paths.append(pixels.reshape(*path.shape[:2], 2).swapaxes(0, 1))
        return view, paths[0], paths[1]

    def pictures(self) -> Iterator[np.ndarray]:
        """The film, uint8 [h, w, 3] each."""
        robot = self._environment.embodiment
        names = [action.name for action in robot.actions]
        strip = _Strip(names, self._actions, self._chunks, width=_width(self._shots[0].views))
        for shot in self._shots:
            picture = self._picture(shot, strip)
            for _ in range(_HOLD if shot.moment.last else 1):
                yield picture

    def _picture(self, shot: _Shot, strip: "_Strip") -> np.ndarray:
        width = _width(shot.views)
        canvas = Image.new("RGB", (width, _even(_CAPTION + self._size + strip.height)), _BACKGROUND)
        draw = ImageDraw.Draw(canvas)
        left = _GAP
        for name, view in shot.views.items():
            image = Image.fromarray(view)
            if shot.overlay and shot.overlay[0] == name:
                _draw_paths(image, shot.overlay[1], shot.overlay[2])
            ImageDraw.Draw(image).text((6, 4), name, _TEXT, font=_font(11), stroke_width=1, stroke_fill=_BACKGROUND)
            canvas.paste(image, (left, _CAPTION))
            left += image.width + _GAP
        self._caption(draw, shot.moment, width)
        strip.draw(canvas, _CAPTION + self._size, shot.moment)
        return np.asarray(canvas)

    def _caption(self, draw: ImageDraw.ImageDraw, moment: Moment, width: int) -> None:
        hz = self._environment.embodiment.control_hz
        speed = f"  {EVERY * FPS / hz:.2g}× speed" if hz else ""
        right, colour = f"step {moment.step}{speed}", _FAINT
        if moment.last:
            word = "✓ success" if moment.success else "✗ not done"
            right, colour = f"{word}  step {moment.step}", _GOOD if moment.success else _BAD
            draw.rectangle(
                (0, _CAPTION - _GAP, width - 1, _CAPTION + self._size + _GAP - 1), outline=colour, width=_GAP
            )
        draw.text((width - _MARGIN, _CAPTION / 2 - 2), right, colour, font=_font(12), anchor="rm")
        room = width - 3 * _MARGIN - draw.textlength(right, font=_font(12))
        text = _shortened(self._instruction, room, draw)
        draw.text((_MARGIN, _CAPTION / 2 - 2), text, _TEXT, font=_font(14, bold=True), anchor="lm")


class _Strip:
    """A row per dimension of the actions: those that were executed, and the current chunk over and ahead of them."""

    def __init__(
        self,
        names: Sequence[str],
        actions: Sequence[np.ndarray],
        chunks: Sequence[tuple[int, np.ndarray]],
        *,
        width: int,
    ) -> None:
        self._names, self._actions, self._chunks = names, np.stack(actions), chunks
        everything = np.concatenate([self._actions, *(chunk for _, chunk in chunks)])
        self._low, self._high = everything.min(axis=0), everything.max(axis=0)
        self._columns = 1 if len(names) <= 7 else 2
        self._rows = -(-len(names) // self._columns)
        self._column = (width - _MARGIN) // self._columns
        self.height = self._rows * _ROW + _LEGEND + 2 * _MARGIN

    def draw(self, canvas: Image.Image, top: int, moment: Moment) -> None:
        """Draw the rows below `top`."""
        start, chunk = next(entry for entry in reversed(self._chunks) if entry[0] <= max(0, moment.step - 1))
        plots, draw = [], ImageDraw.Draw(canvas)
        for i, name in enumerate(self._names):
            column, row = divmod(i, self._rows)
            left, y = _MARGIN + column * self._column, top + _MARGIN + row * _ROW
            draw.text((left, y + _ROW / 2), name, _FAINT, font=_font(10), anchor="lm")
            plots.append((i, left + _LABEL, y))
        width = self._column - _LABEL - _MARGIN
        for i, left, y in plots:
            executed = self._pixels(i, np.arange(moment.step), self._actions[: moment.step, i], moment.step, width)
            predicted = self._pixels(i, start + np.arange(len(chunk)), chunk[:, i], moment.step, width)
            plot = _plot(executed, predicted, width, _ROW - 4)
            canvas.paste(plot, (left, y + 2))
        self._legend(draw, top + _MARGIN + self._rows * _ROW + _LEGEND / 2)

    def _legend(self, draw: ImageDraw.ImageDraw, y: float | int) -> None:
        x = _MARGIN + _LABEL
        draw.line([(x, y), (x + 14, y)], _EXECUTED, width=2)
        draw.text((x + 20, y), "executed", _FAINT, font=_font(10), anchor="lm")
        for i in range(4):
            draw.ellipse((x + 96 + 5 * i, y - 1, x + 98 + 5 * i, y + 1), _PREDICTED)
        draw.text((x + 120, y), "predicted: the current chunk", _FAINT, font=_font(10), anchor="lm")

    def _pixels(self, i: int, steps: np.ndarray, values: np.ndarray, now: int, width: int) -> np.ndarray:
        """Points of dimension i in its plot, [k, 2]; those outside of the time that is shown are left out."""
        shown = (steps >= now - _PAST) & (steps <= now + _FUTURE)
        x = (steps[shown] - (now - _PAST)) / (_PAST + _FUTURE) * width
        low, span = self._low[i], max(self._high[i] - self._low[i], 1e-6)
        y = 3 + (1 - (values[shown] - low) / span) * (_ROW - 4 - 6)
        return np.stack([x, y], axis=-1)


def _plot(executed: np.ndarray, predicted: np.ndarray, width: int, height: int) -> Image.Image:
    large = Image.new("RGB", (width * _SMOOTH, height * _SMOOTH), _PANEL)
    draw = ImageDraw.Draw(large)
    now = _PAST / (_PAST + _FUTURE) * width
    draw.line([(now * _SMOOTH, 0), (now * _SMOOTH, height * _SMOOTH)], (66, 71, 82), width=_SMOOTH)
    _line(draw, executed, _EXECUTED, 1.5)
    _dots(draw, predicted, _PREDICTED, 1.2)
    return large.resize((width, height), Image.Resampling.BOX)


def _draw_paths(image: Image.Image, executed: np.ndarray, predicted: np.ndarray) -> None:
    """Draw the paths of hands [n, t, 2] into a view."""
    size = image.width * _SMOOTH, image.height * _SMOOTH
    layer = Image.new("RGBA", size, (*_EXECUTED, 0))
    draw = ImageDraw.Draw(layer)
    for path in executed:
        _line(draw, path, _EXECUTED, 2)
    for path in predicted:
        points = _apart(path, 5)
        _dots(draw, points, _BACKGROUND, 2.5)
        _dots(draw, points, _PREDICTED, 1.7)
    small = layer.resize(image.size, Image.Resampling.BOX)
    image.paste(small, mask=small.getchannel("A"))


def _line(draw: ImageDraw.ImageDraw, points: np.ndarray, colour: tuple[int, ...], width: float | int) -> None:
    drawable = _drawable(points)
    if len(drawable) > 1:
        flat = [tuple(point) for point in drawable * _SMOOTH]
        draw.line(flat, colour, width=round(width * _SMOOTH), joint="curve")


def _dots(draw: ImageDraw.ImageDraw, points: np.ndarray, colour: tuple[int, ...], radius: float | int) -> None:
    for x, y in _drawable(points):
        box = ((x - radius) * _SMOOTH, (y - radius) * _SMOOTH, (x + radius) * _SMOOTH, (y + radius) * _SMOOTH)
        draw.ellipse(box, fill=colour)


def _drawable(points: np.ndarray) -> np.ndarray:
    """Points [k, 2] without those behind the camera, and none so far away that they could not be drawn."""
    return points[np.isfinite(points).all(axis=1)].clip(-10_000, 10_000)


def _apart(path: np.ndarray, distance: float | int) -> np.ndarray:
    """Those points of a path [t, 2] that are at least so far from the one before."""
    kept = [path[0]]
    for point in path[1:]:
        if np.linalg.norm(point - kept[-1]) >= distance:
            kept.append(point)
    return np.stack(kept)


def _width(views: dict[str, np.ndarray]) -> int:
    return _even(sum(view.shape[1] + _GAP for view in views.values()) + _GAP)


def _even(size: int) -> int:
    """Video has colours for two by two pixels."""
    return size + size % 2


def _shortened(text: str, room: float | int, draw: ImageDraw.ImageDraw) -> str:
    font = _font(14, bold=True)
    if draw.textlength(text, font=font) <= room:
        return text
    return next(
        (f"{text[:end]}…" for end in range(len(text), 0, -1) if draw.textlength(f"{text[:end]}…", font=font) <= room),
        "",
    )


@functools.cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font that matplotlib brings."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}", size)


def _encoder() -> str:
    available = require("av", "data").codec.codecs_available
    for encoder in _ENCODERS:
        if encoder in available:
            return encoder
    raise SimulationError(f"This build of PyAV has no encoder for videos; expected one of {', '.join(_ENCODERS)}.")


def _encode(path: pathlib.Path, pictures: Iterator[np.ndarray], encoder: str) -> None:
    """Write an .mp4 file, whole or not at all."""
    av: Any = require("av", "data")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with av.open(str(part), "w", format="mp4", options={"movflags": "faststart"}) as container:
            stream = container.add_stream(encoder, rate=FPS)
            stream.pix_fmt, stream.codec_context.thread_count = "yuv420p", 1
            if encoder == "libx264":
                stream.options = {"crf": "20", "preset": "medium"}
            for number, picture in enumerate(pictures):
                if number == 0:
                    stream.height, stream.width = picture.shape[:2]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)

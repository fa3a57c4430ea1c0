"""Log of a robot for the viewer Rerun (https://rerun.io): cameras, state, predicted chunks and executed actions.

Time lines: "time" in seconds, and "frame", the control steps or the dataset's frames in it. Each dimension of an action
is a plot, in which the predicted chunks are drawn over what was executed; a state's dimension of the same name and unit
is drawn there as well.
"""

from __future__ import annotations

import collections
import importlib
import logging
import os
import re
import socket
import threading
import time
from typing import Any, Callable, Iterator, Mapping, Sequence

import numpy as np

_log = logging.getLogger(__name__)

MAX_WAITING, MAX_WAITING_MB = 4096, 64
"""Entries that may wait to be written, and MiB of their arrays; more are dropped, and counted."""
MAX_LANES = 64
"""Chunks of one robot that may overlap; more are dropped, too."""
_MAX_LAYOUTS = 16
JPEG_QUALITY = 85
_COLORS = {"action": (47, 102, 208), "predicted": (207, 90, 30), "state": (13, 133, 119)}
_WIDTHS = {"action": 2.5, "predicted": 1.0, "state": 1.0}


class RerunLog:
    """A file or a running viewer, to which robots are logged.

        with RerunLog("session.rrd") as log:
            ControlLoop(robot, policy, settings, log=log.robot(policy.metadata)).run(seconds=60)

    Args:
        target: a new .rrd file, or a viewer's address, rerun+http://HOST:9876/proxy or HOST:PORT; a Path is a file.
        wait: True writes in the calling thread. By default a thread of its own writes, calls return at once, and
            entries for which there is no room are dropped.

    Raises:
        ModuleNotFoundError: rerun-sdk is not installed.
        ValueError: the target is neither; the file exists.
    """

    def __init__(self, target: str | os.PathLike[str], *, wait: bool = False) -> None:
        self.dropped = 0
        """Entries that were not written: there was no room, or writing failed."""
        self._began = time.monotonic()
        try:
            self.rerun, self.blueprint = map(importlib.import_module, ("rerun", "rerun.blueprint"))
        except ModuleNotFoundError as error:
            text = f"Rerun's log needs rerun-sdk: pip install 'rerun-sdk>=0.26' ({error})."
            raise ModuleNotFoundError(text) from error
        self.stream = self._opened(target)
        self._waiting: collections.deque[tuple[int, Callable[..., None], tuple[Any, ...]]] = collections.deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._ending = False
        self._layouts: dict[str, Any] = {}
        self._thread = None if wait else threading.Thread(target=self._write, name="torchpi-rerun", daemon=True)
        if self._thread is not None:
            self._thread.start()

    @property
    def seconds(self) -> float:
        """Time since the log's beginning."""
        return time.monotonic() - self._began

    def robot(self, metadata: Mapping[str, Any], *, label: str = "") -> RobotLog:
        """The log of one robot, by a policy's metadata; a label tells several in one log apart."""
        return RobotLog(self, metadata, label)

    def close(self) -> None:
        """Write what waits, and end the file. Logs a warning if entries were dropped."""
        if self._thread is not None:
            with self._changed:
                self._ending = True
                self._changed.notify()
            self._thread.join()
        try:
            self.stream.flush(timeout_sec=5.0)
        except (RuntimeError, ValueError) as error:
            _log.warning("the end of Rerun's log did not arrive: %s", error)
        self.stream.disconnect()
        if self.dropped:
            _log.warning(
                "%d entries are not in Rerun's log: writing was slower than they came, or failed", self.dropped
            )

    def __enter__(self) -> RerunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def put(self, write: Callable[..., None], *arguments: Any) -> None:
        """Call a function that writes, now or soon."""
        if self._thread is None:
            write(*arguments)
            return
        size = sum(value.nbytes for value in arguments if isinstance(value, np.ndarray))
        with self._changed:
            if len(self._waiting) >= MAX_WAITING or self._bytes + size > MAX_WAITING_MB * 2**20 or self._ending:
                self.drop()
                return
            self._waiting.append((size, write, arguments))
            self._bytes += size
            self._changed.notify()

    def drop(self) -> None:
        """Count an entry that is not written."""
        if not self.dropped:
            _log.warning("Rerun's log can't keep up, and drops entries; the number is logged at its end")
        self.dropped += 1

    def arrange(self, label: str, layout: Any) -> None:
        """Show a robot beside those that are shown already."""
        self._layouts[label] = layout
        if len(self._layouts) > _MAX_LAYOUTS:  # the first one's data stay
            del self._layouts[next(iter(self._layouts))]
        views = [*self._layouts.values()]
        shown = views[0] if len(views) == 1 else self.blueprint.Tabs(*views)
        self.stream.send_blueprint(self.blueprint.Blueprint(shown, collapse_panels=True))

    def _write(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._ending:
                    self._changed.wait()
                if not self._waiting:
                    return
                size, write, arguments = self._waiting.popleft()
                self._bytes -= size
            try:
                write(*arguments)
            except Exception:  # the robot must not stop for its log
                self.dropped += 1
                _log.exception("an entry could not be written to Rerun's log")

    def _opened(self, given: str | os.PathLike[str]) -> Any:
        stream, target = self.rerun.RecordingStream("torchpi"), os.fspath(given)
        if target.endswith(".rrd") or not isinstance(given, str):
            folder = os.path.dirname(os.path.abspath(target))
            if not os.path.isdir(folder):
                raise FileNotFoundError(f"There is no folder {folder} for {target}.")
            if os.path.exists(target):
                raise ValueError(f"{target} exists already; choose another file for Rerun's log.")
            stream.save(target)
            return stream
        address = re.fullmatch(r"(?:rerun(?:\+https?)?://)?(\[[\da-fA-F:]+\]|[\w.-]+):(\d+)(/proxy)?/?", target)
        if address is None:
            raise ValueError(
                f"Rerun's log can't go to {target!r}; expected a file that ends in .rrd, or the address of a viewer, "
                "rerun+http://HOST:9876/proxy or HOST:PORT."
            )
        try:  # without a viewer, Rerun keeps everything in memory
            socket.create_connection((address[1].strip("[]"), int(address[2])), timeout=3.0).close()
        except OSError as error:
            raise ConnectionError(
                f"No viewer of Rerun answers at {target} ({error}); start it there: rerun."
            ) from error
        stream.connect_grpc(target if "://" in target else f"rerun+http://{target}/proxy")
        return stream


class RobotLog:
    """The log of one robot. Times are in seconds from the log's beginning; without a frame, the one of that time."""

    def __init__(self, log: RerunLog, metadata: Mapping[str, Any], label: str) -> None:
        self._log, self._label = log, label
        self._format: Mapping[str, Any] | None = metadata.get("observation")
        self._names = [*(metadata.get("action_names") or ())]
        self._units = [*(metadata.get("action_units") or ())]
        self._hz = metadata.get("control_hz")
        self._prompt: str | None = None
        self._lanes: list[float] = []
        """The ends of the last chunk of each lane: chunks that overlap or touch are drawn as lines of their own."""
        self._styled: set[str] = set()
        self._arranged = False
        if self._hz is None:
            _log.warning("The policy states no control_hz: Rerun's log shows its actions a second apart")

    @property
    def seconds(self) -> float:
        """Time since the log's beginning."""
        return self._log.seconds

    def observe(self, seconds: float, observation: Mapping[str, Any], *, frame: int | None = None) -> None:
        """Log an observation with the robot's own keys; images are copied."""
        flat = dict(_flatten(observation))
        if not self._arranged:
            self._arranged = True
            self._format = self._format or _format_by_shape(flat)
            self._log.put(self._arrange)
        assert self._format is not None
        at = self._at(seconds, frame)
        for camera in self._format["cameras"]:
            if isinstance(image := flat.get(camera["key"]), np.ndarray):
                self._log.put(self._image, at, camera, image.copy())
        for part in self._format["state"]:
            if (values := flat.get(part["key"])) is not None:
                self._log.put(self._scalars, at, "state", part["names"], np.array(values, np.float64, ndmin=1))
        prompt = flat.get("prompt")
        if prompt is not None and str(prompt) != self._prompt:
            self._prompt = str(prompt)
            self._log.put(self._text, at, self._prompt)

    def execute(self, seconds: float, action: np.ndarray, *, frame: int | None = None) -> None:
        """Log the action [a] that the robot is sent."""
        self._log.put(self._scalars, self._at(seconds, frame), "action", self._names, np.array(action, np.float64))

    def predict(self, seconds: float, chunk: np.ndarray, *, frame: int | None = None, hz: float | None = None) -> None:
        """Log a chunk [H, a] whose first action is for this time; `hz`: of its actions, by default the policy's."""
        rate = float(hz or self._hz or 1)
        lane = next((i for i, end in enumerate(self._lanes) if end + 0.5 / rate <= seconds), len(self._lanes))
        if lane == MAX_LANES:
            self._log.drop()
            return
        self._lanes[lane : lane + 1] = [seconds + len(chunk) / rate]
        frames = self._at(seconds, frame)[0] + np.arange(len(chunk))
        times = seconds + np.arange(len(chunk)) / rate
        self._log.put(self._chunk, lane, frames, times, np.array(chunk, np.float64))

    def _at(self, seconds: float, frame: int | None) -> tuple[int, float]:
        return round(seconds * float(self._hz or 1)) if frame is None else frame, seconds

    # ---- in the thread that writes ----

    def _scalars(self, at: tuple[int, float], kind: str, names: Sequence[str], values: np.ndarray) -> None:
        for i, value in enumerate(values.tolist()):
            path = self._path(kind, _nth(names, i))
            self._style(path, kind)
            self._show(at, path, self._log.rerun.Scalars(value))

    def _chunk(self, lane: int, frames: np.ndarray, times: np.ndarray, chunk: np.ndarray) -> None:
        rerun = self._log.rerun
        # An empty row behind a chunk ends its line; without it the next one of the lane would be joined to it.
        end = times[-1] + (times[-1] - times[-2] if len(times) > 1 else 1e-3)
        indexes = [
            rerun.TimeColumn("frame", sequence=[*frames.tolist(), int(frames[-1]) + 1]),
            rerun.TimeColumn("time", duration=[*times.tolist(), float(end)]),
        ]
        for i, values in enumerate(chunk.T):
            path = f"{self._path('predicted', _nth(self._names, i))}/{lane}"
            self._style(path, "predicted")
            columns = rerun.Scalars.columns(scalars=values).partition([1] * len(values) + [0])
            self._log.stream.send_columns(path, indexes, columns)

    def _image(self, at: tuple[int, float], camera: Mapping[str, Any], image: np.ndarray) -> None:
        rerun = self._log.rerun
        if camera.get("layout") == "chw":
            image = np.moveaxis(image, 0, -1)
        if image.ndim == 2 or image.shape[-1] == 1:
            meter = 1000.0 if camera.get("depth_unit") == "mm" else 1.0
            shown = rerun.DepthImage(np.squeeze(image), meter=meter)
        else:
            pixels = image if image.dtype == np.uint8 else np.clip(image * 255.0, 0, 255).astype(np.uint8)
            shown = rerun.Image(pixels).compress(jpeg_quality=JPEG_QUALITY)
        self._show(at, self._path("cameras", camera["key"]), shown)

    def _text(self, at: tuple[int, float], text: str) -> None:
        self._show(at, self._path("prompt"), self._log.rerun.TextDocument(text))

    def _show(self, at: tuple[int, float], path: str, content: Any) -> None:
        self._log.stream.set_time("frame", sequence=at[0])
        self._log.stream.set_time("time", duration=at[1])
        self._log.stream.log(path, content)

    def _style(self, path: str, kind: str) -> None:
        if path not in self._styled:
            self._styled.add(path)
            style = self._log.rerun.SeriesLines(colors=_COLORS[kind], widths=_WIDTHS[kind], names=kind)
            self._log.stream.log(path, style, static=True)

    def _path(self, *parts: str) -> str:
        return str(self._log.rerun.new_entity_path([*filter(None, (self._label,)), *parts]))

    def _arrange(self) -> None:
        """Cameras and the instruction on the left, a plot for each dimension on the right."""
        assert self._format is not None
        blueprint = self._log.blueprint
        cameras = [
            blueprint.Spatial2DView(origin=self._path("cameras", camera["key"]), name=camera["key"])
            for camera in self._format["cameras"]
        ]
        text = blueprint.TextDocumentView(origin=self._path("prompt"), name="instruction")
        plots = {}
        for i, name in enumerate(self._names):
            plots[_titled(name, self._units, i)] = [self._path("action", name), f"{self._path('predicted', name)}/**"]
        for part in self._format["state"]:
            for i, name in enumerate(part["names"]):
                title = _titled(name, part.get("units") or (), i)
                plots.setdefault(title if title in plots else f"state {title}", []).append(self._path("state", name))
        left = blueprint.Vertical(*cameras, text, row_shares=[3] * len(cameras) + [1])
        right = [blueprint.TimeSeriesView(origin="/", contents=paths, name=title) for title, paths in plots.items()]
        layout = blueprint.Horizontal(left, blueprint.Grid(*right), column_shares=[1, 3], name=self._label or "robot")
        self._log.arrange(self._label, layout)


def _flatten(observation: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in observation.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _format_by_shape(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The cameras and the state of an observation that no metadata describe: arrays of three dimensions, and of one."""
    arrays = {key: value for key, value in flat.items() if isinstance(value, np.ndarray)}
    cameras = [
        {"key": key, "layout": "chw" if image.shape[0] in (1, 3) and image.shape[2] not in (1, 3) else "hwc"}
        for key, image in arrays.items()
        if image.ndim == 3
    ]
    state = [
        {"key": key, "names": [f"{key}_{i}" for i in range(len(values))]}
        for key, values in arrays.items()
        if values.ndim == 1 and values.dtype.kind in "fiu"
    ]
    return {"cameras": cameras, "state": state}


def _nth(names: Sequence[str], i: int) -> str:
    return names[i] if i < len(names) else str(i)


def _titled(name: str, units: Sequence[str], i: int) -> str:
    return f"{name} ({units[i]})" if i < len(units) and units[i] else name

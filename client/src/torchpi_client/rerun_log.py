"""Log of robots for the viewer Rerun (https://rerun.io): cameras, state, predicted chunks and executed actions.

The timelines are "time", in seconds, and "frame", in control steps or frames of a dataset. Each action dimension has a
plot with the executed actions, the predicted chunks, and the state dimension of the same name and unit.
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
"""Number of entries that may wait to be written, and MiB of their arrays. More are dropped and counted."""
MAX_LANES = 64
"""Chunks of one robot that may overlap. More are dropped and counted."""
_MAX_LAYOUTS = 16
JPEG_QUALITY = 85
_COLORS = {"action": (47, 102, 208), "predicted": (207, 90, 30), "state": (13, 133, 119)}
_WIDTHS = {"action": 2.5, "predicted": 1.0, "state": 1.0}


class RerunLog:
    """Log of one or more robots, as a file or in a running viewer.

        with RerunLog("session.rrd") as log:
            ControlLoop(robot, policy, settings, log=log.robot(policy.metadata)).run(seconds=60)

    Args:
        target: a new .rrd file, or a viewer's address, rerun+http://HOST:9876/proxy or HOST:PORT. A Path is a file.
        wait: write in the calling thread. By default calls do not block: another thread writes, and entries beyond the
            limits above are dropped.

    Raises:
        ModuleNotFoundError: rerun-sdk is not installed.
        ValueError: the target is neither a file nor an address, or the file exists.
    """

    def __init__(self, target: str | os.PathLike[str], *, wait: bool = False) -> None:
        self.dropped = 0
        """Number of entries that were not written, because too many were waiting or writing failed."""
        self._start = time.monotonic()
        try:
            self.rerun, self.blueprint = map(importlib.import_module, ("rerun", "rerun.blueprint"))
        except ModuleNotFoundError as error:
            text = f"Logging to Rerun needs rerun-sdk: pip install 'rerun-sdk>=0.26' ({error})."
            raise ModuleNotFoundError(text) from error
        self.stream = self._open(target)
        self._waiting: collections.deque[tuple[int, Callable[..., None], tuple[Any, ...]]] = collections.deque()
        self._waiting_bytes = 0
        self._changed = threading.Condition()
        self._closing = False
        self._layouts: dict[str, Any] = {}
        self._thread = None if wait else threading.Thread(target=self._write, name="torchpi-rerun", daemon=True)
        if self._thread is not None:
            self._thread.start()

    @property
    def seconds(self) -> float:
        """Seconds since the start of the log."""
        return time.monotonic() - self._start

    def robot(self, metadata: Mapping[str, Any], *, label: str = "") -> RobotLog:
        """Add a robot, described by a policy's metadata. Several robots in one log need different labels."""
        return RobotLog(self, metadata, label)

    def close(self) -> None:
        """Write the waiting entries and close the file. Logs a warning if entries were dropped."""
        if self._thread is not None:
            with self._changed:
                self._closing = True
                self._changed.notify()
            self._thread.join()
        try:
            self.stream.flush(timeout_sec=5.0)
        except (RuntimeError, ValueError) as error:
            _log.warning("the last entries did not reach Rerun: %s", error)
        self.stream.disconnect()
        if self.dropped:
            _log.warning("%d entries are missing in Rerun's log: writing was too slow, or failed", self.dropped)

    def __enter__(self) -> RerunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def put(self, write: Callable[..., None], *arguments: Any) -> None:
        """Schedule a call that writes an entry, or make it now if there is no thread."""
        if self._thread is None:
            write(*arguments)
            return
        size = sum(value.nbytes for value in arguments if isinstance(value, np.ndarray))
        with self._changed:
            is_full = len(self._waiting) >= MAX_WAITING or self._waiting_bytes + size > MAX_WAITING_MB * 2**20
            if is_full or self._closing:
                self.drop()
                return
            self._waiting.append((size, write, arguments))
            self._waiting_bytes += size
            self._changed.notify()

    def drop(self) -> None:
        """Count an entry that is not written."""
        if not self.dropped:
            _log.warning("logging to Rerun is too slow: entries are dropped; their number is logged at the end")
        self.dropped += 1

    def add_layout(self, label: str, layout: Any) -> None:
        """Show a robot in the viewer, in a tab if there are several."""
        self._layouts[label] = layout
        if len(self._layouts) > _MAX_LAYOUTS:  # the first robot's tab is removed, not its data
            del self._layouts[next(iter(self._layouts))]
        layouts = [*self._layouts.values()]
        view = layouts[0] if len(layouts) == 1 else self.blueprint.Tabs(*layouts)
        self.stream.send_blueprint(self.blueprint.Blueprint(view, collapse_panels=True))

    def _write(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if not self._waiting:
                    return
                size, write, arguments = self._waiting.popleft()
                self._waiting_bytes -= size
            try:
                write(*arguments)
            except Exception:  # the robot must not stop for its log
                self.dropped += 1
                _log.exception("an entry could not be written to Rerun's log")

    def _open(self, target: str | os.PathLike[str]) -> Any:
        stream, path = self.rerun.RecordingStream("torchpi"), os.fspath(target)
        if path.endswith(".rrd") or not isinstance(target, str):
            folder = os.path.dirname(os.path.abspath(path))
            if not os.path.isdir(folder):
                raise FileNotFoundError(f"There is no folder {folder} for {path}.")
            if os.path.exists(path):
                raise ValueError(f"{path} exists already; choose another file for Rerun's log.")
            stream.save(path)
            return stream
        address = re.fullmatch(r"(?:rerun(?:\+https?)?://)?(\[[\da-fA-F:]+\]|[\w.-]+):(\d+)(/proxy)?/?", target)
        if address is None:
            raise ValueError(
                f"Cannot log to {target!r}; expected an .rrd file, or the address of a Rerun viewer, "
                "rerun+http://HOST:9876/proxy or HOST:PORT."
            )
        try:  # checked first: without a viewer, Rerun buffers everything in memory
            socket.create_connection((address[1].strip("[]"), int(address[2])), timeout=3.0).close()
        except OSError as error:
            raise ConnectionError(
                f"No Rerun viewer answers at {target} ({error}); start one there with the command rerun."
            ) from error
        stream.connect_grpc(target if "://" in target else f"rerun+http://{target}/proxy")
        return stream


class RobotLog:
    """Log of one robot.

    Times are in seconds since the start of the log. The default for `frame` is the control step at that time.
    """

    def __init__(self, log: RerunLog, metadata: Mapping[str, Any], label: str) -> None:
        self._log, self._label = log, label
        self._format: Mapping[str, Any] | None = metadata.get("observation")
        self._names = [*(metadata.get("action_names") or ())]
        self._units = [*(metadata.get("action_units") or ())]
        self._hz = metadata.get("control_hz")
        self._prompt: str | None = None
        self._lanes: list[float] = []
        """End of the last chunk in each lane. A lane is drawn as one line, so chunks that overlap or touch need several
        lanes."""
        self._styled: set[str] = set()
        self._has_layout = False
        if self._hz is None:
            _log.warning("the policy has no control_hz: Rerun's log shows its actions one second apart")

    @property
    def seconds(self) -> float:
        """Seconds since the start of the log."""
        return self._log.seconds

    def observe(self, seconds: float, observation: Mapping[str, Any], *, frame: int | None = None) -> None:
        """Log an observation with the robot's own keys. Images are copied."""
        flat = dict(_flatten(observation))
        if not self._has_layout:
            self._has_layout = True
            self._format = self._format or _format_by_shape(flat)
            self._log.put(self._make_layout)
        assert self._format is not None
        when = self._when(seconds, frame)
        for camera in self._format["cameras"]:
            image = flat.get(camera["key"])
            if isinstance(image, np.ndarray):
                self._log.put(self._image, when, camera, image.copy())
        for part in self._format["state"]:
            values = flat.get(part["key"])
            if values is not None:
                self._log.put(self._scalars, when, "state", part["names"], np.array(values, np.float64, ndmin=1))
        prompt = flat.get("prompt")
        if prompt is not None and str(prompt) != self._prompt:
            self._prompt = str(prompt)
            self._log.put(self._text, when, self._prompt)

    def execute(self, seconds: float, action: np.ndarray, *, frame: int | None = None) -> None:
        """Log an action [a] sent to the robot."""
        self._log.put(self._scalars, self._when(seconds, frame), "action", self._names, np.array(action, np.float64))

    def predict(self, seconds: float, chunk: np.ndarray, *, frame: int | None = None, hz: float | None = None) -> None:
        """Log a chunk [H, a] whose first action is for this time, at `hz` (default: the policy's rate)."""
        rate = float(hz or self._hz or 1)
        lane = next((i for i, end in enumerate(self._lanes) if end + 0.5 / rate <= seconds), len(self._lanes))
        if lane == MAX_LANES:
            self._log.drop()
            return
        self._lanes[lane : lane + 1] = [seconds + len(chunk) / rate]
        frames = self._when(seconds, frame)[0] + np.arange(len(chunk))
        times = seconds + np.arange(len(chunk)) / rate
        self._log.put(self._chunk, lane, frames, times, np.array(chunk, np.float64))

    def _when(self, seconds: float, frame: int | None) -> tuple[int, float]:
        return round(seconds * float(self._hz or 1)) if frame is None else frame, seconds

    # ---- called in the writing thread ----

    def _scalars(self, when: tuple[int, float], kind: str, names: Sequence[str], values: np.ndarray) -> None:
        for i, value in enumerate(values.tolist()):
            path = self._path(kind, _nth(names, i))
            self._style(path, kind)
            self._show(when, path, self._log.rerun.Scalars(value))

    def _chunk(self, lane: int, frames: np.ndarray, times: np.ndarray, chunk: np.ndarray) -> None:
        rerun = self._log.rerun
        # An empty row after a chunk ends its line; otherwise it would be joined to the lane's next chunk.
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

    def _image(self, when: tuple[int, float], camera: Mapping[str, Any], image: np.ndarray) -> None:
        rerun = self._log.rerun
        if camera.get("layout") == "chw":
            image = np.moveaxis(image, 0, -1)
        if image.ndim == 2 or image.shape[-1] == 1:
            meter = 1000.0 if camera.get("depth_unit") == "mm" else 1.0
            content = rerun.DepthImage(np.squeeze(image), meter=meter)
        else:
            pixels = image if image.dtype == np.uint8 else np.clip(image * 255.0, 0, 255).astype(np.uint8)
            content = rerun.Image(pixels).compress(jpeg_quality=JPEG_QUALITY)
        self._show(when, self._path("cameras", camera["key"]), content)

    def _text(self, when: tuple[int, float], text: str) -> None:
        self._show(when, self._path("prompt"), self._log.rerun.TextDocument(text))

    def _show(self, when: tuple[int, float], path: str, content: Any) -> None:
        frame, seconds = when
        self._log.stream.set_time("frame", sequence=frame)
        self._log.stream.set_time("time", duration=seconds)
        self._log.stream.log(path, content)

    def _style(self, path: str, kind: str) -> None:
        if path not in self._styled:
            self._styled.add(path)
            style = self._log.rerun.SeriesLines(colors=_COLORS[kind], widths=_WIDTHS[kind], names=kind)
            self._log.stream.log(path, style, static=True)

    def _path(self, *parts: str) -> str:
        return str(self._log.rerun.new_entity_path([self._label, *parts] if self._label else [*parts]))

    def _make_layout(self) -> None:
        """Show cameras and instruction on the left, and a plot per dimension on the right."""
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
        self._log.add_layout(self._label, layout)


def _flatten(observation: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in observation.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _format_by_shape(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Cameras and state of an observation without metadata: arrays with three axes, and those with one."""
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

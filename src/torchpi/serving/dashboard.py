"""Dashboard at "/" of a server: camera images, state, action chunk and latency of each robot.

The dashboard keeps a reference to each robot's last answered request, and a minute of latencies. Images are encoded and
numbers formatted only when the page requests them. Times are in seconds of `time.monotonic`. Nothing here waits or
locks: except for `encode_jpeg`, everything runs in the thread of the server's event loop.
"""

import base64
import collections
import dataclasses
import functools
import hashlib
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from torchpi.assets import assets
from torchpi.errors import UnknownKeyError
from torchpi.robots.keys import flatten
from torchpi.serving.scheduler import Answer, ServedPolicy
from torchpi.transforms.prompt import as_text
from torchpi.types import ActionChunk, PreviousChunk
from torchpi.ui.page import page_footer, page_head, style_sheet

SECONDS = 60
"""Length of the timeline."""
FORGET_AFTER = 10.0
"""Seconds that a robot stays on the page after it has left."""
MAX_LEFT = 4
"""Largest number of robots that stay on the page after they have left."""
MAX_SIDE = 480
"""Longer side of an image on the page, in pixels."""
_RATE_SECONDS = 5  # requests per second are averaged over this many whole seconds


@dataclasses.dataclass
class _Second:
    """Number and total times of the requests answered in one second."""

    time: int
    requests: int = 0
    queue: float = 0.0
    inference: float = 0.0
    slowest: float = 0.0


class Timeline:
    """Requests and their latency per second, for the last minute."""

    def __init__(self) -> None:
        self._seconds: collections.deque[_Second] = collections.deque(maxlen=SECONDS)

    def add(self, now: float, answer: Answer) -> None:
        if not self._seconds or self._seconds[-1].time != int(now):
            self._seconds.append(_Second(int(now)))
        second = self._seconds[-1]
        second.requests += 1
        second.queue += answer.queue_seconds
        second.inference += answer.inference_seconds
        second.slowest = max(second.slowest, answer.queue_seconds + answer.inference_seconds)

    def rows(self, now: float) -> list[dict[str, float | int]]:
        """Seconds with requests, oldest first."""
        return [
            {
                "ago": int(now) - second.time,
                "requests": second.requests,
                "queue_ms": round(1e3 * second.queue / second.requests, 3),
                "infer_ms": round(1e3 * second.inference / second.requests, 3),
                "slowest_ms": round(1e3 * second.slowest, 3),
            }
            for second in self._seconds
            if int(now) - second.time < SECONDS
        ]

    def rate(self, now: float) -> float:
        """Requests per second, averaged over the last five whole seconds."""
        recent = (second.requests for second in self._seconds if 1 <= int(now) - second.time <= _RATE_SECONDS)
        return sum(recent) / _RATE_SECONDS


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Answered request."""

    observation: Mapping[str, Any]
    answer: ActionChunk
    begin: float
    """Time of the chunk's first action: when it was answered or, with real-time chunking, requested."""
    answered_at: float


@dataclasses.dataclass
class Robot:
    """Client as shown on the page."""

    number: int
    policy_name: str
    policy: ServedPolicy
    address: str
    left_at: float | None = None
    requests: int = 0
    """Number of answered requests."""
    last: Exchange | None = None
    requested_at: float | None = None
    """Time of the request that is not answered yet, if there is one."""
    previous: PreviousChunk | None = None
    """Real-time chunking fields of that request."""
    error: str | None = None
    """Error message, if the last request was answered with an error."""
    timeline: Timeline = dataclasses.field(default_factory=Timeline)

    def executed(self, now: float) -> dict[str, Any] | None:
        """Number of executed actions of the last chunk.

        It is "reported" by the waiting request, or "estimated" from the time until the next request or the robot's
        leaving. None if there is no chunk or no control rate.
        """
        if self.last is None:
            return None
        horizon = len(self.last.answer["actions"])
        if self.previous is not None:
            return {"steps": self.previous.steps_executed(horizon), "source": "reported"}
        control_hz = self.policy.embodiment.control_hz
        if control_hz is None:
            return None
        # Without real-time chunking a client may stand still until its answer, so time after the request doesn't count.
        end = min(time for time in (now, self.requested_at, self.left_at) if time is not None)
        steps = math.floor((end - self.last.begin) * control_hz)
        return {"steps": min(horizon, max(0, steps)), "source": "estimated"}

    def to_dict(self, now: float) -> dict[str, Any]:
        """JSON document without images and chunk."""
        return {
            "number": self.number,
            "policy": self.policy_name,
            "address": self.address,
            "requests": self.requests,
            "requests_per_second": _rounded(self.timeline.rate(now)),
            "left": self.left_at is not None,
            "waits_seconds": None if self.requested_at is None else _rounded(now - self.requested_at),
            "error": self.error,
            "timeline": self.timeline.rows(now),
            "answered": None if self.last is None else self._last_dict(self.last, now),
        }

    def _last_dict(self, last: Exchange, now: float) -> dict[str, Any]:
        embodiment, observation = self.policy.embodiment, flatten(last.observation)
        prompt = last.observation.get("prompt")
        return {
            "seconds_ago": _rounded(now - last.answered_at),
            "prompt": as_text(self.policy.metadata.get("default_prompt") if prompt is None else prompt),
            "cameras": [
                {
                    "name": camera.name,
                    "key": camera.key,
                    "sent": camera.key is not None and observation.get(camera.key) is not None,
                }
                for camera in embodiment.read_cameras
            ],
            "state": [
                {"name": name, "value": _rounded(value)}
                for part in embodiment.state
                # strict=False: a robot may leave out the last dimensions of its state.
                for name, value in zip(part.names, np.atleast_1d(observation[part.key]).tolist(), strict=False)
            ],
            "executed": self.executed(now),
            "horizon": len(last.answer["actions"]),
            "num_samples": len(last.answer["samples"]) if "samples" in last.answer else 1,
            "uncertainty": _rounded(last.answer.get("uncertainty", math.nan)),
            "control_hz": embodiment.control_hz,
        }


class Dashboard:
    """Data of the dashboard page."""

    def __init__(self) -> None:
        self._robots: dict[int, Robot] = {}
        self._timeline = Timeline()

    # ---- called by connections ----

    def join(self, number: int, name: str, policy: ServedPolicy, address: str) -> Robot:
        robot = self._robots[number] = Robot(number, name, policy, address)
        return robot

    def requested(self, robot: Robot, previous: PreviousChunk | None, now: float) -> None:
        robot.requested_at, robot.previous = now, previous

    def answered(self, robot: Robot, observation: Mapping[str, Any], answer: Answer, now: float) -> None:
        assert robot.requested_at is not None
        begin = now if robot.previous is None else robot.requested_at
        robot.last = Exchange(observation, answer.chunk, begin, now)
        robot.requests += 1
        robot.requested_at = robot.previous = robot.error = None
        for timeline in (robot.timeline, self._timeline):
            timeline.add(now, answer)

    def failed(self, robot: Robot, error: str) -> None:
        robot.requested_at = robot.previous = None
        robot.error = error

    def leave(self, robot: Robot, now: float) -> None:
        """Mark a client as left. It is shown for a few more seconds if any of its requests was answered."""
        robot.left_at = now
        robot.requested_at = robot.previous = None
        if robot.last is None:
            self._robots.pop(robot.number, None)
        left = [number for number, each in self._robots.items() if each.left_at is not None]
        for number in left[:-MAX_LEFT]:
            del self._robots[number]

    def forget(self, now: float) -> None:
        """Remove robots that left at least `FORGET_AFTER` seconds ago."""
        for robot in list(self._robots.values()):
            if robot.left_at is not None and now - robot.left_at >= FORGET_AFTER:
                del self._robots[robot.number]

    # ---- called for the page ----

    def summary(self, now: float, policies: Mapping[str, ServedPolicy], **server: Any) -> dict[str, Any]:
        """JSON document without chunks and images; `server` holds further entries about the whole server."""
        self.forget(now)
        return {
            **server,
            "requests_per_second": _rounded(self._timeline.rate(now)),
            "timeline": self._timeline.rows(now),
            "policies": [self._policy(name, policy, now) for name, policy in policies.items()],
            "robots": [robot.to_dict(now) for robot in self._robots.values()],
        }

    def _policy(self, name: str, policy: ServedPolicy, now: float) -> dict[str, Any]:
        robots = [robot for robot in self._robots.values() if robot.policy_name == name and robot.left_at is None]
        return {
            "name": name,
            "embodiment": policy.embodiment.name,
            "action_horizon": policy.model.config.action_horizon,
            "action_size": policy.embodiment.action_size,
            "control_hz": policy.embodiment.control_hz,
            "robots": len(robots),
            "requests_per_second": _rounded(sum(robot.timeline.rate(now) for robot in robots)),
        }

    def chunk(self, number: int) -> dict[str, Any]:
        """JSON document of a robot's last chunk.

        Each dimension has its name, unit and values, their standard deviation over the samples (0 for a single sample),
        and the width of its range in the training data (0 if unknown).
        """
        robot, last = self._answered_robot(number)
        training_range, chunk = robot.policy.metadata.get("action_range"), last.answer["actions"]
        spans = np.zeros(chunk.shape[1])
        if training_range is not None:
            spans = np.subtract(training_range["high"], training_range["low"])
        std = last.answer.get("action_std", np.zeros_like(chunk))
        actions = robot.policy.embodiment.actions
        dimensions = zip(actions, spans.tolist(), chunk.T.tolist(), std.T.tolist(), strict=True)
        return {
            "request": robot.requests,
            "dimensions": [
                {
                    "name": dim.name,
                    "unit": dim.unit,
                    "span": _rounded(span),
                    "values": [*map(_rounded, values)],
                    "std": [*map(_rounded, stds)],
                }
                for dim, span, values, stds in dimensions
            ],
        }

    def image(self, number: int, camera: str) -> np.ndarray:
        """Last image of a camera (by the model's name for it), uint8 [h, w, 3]; not a copy if sent in that form."""
        robot, last = self._answered_robot(number)
        observation = flatten(last.observation)
        for each in robot.policy.embodiment.read_cameras:
            if each.name == camera and each.key is not None and observation.get(each.key) is not None:
                return each.read(observation[each.key])
        raise UnknownKeyError(f"Robot {number} has sent no image of a camera {camera!r:.80}.")

    def _answered_robot(self, number: int) -> tuple[Robot, Exchange]:
        robot = self._robots.get(number)
        if robot is None or robot.last is None:
            raise UnknownKeyError(f"Robot {number} is not connected, or has no answer yet.")
        return robot, robot.last


def _rounded(value: float | int) -> float | None:
    """The value with four significant digits, for plots; None for NaN and infinity, which JSON lacks."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def encode_jpeg(image: np.ndarray) -> bytes:
    """Encode an image [h, w, 3], shrunk to `MAX_SIDE` pixels; takes milliseconds, so not in the event loop."""
    small = Image.fromarray(np.ascontiguousarray(image))
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return file.getvalue()


@functools.cache
def dashboard_page() -> tuple[str, str]:
    """HTML of the page, and a Content-Security-Policy that allows only its own script, style and server."""
    style, script = style_sheet(), (assets() / "dashboard.js").read_text(encoding="utf-8")
    icon = '<link rel="icon" href="data:,">'  # keeps the browser from requesting a favicon
    page = (
        f'{page_head("torchpi serve", style, icon)}<body class="dashboard"><header class="top">'
        '<p class="eyebrow">torchpi serve</p><p id="note" role="status">connecting</p>'
        '<div class="facts" id="facts"></div></header>'
        '<main><section id="latency"></section><section id="robots"></section><section id="policies"></section></main>'
        f"{page_footer()}<script>{script}</script></body></html>"
    )
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style))
    script_source, style_source = (f"'sha256-{digest}'" for digest in digests)
    policy = (
        f"default-src 'none'; script-src {script_source}; style-src {style_source}; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy

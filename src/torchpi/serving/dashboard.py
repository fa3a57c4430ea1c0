"""The page at "/" of a server: what each robot sees, what it was answered, and how long that took.

The page asks again and again, and only its questions cost anything: images are encoded, and numbers written, when they
are asked for. Of each robot only the last answered request is kept, by reference, and a minute of counts per second.
Times are in seconds of `time.monotonic`. Nothing here waits or locks: all of it, `encode_jpeg` excepted, belongs to the
thread of the server's event loop.
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
from jaxtyping import Float

from torchpi.assets import assets
from torchpi.errors import UnknownKeyError
from torchpi.robots import Embodiment
from torchpi.robots.embodiment import value_at
from torchpi.serving.recorder import camera_image
from torchpi.serving.scheduler import Answer, ServedPolicy
from torchpi.transforms.prompt import as_text
from torchpi.types import PreviousChunk
from torchpi.ui.page import page_footer, page_head, style_sheet

SECONDS = 60
"""How far back the page looks."""
FORGET_AFTER = 10.0
"""Seconds that a robot which has left stays on the page."""
MAX_LEFT = 4
"""Robots that have left and stay, however many leave; the others are forgotten at once."""
MAX_SIDE = 480
"""Pixels of the longer side of an image on the page."""
_RATE_SECONDS = 5
"""Of which requests per second are the mean."""


@dataclasses.dataclass
class _Second:
    """The requests that were answered in one second."""

    at: int
    requests: int = 0
    queue: float = 0.0
    """Sum of the times that they waited for the model."""
    inference: float = 0.0
    """Sum of the times of their passes."""
    slowest: float = 0.0
    """Largest sum of both of one request."""


class Timeline:
    """Requests and their latency per second, of the last minute."""

    def __init__(self) -> None:
        self._seconds: collections.deque[_Second] = collections.deque(maxlen=SECONDS)

    def add(self, now: float, answer: Answer) -> None:
        """Count an answered request."""
        if not self._seconds or self._seconds[-1].at != int(now):
            self._seconds.append(_Second(int(now)))
        second = self._seconds[-1]
        second.requests += 1
        second.queue += answer.queue_seconds
        second.inference += answer.inference_seconds
        second.slowest = max(second.slowest, answer.queue_seconds + answer.inference_seconds)

    def rows(self, now: float) -> list[dict[str, float | int]]:
        """The seconds with requests, the oldest first."""
        return [
            {
                "ago": int(now) - each.at,
                "requests": each.requests,
                "queue_ms": round(1e3 * each.queue / each.requests, 3),
                "infer_ms": round(1e3 * each.inference / each.requests, 3),
                "slowest_ms": round(1e3 * each.slowest, 3),
            }
            for each in self._seconds
            if int(now) - each.at < SECONDS
        ]

    def rate(self, now: float) -> float:
        """Requests per second, the mean of the last five whole seconds."""
        return sum(each.requests for each in self._seconds if 1 <= int(now) - each.at <= _RATE_SECONDS) / _RATE_SECONDS


@dataclasses.dataclass(frozen=True)
class _Turn:
    """One answered request."""

    observation: Mapping[str, Any]
    chunk: Float[np.ndarray, "H a"]
    asked_at: float
    answered_at: float
    continues: bool
    """It came with real-time fields: its first action belongs to the moment of the request, not of the answer."""


@dataclasses.dataclass
class Robot:
    """One connection, as the page shows it."""

    number: int
    policy: str
    """The policy's name."""
    address: str
    embodiment: Embodiment
    default_prompt: str | None
    action_range: Mapping[str, list[float]] | None
    """ "low" and "high" of each dimension of an action in the training data; None: not known."""
    left_at: float | None = None
    requests: int = 0
    """Answered ones."""
    last: _Turn | None = None
    asked_at: float | None = None
    """When the request came that is not answered yet; None: there is none."""
    prefix: PreviousChunk | None = None
    """The real-time fields of this request."""
    error: str | None = None
    """Of the last request, if it was answered with one."""
    timeline: Timeline = dataclasses.field(default_factory=Timeline)

    def executed(self, now: float) -> dict[str, Any] | None:
        """How many actions of the last chunk have been executed, and how we know.

        Returns:
            {"steps", "how"}: "reported", by the request that is waiting; or "estimated", from the time since the chunk
            and the control rate, up to the next request or the robot's leaving. None: there is no chunk, or no rate.
        """
        if self.last is None:
            return None
        horizon = len(self.last.chunk)
        if self.prefix is not None:
            return {"steps": self.prefix.steps_executed(horizon), "how": "reported"}
        if self.embodiment.control_hz is None:
            return None
        begin = self.last.asked_at if self.last.continues else self.last.answered_at
        # A client without real-time chunking may wait for its answer, so nothing is said of the time after its request.
        ends = [time for time in (self.asked_at, self.left_at) if time is not None]
        seconds = min([now, *ends]) - begin
        return {"steps": min(horizon, max(0, math.floor(seconds * self.embodiment.control_hz))), "how": "estimated"}


class Dashboard:
    """What a server tells its page."""

    def __init__(self) -> None:
        self._robots: dict[int, Robot] = {}
        self._timeline = Timeline()

    # ---- what the server reports ----

    def join(self, number: int, name: str, policy: ServedPolicy, address: str) -> Robot:
        """A client is connected to the policy of this name."""
        metadata = policy.metadata
        robot = Robot(
            number, name, address, policy.embodiment, metadata.get("default_prompt"), metadata.get("action_range")
        )
        self._robots[number] = robot
        return robot

    def asked(self, robot: Robot, prefix: PreviousChunk | None, now: float) -> None:
        """A valid request has come."""
        robot.asked_at, robot.prefix = now, prefix

    def answered(self, robot: Robot, observation: Mapping[str, Any], answer: Answer, now: float) -> None:
        """It was answered."""
        assert robot.asked_at is not None
        continues = robot.prefix is not None
        robot.last = _Turn(observation, answer.chunk["actions"], robot.asked_at, now, continues)
        robot.requests += 1
        robot.asked_at = robot.prefix = robot.error = None
        for timeline in (robot.timeline, self._timeline):
            timeline.add(now, answer)

    def failed(self, robot: Robot, error: str) -> None:
        """It was answered with an error."""
        robot.asked_at = robot.prefix = None
        robot.error = error

    def leave(self, robot: Robot, now: float) -> None:
        """The client has left; it is shown for some seconds, if it ever was answered."""
        robot.left_at = now
        robot.asked_at = robot.prefix = None
        if robot.last is None:
            self._robots.pop(robot.number, None)
        left = [number for number, each in self._robots.items() if each.left_at is not None]
        for number in left[:-MAX_LEFT]:
            del self._robots[number]

    def forget(self, now: float) -> None:
        """Drop those that have left long enough ago."""
        for robot in list(self._robots.values()):
            if robot.left_at is not None and now - robot.left_at >= FORGET_AFTER:
                del self._robots[robot.number]

    # ---- what the page asks for ----

    def summary(self, now: float, policies: Mapping[str, ServedPolicy], **server: Any) -> dict[str, Any]:
        """Everything but chunks and images, as JSON.

        Args:
            server: facts of the server as a whole.
        """
        self.forget(now)
        return {
            **server,
            "requests_per_second": _short(self._timeline.rate(now)),
            "timeline": self._timeline.rows(now),
            "policies": [self._policy(name, policy, now) for name, policy in policies.items()],
            "robots": [_describe(robot, now) for robot in self._robots.values()],
        }

    def chunk(self, number: int) -> dict[str, Any]:
        """The last chunk of a robot, as JSON: per dimension its name, its unit, the width of its range in the training
        data (0: not known) and its values.
        """
        robot, turn = self._answered_robot(number)
        trained = robot.action_range
        spans = np.zeros(turn.chunk.shape[1]) if trained is None else np.subtract(trained["high"], trained["low"])
        return {
            "request": robot.requests,
            "dimensions": [
                {
                    "name": dim.name,
                    "unit": dim.unit,
                    "span": _short(span),
                    "values": [_short(value) for value in values],
                }
                for dim, span, values in zip(
                    robot.embodiment.actions, spans.tolist(), turn.chunk.T.tolist(), strict=True
                )
            ],
        }

    def image(self, number: int, camera: str) -> np.ndarray:
        """uint8 [h, w, 3]: the last image of a robot's camera, by the model's name for it; not copied where the robot
        sends it in this form.
        """
        robot, turn = self._answered_robot(number)
        for each in robot.embodiment.read_cameras:
            if each.name == camera and (image := camera_image(each, turn.observation)) is not None:
                return image
        raise UnknownKeyError(f"Robot {number} has sent no image of a camera {camera!r:.80}.")

    def _policy(self, name: str, policy: ServedPolicy, now: float) -> dict[str, Any]:
        robots = [robot for robot in self._robots.values() if robot.policy == name and robot.left_at is None]
        return {
            "name": name,
            "embodiment": policy.embodiment.name,
            "action_horizon": policy.model.config.action_horizon,
            "action_size": policy.embodiment.action_size,
            "control_hz": policy.embodiment.control_hz,
            "robots": len(robots),
            "requests_per_second": _short(sum(robot.timeline.rate(now) for robot in robots)),
        }

    def _answered_robot(self, number: int) -> tuple[Robot, _Turn]:
        robot = self._robots.get(number)
        if robot is None or robot.last is None:
            raise UnknownKeyError(f"Robot {number} is not here, or has no answer yet.")
        return robot, robot.last


def encode_jpeg(image: np.ndarray) -> bytes:
    """An image [h, w, 3] for the page, `MAX_SIDE` pixels at most; takes milliseconds, so not in the event loop."""
    from PIL import Image  # only where somebody looks

    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()


@functools.cache
def dashboard_page() -> tuple[str, str]:
    """The page as HTML, and its Content-Security-Policy: its own script and style, its own server, nothing else."""
    style, script = style_sheet(), (assets() / "dashboard.js").read_text(encoding="utf-8")
    icon = '<link rel="icon" href="data:,">'  # spares the server a request
    page = (
        f'{page_head("torchpi serve", style, icon)}<body class="dashboard"><header class="top">'
        '<p class="eyebrow">torchpi serve</p><p id="note" role="status">connecting</p>'
        '<div class="facts" id="facts"></div></header>'
        '<main><section id="latency"></section><section id="robots"></section><section id="policies"></section></main>'
        f"{page_footer()}<script>{script}</script></body></html>"
    )
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _describe(robot: Robot, now: float) -> dict[str, Any]:
    """One robot of the summary."""
    told: dict[str, Any] = {
        "number": robot.number,
        "policy": robot.policy,
        "address": robot.address,
        "requests": robot.requests,
        "requests_per_second": _short(robot.timeline.rate(now)),
        "left": robot.left_at is not None,
        "waits_seconds": None if robot.asked_at is None else _short(now - robot.asked_at),
        "error": robot.error,
        "timeline": robot.timeline.rows(now),
        "answered": None,
    }
    if (turn := robot.last) is not None:
        prompt = turn.observation.get("prompt")
        told["answered"] = {
            "seconds_ago": _short(now - turn.answered_at),
            "prompt": as_text(robot.default_prompt if prompt is None else prompt),
            "cameras": [
                {
                    "name": camera.name,
                    "key": camera.key,
                    "sent": camera.key is not None and value_at(turn.observation, camera.key) is not None,
                }
                for camera in robot.embodiment.read_cameras
            ],
            "state": _state(robot.embodiment, turn.observation),
            "executed": robot.executed(now),
            "horizon": len(turn.chunk),
            "control_hz": robot.embodiment.control_hz,
        }
    return told


def _state(embodiment: Embodiment, observation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The state's dimensions that were sent; the last ones may be missing."""
    return [
        {"name": name, "value": _short(value)}
        for part in embodiment.state
        for name, value in zip(part.names, np.atleast_1d(value_at(observation, part.key)).tolist(), strict=False)
    ]


def _short(value: float | int) -> float | None:
    """A number with the four digits that a plot shows; JSON has neither NaN nor infinity: None."""
    return float(f"{value:.4g}") if math.isfinite(value) else None

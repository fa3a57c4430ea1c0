"""vla-eval's protocol: a benchmark of the vla-evaluation-harness is the client (`torchpi serve --protocol vla-eval`).

Each frame is a msgpack map of type, payload, seq and timestamp (https://github.com/allenai/vla-evaluation-harness,
version 1 of its protocol). "hello" is answered by what the policy reads and returns; "observation" by the "action" of
one step, under the same seq: of the chunk's first `execute_steps` actions one after the other, then of a new chunk.
"episode_start" and "episode_end" have no answer and end the chunk; everything else is answered by an "error".
"""

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
from websockets.frames import CloseCode

from torchpi.errors import ServingError, is_whole
from torchpi.robots import Embodiment, get_embodiment
from torchpi.serving.connection import Connection
from torchpi.serving.dashboard import Robot
from torchpi.serving.messages import MAX_ITEMS, RequestError, RequestOptions, check_observation
from torchpi.serving.scheduler import Answer
from torchpi.version import __version__
from torchpi_client.protocol import JPEG, PNG
from torchpi_client.wire import decode_map, hooks

_log = logging.getLogger(__name__)

PROTOCOL = 1
"""The version in a hello; vla-eval 0.8.0 has it."""
_FIELDS = ("type", "payload", "seq", "timestamp")
_KINDS = ("hello", "observation", "episode_start", "episode_end", "error")
_ENCODED = {"jpeg": JPEG, "png": PNG}

# LIBERO in the harness' words: keys, and name, dimensions and format of action and state.
_LIBERO = ("images.agentview=observation/image", "images.wrist=observation/wrist_image", "states=observation/state")
_LIBERO_ACTION = (("position", 3, "delta_xyz"), ("rotation", 3, "axis_angle"), ("gripper", 1, "binary_close_positive"))
_LIBERO_STATE = ("state", 8, "eef_pos3_axisangle3_gripper2")


def key_sources(robot: Embodiment, rename: Sequence[str]) -> dict[str, str]:
    """The benchmark's key, nested ones joined by '.', for each key of the robot's observation; `rename` has them as
    "BENCHMARKS_KEY=KEY", and is by default LIBERO's for its robot."""
    presence = {camera.key: camera.presence for camera in robot.read_cameras if camera.key}
    presence |= {part.key: "required" for part in robot.state}
    sources: dict[str, str] = {}
    for text in rename or (_LIBERO if _is_libero(robot) else ()):
        name, _, key = text.rpartition("=")
        if not name or key not in presence or key in sources:
            raise ServingError(
                f"--rename has {text!r}; expected BENCHMARKS_KEY=KEY, once for each key of embodiment {robot.name!r}: "
                f"{', '.join(presence)}."
            )
        sources[key] = name
    missing = [key for key in presence if key not in sources]
    if required := [key for key in missing if presence[key] == "required"]:
        raise ServingError(
            f"Embodiment {robot.name!r} reads {', '.join(required)}, for which no key of a benchmark is known; give "
            "all of them by --rename BENCHMARKS_KEY=KEY, for example --rename images.agentview=KEY states=KEY."
        )
    if missing:
        _log.warning("no --rename gives %s: the model does not see these cameras", ", ".join(missing))
    return sources


def _is_libero(robot: Embodiment) -> bool:
    """True for openpi's interface to LIBERO: the same observations, and the same actions for the simulator."""
    libero = get_embodiment("libero")
    return (robot.observation_format, robot.action_names) == (libero.observation_format, libero.action_names)


class BenchmarkConnection(Connection):
    """A benchmark as the client of a policy."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._robot = self._state.policies[self._policy].embodiment
        self._sources = key_sources(self._robot, self._state.settings.rename)
        self._welcomed, self._seq = False, 0
        self._actions: deque[np.ndarray] = deque()
        """The chunk's actions that are still to be executed."""
        self._observation: dict[str, Any] | None = None
        """The observation for the model."""

    async def _greet(self) -> None:
        """The client speaks first."""

    async def _receive(self, robot: Robot) -> str | bytes:
        """The next observation for the model; all else is answered here."""
        while True:
            frame, code = await self.websocket.recv(), ""
            try:
                reply = self._reply(frame)
            except RequestError as error:
                code, reply = error.code, self._error_frame(self._failure(error))
                self._state.dashboard.failed(robot, f"{code}: {error}")
                self._state.metrics.requests.labels(self._policy, code).inc()
            if self._observation is not None:
                return frame
            if reply is not None:
                await self.websocket.send(reply)
            self._done_with(frame)
            if code == "malformed_message":
                await self.websocket.close(CloseCode.INVALID_DATA, "malformed message")

    def _reply(self, frame: str | bytes) -> bytes | None:
        """The answer to a message; None: it has none, or the model answers `_observation`."""
        self._observation, self._seq = None, 0
        kind, payload, self._seq = _read_message(frame)
        if kind not in _KINDS:
            raise RequestError("unknown_message", f"The type is {_brief(kind)}; expected {', '.join(_KINDS)}.")
        if kind == "error":
            _log.warning("client %d: it reports the error %s", self._number, _brief(payload.get("error"), 500))
            return None
        if kind == "hello":
            return self._hello(payload)
        if not self._welcomed:
            raise RequestError("protocol_version", f"{kind} came before a hello with protocol_version {PROTOCOL}.")
        if kind != "observation":
            self._actions.clear()
            return None
        observation = self._renamed(payload)  # of each step: an error is said at once
        if self._actions:
            return _frame("action", {"actions": self._actions.popleft()}, self._seq)
        self._observation = observation
        return None

    def _hello(self, payload: Mapping[Any, Any]) -> bytes:
        """The server's hello: which observations the benchmark shall send, and which actions it gets."""
        found = payload.get("protocol_version")
        self._welcomed = is_whole(found) and found == PROTOCOL
        if not self._welcomed:
            raise RequestError(
                "protocol_version",
                f"The client (vla-eval {_brief(payload.get('harness_version'))}) speaks version {_brief(found)} of the "
                f"protocol; this server speaks version {PROTOCOL}: install another vla-eval, or another torchpi.",
            )
        self._actions.clear()
        cameras = (self._sources.get(camera.key or "") for camera in self._robot.read_cameras)
        images = [name.removeprefix("images.") for name in cameras if name]
        params = {"send_wrist_image": len(images) > 1, "send_state": bool(self._robot.state)}
        # robosuite's axis-angle keeps the quaternion's sign, and so do the data that policies are trained on; this
        # benchmark flips it unless it is asked not to.
        params["quat_no_antipodal"] = "libero" in _brief(payload.get("benchmark"), 500).lower()
        is_libero = _is_libero(self._robot)
        reply = {
            "harness_version": f"torchpi {__version__}",
            "protocol_version": PROTOCOL,
            "model_server": "torchpi",
            "capabilities": {},
            "observation_params": {name: True for name, needed in params.items() if needed},
            "observation_spec": {name: _spec("image", 0, "rgb_hwc_uint8") for name in images}
            | {"language": _spec("language", 0, "language")}
            | ({"state": _spec(*_LIBERO_STATE)} if is_libero else {}),
            "action_spec": {each[0]: _spec(*each) for each in _LIBERO_ACTION} if is_libero else {},
        }
        return _frame("hello", reply, self._seq)

    def _renamed(self, payload: Mapping[Any, Any]) -> dict[str, Any]:
        """The benchmark's observation as the robot's, flat."""
        try:
            found = dict(_leaves(check_observation(payload)))
            if lacks := [name for name in self._sources.values() if name not in found]:
                raise ServingError(
                    f"The observation lacks {', '.join(lacks)}; found {', '.join(found)}. Let the benchmark send it "
                    "(its params send_wrist_image, send_state), or start the server with another --rename."
                )
            observation = {key: found[name] for key, name in self._sources.items()}
            channels_first = {each.key for each in self._robot.read_cameras if each.layout == "chw"}
            for key in observation.keys() & channels_first:
                image = observation[key]  # benchmarks send [h, w, 3]
                observation[key] = {**image, "layout": "chw"} if isinstance(image, dict) else np.moveaxis(image, -1, 0)
        except ValueError as error:
            raise RequestError("bad_observation", str(error)) from error
        return observation | ({"prompt": found["task_description"]} if "task_description" in found else {})

    def _read(self, message: str | bytes, noise_shape: tuple[int, ...]) -> tuple[dict[str, Any], RequestOptions]:
        assert self._observation is not None
        return self._observation, RequestOptions()

    def _answer_frame(self, answer: Answer, timing: dict[str, float]) -> bytes:
        self._actions = deque(answer.chunk["actions"][: self._robot.execute_steps])
        return _frame("action", {"actions": self._actions.popleft()}, self._seq)

    def _error_frame(self, error: RequestError) -> bytes:
        return _frame("error", {"error": f"{error.code}: {error}"}, self._seq)


def _read_message(frame: str | bytes) -> tuple[str, dict[Any, Any], int]:
    """Type, payload and seq of a frame, with arrays, and with images as torchpi-client sends them."""
    try:
        if isinstance(frame, str):
            raise ValueError("it is a text frame")
        content = msgpack.unpackb(frame, **hooks(MAX_ITEMS, _decode))
        kind, payload, seq, _ = [content[field] for field in _FIELDS]
        if isinstance(kind, str) and isinstance(payload, dict) and is_whole(seq):
            return kind, payload, seq
        raise ValueError(f"type is a {type(kind).__name__}, payload a {type(payload).__name__}, seq {_brief(seq)}")
    except (LookupError, TypeError, ValueError, msgpack.UnpackException) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        text = f"Cannot read the message: {reason}; expected vla-eval's msgpack map of {', '.join(_FIELDS)}."
        raise RequestError("malformed_message", text) from error


def _decode(value: dict[Any, Any]) -> Any:
    """The value of a map: an array, an image, which is decoded when the model needs it, or the map."""
    if "__image__" in value:
        if (kind := str(value.get("format"))) not in _ENCODED:
            raise ValueError(f"an image has the format {kind!r:.80}; expected png or jpeg")
        return {_ENCODED[kind]: value.get("data"), "layout": "hwc"}
    if "__ndarray__" in value:
        return decode_map({str(key).encode(): item for key, item in value.items()})
    return value


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values by their joined keys; an image is one."""
    for key, value in tree.items():
        if isinstance(value, dict) and not value.keys() & {JPEG, PNG}:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _brief(value: Any, length: int = 80) -> str:
    """A value that a client sent, as short text; of maps, lists and bytes the type, whatever their size."""
    return repr(value[:length] if isinstance(value, str) else value if isinstance(value, float | int) else type(value))


def _spec(name: str, dims: int, format: str) -> dict[str, Any]:
    return {"name": name, "dims": dims, "format": format}


def _frame(kind: str, payload: Mapping[str, Any], seq: int) -> bytes:
    def encode(array: np.ndarray) -> dict[str, Any]:
        return {"__ndarray__": True, "data": array.tobytes(), "dtype": array.dtype.str, "shape": list(array.shape)}

    message = {"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()}
    frame: bytes = msgpack.packb(message, default=encode)
    return frame

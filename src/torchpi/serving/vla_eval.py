"""vla-eval's protocol, for benchmarks of the vla-evaluation-harness (`torchpi serve --protocol vla-eval`).

Each frame is a msgpack map of type, payload, seq and timestamp (https://github.com/allenai/vla-evaluation-harness,
version 1 of its protocol). The answer to "hello" describes the policy's observations and actions. The answer to
"observation" is one "action" with the same seq: the first `execute_steps` actions of a chunk, one after the other, and
then those of a new chunk. "episode_start" and "episode_end" have no answer and drop the chunk. The answer to anything
else is an "error".
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
"""Protocol version in a hello, that of vla-eval 0.8.0."""
_FIELDS = ("type", "payload", "seq", "timestamp")
_TYPES = ("hello", "observation", "episode_start", "episode_end", "error")
_ENCODED = {"jpeg": JPEG, "png": PNG}

# LIBERO in the harness: keys, and name, number of dimensions and format of actions and state.
_LIBERO = ("images.agentview=observation/image", "images.wrist=observation/wrist_image", "states=observation/state")
_LIBERO_ACTION = (("position", 3, "delta_xyz"), ("rotation", 3, "axis_angle"), ("gripper", 1, "binary_close_positive"))
_LIBERO_STATE = ("state", 8, "eef_pos3_axisangle3_gripper2")


def key_sources(robot: Embodiment, rename: Sequence[str]) -> dict[str, str]:
    """Benchmark key (nested keys joined by '.') for each key of the robot's observation.

    Args:
        rename: pairs "BENCHMARK_KEY=KEY"; if empty, LIBERO's for LIBERO's robot.
    """
    presence = {camera.key: camera.presence for camera in robot.read_cameras if camera.key}
    presence |= {part.key: "required" for part in robot.state}
    sources: dict[str, str] = {}
    for pair in rename or (_LIBERO if _is_libero(robot) else ()):
        name, _, key = pair.rpartition("=")
        if not name or key not in presence or key in sources:
            raise ServingError(
                f"--rename has {pair!r}; expected BENCHMARK_KEY=KEY, once for each key of embodiment {robot.name!r}: "
                f"{', '.join(presence)}."
            )
        sources[key] = name
    missing = [key for key in presence if key not in sources]
    if required := [key for key in missing if presence[key] == "required"]:
        raise ServingError(
            f"Embodiment {robot.name!r} reads {', '.join(required)}, but no benchmark key is given for that; pass "
            "--rename BENCHMARK_KEY=KEY for all keys, for example --rename images.agentview=KEY states=KEY."
        )
    if missing:
        _log.warning("--rename lacks %s: the model does not see these cameras", ", ".join(missing))
    return sources


def _is_libero(robot: Embodiment) -> bool:
    """True if observations and actions are those of openpi's LIBERO embodiment."""
    libero = get_embodiment("libero")
    return (robot.observation_format, robot.action_names) == (libero.observation_format, libero.action_names)


class BenchmarkConnection(Connection):
    """A benchmark as the client of a policy."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._robot = self._state.policies[self._policy].embodiment
        self._sources = key_sources(self._robot, self._state.settings.rename)
        self._hello_accepted, self._seq = False, 0
        self._actions: deque[np.ndarray] = deque()
        """Remaining actions of the chunk."""
        self._observation: dict[str, Any] | None = None
        """Observation that the model answers."""

    async def _send_metadata(self) -> None:
        """Send nothing: in this protocol the client sends the first message."""

    async def _receive(self, robot: Robot) -> str | bytes:
        """The next observation for the model. Other messages are answered here."""
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
            self._release(frame)
            if code == "malformed_message":
                await self.websocket.close(CloseCode.INVALID_DATA, "malformed message")

    def _reply(self, frame: str | bytes) -> bytes | None:
        """Answer to a message; None if it has no answer, or if the model answers `_observation`."""
        self._observation, self._seq = None, 0
        message_type, payload, self._seq = _read_message(frame)
        if message_type not in _TYPES:
            raise RequestError("unknown_message", f"The type is {_brief(message_type)}; expected {', '.join(_TYPES)}.")
        if message_type == "error":
            _log.warning("client %d reports the error %s", self._number, _brief(payload.get("error"), 500))
            return None
        if message_type == "hello":
            return self._hello(payload)
        if not self._hello_accepted:
            raise RequestError(
                "protocol_version", f"{message_type} came before a hello with protocol_version {PROTOCOL}."
            )
        if message_type != "observation":
            self._actions.clear()
            return None
        observation = self._renamed(payload)  # in each step, to report errors immediately
        if self._actions:
            return _frame("action", {"actions": self._actions.popleft()}, self._seq)
        self._observation = observation
        return None

    def _hello(self, payload: Mapping[Any, Any]) -> bytes:
        """The server's hello: the observations that the benchmark must send, and the actions that it will get."""
        version = payload.get("protocol_version")
        self._hello_accepted = is_whole(version) and version == PROTOCOL
        if not self._hello_accepted:
            raise RequestError(
                "protocol_version",
                f"The client (vla-eval {_brief(payload.get('harness_version'))}) uses version {_brief(version)} of the "
                f"protocol; this server uses version {PROTOCOL}: install another vla-eval, or another torchpi.",
            )
        self._actions.clear()
        cameras = (self._sources.get(camera.key or "") for camera in self._robot.read_cameras)
        images = [name.removeprefix("images.") for name in cameras if name]
        params = {"send_wrist_image": len(images) > 1, "send_state": bool(self._robot.state)}
        # robosuite's axis-angle keeps the quaternion's sign, and so do the training data of policies. By default the
        # harness' LIBERO flips it.
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
        """The benchmark's observation under the robot's keys, flat."""
        try:
            values = dict(_leaves(check_observation(payload)))
            if missing := [name for name in self._sources.values() if name not in values]:
                raise ServingError(
                    f"The observation lacks {', '.join(missing)}; found {', '.join(values)}. Let the benchmark send it "
                    "(its params send_wrist_image, send_state), or start the server with another --rename."
                )
            observation = {key: values[name] for key, name in self._sources.items()}
            channels_first = {each.key for each in self._robot.read_cameras if each.layout == "chw"}
            for key in observation.keys() & channels_first:
                image = observation[key]  # benchmarks send [h, w, 3]
                observation[key] = {**image, "layout": "chw"} if isinstance(image, dict) else np.moveaxis(image, -1, 0)
        except ValueError as error:
            raise RequestError("bad_observation", str(error)) from error
        if "task_description" in values:
            observation["prompt"] = values["task_description"]
        return observation

    def _read(self, message: str | bytes, noise_shape: tuple[int, ...]) -> tuple[dict[str, Any], RequestOptions]:
        assert self._observation is not None
        return self._observation, RequestOptions()

    def _answer_frame(self, answer: Answer, timing: dict[str, float]) -> bytes:
        self._actions = deque(answer.chunk["actions"][: self._robot.execute_steps])
        return _frame("action", {"actions": self._actions.popleft()}, self._seq)

    def _error_frame(self, error: RequestError) -> bytes:
        return _frame("error", {"error": f"{error.code}: {error}"}, self._seq)


def _read_message(frame: str | bytes) -> tuple[str, dict[Any, Any], int]:
    """Type, payload and seq of a frame, with decoded arrays, and with images in torchpi-client's form."""
    try:
        if isinstance(frame, str):
            raise ValueError("it is a text frame")
        content = msgpack.unpackb(frame, **hooks(MAX_ITEMS, _decode))
        message_type, payload, seq, _ = [content[field] for field in _FIELDS]
        if isinstance(message_type, str) and isinstance(payload, dict) and is_whole(seq):
            return message_type, payload, seq
        types = f"the field type is of type {type(message_type).__name__}, payload of type {type(payload).__name__}"
        raise ValueError(f"{types}, seq {_brief(seq)}")
    except (LookupError, TypeError, ValueError, msgpack.UnpackException) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        text = f"Cannot read the message: {reason}; expected vla-eval's msgpack map of {', '.join(_FIELDS)}."
        raise RequestError("malformed_message", text) from error


def _decode(value: dict[Any, Any]) -> Any:
    """Decode a map into an array, an image (still encoded; it is decoded only for the model), or the map itself."""
    if "__image__" in value:
        image_format = str(value.get("format"))
        if image_format not in _ENCODED:
            raise ValueError(f"an image has the format {image_format!r:.80}; expected png or jpeg")
        return {_ENCODED[image_format]: value.get("data"), "layout": "hwc"}
    if "__ndarray__" in value:
        return decode_map({str(key).encode(): item for key, item in value.items()})
    return value


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values with their joined keys. An encoded image is one value."""
    for key, value in tree.items():
        if isinstance(value, dict) and not value.keys() & {JPEG, PNG}:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _brief(value: Any, length: int = 80) -> str:
    """Short text for a value from a client: only the type of maps, lists and bytes, which may be large."""
    if isinstance(value, str):
        return repr(value[:length])
    return repr(value if isinstance(value, float | int) else type(value))


def _spec(name: str, dims: int, format: str) -> dict[str, Any]:
    return {"name": name, "dims": dims, "format": format}


def _frame(message_type: str, payload: Mapping[str, Any], seq: int) -> bytes:
    def encode(array: np.ndarray) -> dict[str, Any]:
        return {"__ndarray__": True, "data": array.tobytes(), "dtype": array.dtype.str, "shape": list(array.shape)}

    message = {"type": message_type, "payload": payload, "seq": seq, "timestamp": time.time()}
    frame: bytes = msgpack.packb(message, default=encode)
    return frame

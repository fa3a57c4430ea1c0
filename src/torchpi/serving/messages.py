"""Parsing and validation of requests, and the form of errors.

A request is an observation: a map with the robot's own keys, as openpi's clients send it. It may also contain the
following options. The server's metadata list each option it supports, with the value True.

    torchpi/noise        floats [H, action_dim], drawn from N(0, 1), instead of the server's noise; refused above a
                         magnitude of 1e6. [R, H, action_dim] for a server with --num-samples R
    torchpi/num_steps    Euler steps, instead of the server's number
    torchpi/deadline     seconds the request may wait for the model, at most the server's deadline
    torchpi/rtc          rest of the chunk being executed, for real-time chunking; its actions, in the robot's units,
                         are refused above a magnitude of 1e12

An image may be a JPEG, {"torchpi/jpeg": bytes, "layout": "hwc" or "chw"}, or a PNG, {"torchpi/png": …}. torchpi_client
defines these forms and torchpi/rtc.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from torchpi.errors import ServingError, is_whole, printable
from torchpi.serving.settings import MAX_NUM_STEPS
from torchpi.transforms.prompt import invalid_code_point
from torchpi.types import PreviousChunk
from torchpi_client import unpack
from torchpi_client.images import decode_images
from torchpi_client.protocol import JPEG, PNG, RTC
from torchpi_client.protocol import PreviousChunk as WirePreviousChunk

OPTION_PREFIX = "torchpi/"
OPTIONS = ("torchpi/noise", "torchpi/num_steps", "torchpi/deadline", RTC)
SUPPORTED = dict.fromkeys((*OPTIONS, JPEG, PNG), True)
"""Entries of the metadata that announce the options and image formats."""
_ENCODED = (JPEG, PNG)

# Limits far above any robot's requests, and far below sizes that would delay other clients.
MAX_ITEMS = 10_000
MAX_DEPTH = 16
MAX_TEXT = 10_000
MAX_KEY = 256
"""Characters per key; keys of nested maps are joined for every value inside."""

# Limits on magnitudes. Models compute in float32, where larger numbers can overflow. That would fail the whole forward
# pass, which other requests share. Noise is drawn from N(0, 1). Actions may be in any unit, and normalizing them may
# multiply them by a million.
MAX_NOISE = 1e6
MAX_ACTION = 1e12
MAX_FLOAT32 = float(np.finfo(np.float32).max)


class RequestError(Exception):
    """The error that answers a request, in place of actions.

    Codes: malformed_message (also closes the connection), bad_observation, unsafe_actions, rate_limited, queue_full,
    deadline_exceeded, shutting_down, internal, and client_left, which is only counted. The message may quote client
    input, so it is made printable and cut to a few hundred characters.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(printable(message))
        self.code = code

    def frame(self) -> str:
        """Text frame with the error; openpi's clients raise its text."""
        return json.dumps({"code": self.code, "message": str(self)}, ensure_ascii=False)


@dataclasses.dataclass(frozen=True)
class RequestOptions:
    """Options of a request; None means the server's setting."""

    noise: np.ndarray | None = None
    num_steps: int | None = None
    deadline: float | None = None
    previous: PreviousChunk | None = None


def read_request(message: str | bytes, *, noise_shape: tuple[int, ...]) -> tuple[dict[str, Any], RequestOptions]:
    """Observation and options of a message; `noise_shape` is the expected shape of torchpi/noise."""
    if isinstance(message, str):
        raise RequestError("malformed_message", "The request is a text frame; expected a binary frame with msgpack.")
    try:
        content = unpack(message, max_items=MAX_ITEMS)
    except ValueError as error:
        raise RequestError("malformed_message", str(error)) from error
    try:
        if not isinstance(content, dict):
            raise ServingError(
                f"A request is a map with the robot's keys; found a value of type {type(content).__name__}."
            )
        return check_observation(content), _options(content, noise_shape)
    except ValueError as error:
        raise RequestError("bad_observation", str(error)) from error


def check_observation(content: Mapping[Any, Any]) -> dict[str, Any]:
    """The observation in a request; raises a ServingError for values that no robot sends."""
    for key, value in _leaves(content):
        _check_leaf(value, key)
    observation = {key: value for key, value in content.items() if not key.startswith(OPTION_PREFIX)}
    for key, value in _leaves(observation):  # options have their own limits
        _check_float32(value, key)
    return observation


def decode_encoded(observation: dict[str, Any], *, max_bytes: int) -> dict[str, Any]:
    """Replace JPEGs and PNGs by arrays, which may have `max_bytes` in total."""
    try:
        return decode_images(observation, max_pixels=max_bytes // 3 // max(1, count_encoded(observation)))
    except ValueError as error:
        raise RequestError("bad_observation", str(error)) from error


def count_encoded(value: Any) -> int:
    """Number of JPEGs and PNGs in an observation."""
    if not isinstance(value, dict):
        return 0
    return sum(key in _ENCODED or count_encoded(item) for key, item in value.items())


def _leaves(value: Any, key: str = "the observation", depth: int = MAX_DEPTH) -> Iterator[tuple[str, Any]]:
    """Each value that is not a map or list, with its key. JPEGs and PNGs are checked by their decoder instead."""
    if isinstance(value, dict | list) and depth == 0:
        raise ServingError(f"{key} is nested more than {MAX_DEPTH} deep.")
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                raise ServingError(f"{key} has the key {name[:80]!r}; expected text.")
            if len(name) > MAX_KEY:
                raise ServingError(
                    f"{key} has a key of {len(name)} characters; expected at most {MAX_KEY}: {name:.80}."
                )
            if name not in _ENCODED:
                yield from _leaves(item, name, depth - 1)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, key, depth - 1)
    else:
        yield key, value


def _check_leaf(value: Any, key: str) -> None:
    """Refuse long text, invalid Unicode, and floats for which PyTorch has no dtype."""
    if isinstance(value, str | bytes) and len(value) > MAX_TEXT:
        raise ServingError(f"{key} is a text of {len(value)} characters; expected at most {MAX_TEXT}.")
    if not isinstance(value, np.ndarray | np.generic):
        return
    dtype = value.dtype
    if dtype.kind == "f" and dtype.itemsize > 8:
        raise ServingError(f"{key} is {dtype}; expected floating-point numbers of at most 64 bits.")
    if dtype.kind in "US" and value.nbytes > 4 * MAX_TEXT:
        raise ServingError(f"{key} is text of {value.nbytes} bytes; expected at most {4 * MAX_TEXT}.")
    if (code := invalid_code_point(value)) is not None:  # msgpack's own strings are valid Unicode
        raise ServingError(f"{key} is text with the code point {code:#x}; expected Unicode characters.")


def _check_float32(value: Any, key: str) -> None:
    """Refuse finite numbers that overflow in float32. The embodiment refuses NaN and infinity, naming the dimension."""
    if not isinstance(value, np.ndarray | float):
        return
    array = np.asarray(value)
    if array.dtype.kind != "f" or array.dtype.itemsize <= 4:
        return
    magnitude = _magnitude(array)
    if MAX_FLOAT32 < magnitude < math.inf:
        raise ServingError(
            f"{key} is beyond float32: it reaches a magnitude of {magnitude:.3g}; expected at most {MAX_FLOAT32:.3g}."
        )


def _magnitude(array: np.ndarray) -> float:
    """Largest absolute value, computed without a copy; 0 for an empty array, NaN if any value is NaN."""
    return max(float(array.max(initial=0)), -float(array.min(initial=0)))


def _options(content: Mapping[str, Any], noise_shape: tuple[int, ...]) -> RequestOptions:
    if unknown := sorted(key for key in content if key.startswith(OPTION_PREFIX) and key not in OPTIONS):
        raise ServingError(
            f"The request has the unknown option {unknown[0]:.80}; this server supports {', '.join(OPTIONS)}."
        )
    noise, num_steps, deadline, previous = (content.get(name) for name in OPTIONS)
    if noise is not None:
        is_array = isinstance(noise, np.ndarray)
        if not is_array or noise.dtype.kind != "f" or noise.shape != noise_shape:
            found = f"{noise.dtype} {list(noise.shape)}" if is_array else f"a value of type {type(noise).__name__}"
            raise ServingError(f"torchpi/noise is {found}; expected floating-point numbers {list(noise_shape)}.")
        if not np.isfinite(noise).all():
            raise ServingError("torchpi/noise contains NaN or infinity; it must be finite.")
        _check_magnitude(noise, "torchpi/noise", MAX_NOISE, "it is drawn from N(0, 1)")
        noise = noise.astype(np.float32)
    if num_steps is not None:
        if not is_whole(num_steps) or not 1 <= num_steps <= MAX_NUM_STEPS:
            raise ServingError(
                f"torchpi/num_steps is {num_steps!r:.80}; expected a whole number from 1 to {MAX_NUM_STEPS}."
            )
        num_steps = int(num_steps)
    if deadline is not None:
        if not (is_whole(deadline) or isinstance(deadline, float | np.floating)) or not deadline > 0:
            raise ServingError(f"torchpi/deadline is {deadline!r:.80}; expected a positive number of seconds.")
        deadline = float(deadline)
    if previous is not None:
        parsed = WirePreviousChunk.from_wire(previous)
        _check_magnitude(parsed.actions, f"action_prefix of {RTC}", MAX_ACTION, "no robot's actions are that large")
        previous = PreviousChunk(parsed.actions, parsed.delay, parsed.execution_horizon)
        previous.steps_executed(noise_shape[-2])  # raises if it does not fit the horizon
    return RequestOptions(noise, num_steps, deadline, previous)


def _check_magnitude(array: np.ndarray, key: str, limit: float, reason: str) -> None:
    magnitude = _magnitude(array)
    if magnitude > limit:
        raise ServingError(f"{key} reaches a magnitude of {magnitude:.3g}; expected at most {limit:g}: {reason}.")

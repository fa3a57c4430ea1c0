"""The wire messages: requests, which are validated before anything is done with them, answers, and errors.

A request is an observation, a map with the robot's own keys, as openpi's clients send it. Options of the request may
stand next to these, under keys of their own; the metadata have each that a server knows, as True:

    torchpi/noise        floating-point [H, action_dim], the start of the flow, instead of the server's own; drawn from
                         N(0, 1), and refused above a magnitude of 1e6; [N, H, action_dim] of a server with
                         --num-samples N
    torchpi/num_steps    Euler steps, instead of the server's
    torchpi/deadline     seconds that the request may wait for the model, at most the server's
    torchpi/rtc          the rest of the chunk that is being executed, for real-time chunking; its actions, in the
                         robot's units, are refused above a magnitude of 1e12

An image may be a JPEG, {"torchpi/jpeg": bytes, "layout": "hwc" or "chw"}, or a PNG, {"torchpi/png": …}; these forms and
torchpi/rtc are torchpi_client's.
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
"""A part of the metadata."""
_ENCODED = (JPEG, PNG)

# Far above what a robot sends, far below what would hold up the others.
MAX_ITEMS = 10_000
MAX_DEPTH = 16
MAX_TEXT = 10_000
MAX_KEY = 256
"""Characters of a key: those of nested maps are joined for every value within."""

# Magnitudes. Models compute in float32, and larger numbers overflow there sooner or later: the request would fail, and
# with it the forward pass that others share. Noise is drawn from N(0, 1); actions are in the robot's units, whatever
# these are, and normalizing them may multiply them by a million.
MAX_NOISE = 1e6
MAX_ACTION = 1e12
MAX_FLOAT32 = float(np.finfo(np.float32).max)


class RequestError(Exception):
    """The reason why a request is not answered with actions, for the client.

    Codes: malformed_message (the connection is closed as well), bad_observation, unsafe_actions, rate_limited,
    queue_full, deadline_exceeded, shutting_down, internal; client_left, which nobody receives. The message is made
    printable, and cut to some hundred characters: it may quote what the client sent.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(printable(message))
        self.code = code

    def frame(self) -> str:
        """The text frame; existing clients raise its text."""
        return json.dumps({"code": self.code, "message": str(self)}, ensure_ascii=False)


@dataclasses.dataclass(frozen=True)
class RequestOptions:
    """The options of a request; None: the server's own."""

    noise: np.ndarray | None = None
    num_steps: int | None = None
    deadline: float | None = None
    previous: PreviousChunk | None = None


def read_request(message: str | bytes, *, noise_shape: tuple[int, ...]) -> tuple[dict[str, Any], RequestOptions]:
    """The observation and the options in one message; `noise_shape` is that of a request."""
    if isinstance(message, str):
        raise RequestError("malformed_message", "A request came as a text frame; expected a binary one with msgpack.")
    try:
        content = unpack(message, max_items=MAX_ITEMS)
    except ValueError as error:
        raise RequestError("malformed_message", str(error)) from error
    try:
        if not isinstance(content, dict):
            raise ServingError(f"A request is a map with the robot's keys; found a {type(content).__name__}.")
        return check_observation(content), _options(content, noise_shape)
    except ValueError as error:
        raise RequestError("bad_observation", str(error)) from error


def check_observation(content: Mapping[Any, Any]) -> dict[str, Any]:
    """The observation in a request's content; a ServingError for values that no robot sends."""
    for where, value in _leaves(content):
        _check_leaf(value, where)
    observation = {key: value for key, value in content.items() if not key.startswith(OPTION_PREFIX)}
    for where, value in _leaves(observation):  # options have limits of their own
        _check_float32(value, where)
    return observation


def decode_encoded(observation: dict[str, Any], *, max_bytes: int) -> dict[str, Any]:
    """The observation with arrays in place of JPEGs and PNGs, which have at most `max_bytes` together."""
    try:
        return decode_images(observation, max_pixels=max_bytes // 3 // max(1, count_encoded(observation)))
    except ValueError as error:
        raise RequestError("bad_observation", str(error)) from error


def count_encoded(value: Any) -> int:
    """Number of images in an observation that are JPEGs or PNGs."""
    return sum(key in _ENCODED or count_encoded(item) for key, item in value.items()) if isinstance(value, dict) else 0


def _leaves(value: Any, where: str = "the observation", depth: int = MAX_DEPTH) -> Iterator[tuple[str, Any]]:
    """The key of every value that is no map or list, and the value; JPEGs and PNGs are left to their decoder."""
    if isinstance(value, dict | list) and depth == 0:
        raise ServingError(f"{where} is nested more than {MAX_DEPTH} deep.")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ServingError(f"{where} has the key {key[:80]!r}; expected text.")
            if len(key) > MAX_KEY:
                raise ServingError(
                    f"{where} has a key of {len(key)} characters; expected at most {MAX_KEY}: {key:.80}."
                )
            if key not in _ENCODED:
                yield from _leaves(item, key, depth - 1)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, where, depth - 1)
    else:
        yield where, value


def _check_leaf(value: Any, where: str) -> None:
    """Refuse long text, text that is not Unicode, and floats that PyTorch has no dtype for."""
    if isinstance(value, str | bytes) and len(value) > MAX_TEXT:
        raise ServingError(f"{where} is a text of {len(value)} characters; expected at most {MAX_TEXT}.")
    if not isinstance(value, np.ndarray | np.generic):
        return
    dtype = value.dtype
    if dtype.kind == "f" and dtype.itemsize > 8:
        raise ServingError(f"{where} is {dtype}; expected floating-point numbers of at most 64 bits.")
    if dtype.kind in "US" and value.nbytes > 4 * MAX_TEXT:
        raise ServingError(f"{where} is text of {value.nbytes} bytes; expected at most {4 * MAX_TEXT}.")
    if (code := invalid_code_point(value)) is not None:  # in msgpack's own text there is none
        raise ServingError(f"{where} is text with the code point {code:#x}; expected Unicode characters.")


def _check_float32(value: Any, where: str) -> None:
    """Refuse numbers that are finite, but not in float32. NaN and infinity are left to the embodiment, which names the
    dimension."""
    if not isinstance(value, np.ndarray | float):
        return
    array = np.asarray(value)
    if array.dtype.kind == "f" and array.dtype.itemsize > 4 and MAX_FLOAT32 < (found := _magnitude(array)) < math.inf:
        raise ServingError(
            f"{where} is beyond float32: it reaches a magnitude of {found:.3g}; expected at most {MAX_FLOAT32:.3g}."
        )


def _magnitude(array: np.ndarray) -> float:
    """The largest absolute value, without a copy; 0 if there is none, NaN if one is NaN."""
    return max(float(array.max(initial=0)), -float(array.min(initial=0)))


def _options(content: Mapping[str, Any], noise_shape: tuple[int, ...]) -> RequestOptions:
    if unknown := sorted(key for key in content if key.startswith(OPTION_PREFIX) and key not in OPTIONS):
        raise ServingError(
            f"The request has the unknown option {unknown[0]:.80}; this server knows {', '.join(OPTIONS)}."
        )
    noise, num_steps, deadline, previous = (content.get(name) for name in OPTIONS)
    if noise is not None:
        is_array = isinstance(noise, np.ndarray)
        if not is_array or noise.dtype.kind != "f" or noise.shape != noise_shape:
            found = f"{noise.dtype} {list(noise.shape)}" if is_array else f"a {type(noise).__name__}"
            raise ServingError(f"torchpi/noise is {found}; expected floating-point numbers {list(noise_shape)}.")
        if not np.isfinite(noise).all():
            raise ServingError("There is NaN or infinity in torchpi/noise; it must be finite.")
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
        sent = WirePreviousChunk.from_wire(previous)
        _check_magnitude(sent.actions, f"action_prefix of {RTC}", MAX_ACTION, "no robot's actions are as large")
        previous = PreviousChunk(sent.actions, sent.delay, sent.execution_horizon)
        previous.steps_executed(noise_shape[-2])  # raises
    return RequestOptions(noise, num_steps, deadline, previous)


def _check_magnitude(array: np.ndarray, where: str, limit: float, reason: str) -> None:
    if (found := _magnitude(array)) > limit:
        raise ServingError(f"{where} reaches a magnitude of {found:.3g}; expected at most {limit:g}: {reason}.")

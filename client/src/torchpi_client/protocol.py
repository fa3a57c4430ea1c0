"""torchpi's extensions of openpi's protocol.

A client sends a field only if the server's metadata have the field's name with the value True. Other servers never see
the extensions.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from torchpi_client.wire import unpack

RTC = "torchpi/rtc"
"""Request field for real-time chunking, with `PreviousChunk.to_wire` as its value; not in the first request."""

DEADLINE = "torchpi/deadline"
"""Request field: the seconds it may wait for the model. The server drops a request that waits longer."""

JPEG = "torchpi/jpeg"
"""Key of the map that replaces an image in a request, see `images.encode_images`."""

PNG = "torchpi/png"
"""The same for PNG, which is lossless."""

BUSY = ("deadline_exceeded", "queue_full", "rate_limited", "shutting_down")
"""Error codes of a busy server: the next request may succeed."""


def closing(error: ConnectionClosed) -> str:
    """Verb phrase for how the other side's connection ended, such as "went away without closing"."""
    if error.rcvd is not None and error.rcvd_then_sent is not False:
        close, verb = error.rcvd, "closed the connection"
    elif error.sent is not None:
        close, verb = error.sent, "was disconnected"
    else:
        return "went away without closing"
    return verb if close.code == CloseCode.NORMAL_CLOSURE else f"{verb}: {close.reason or close}"


class ServerError(RuntimeError):
    """The server answered with an error, or serves another policy than before; the message holds its text."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        """torchpi's code for the error, such as "bad_observation"; None if the server sent none."""


@dataclasses.dataclass(frozen=True)
class PreviousChunk:
    """The rest of the chunk being executed, on which the next chunk is conditioned.

    This is real-time chunking (https://arxiv.org/abs/2506.07339). With H the horizon, s = `execution_horizon`, d =
    `delay` and k = len(actions): k ≤ H − s and d ≤ k. Action i of the new chunk is for the same step as `actions[i]`.
    From k on there are no previous actions: they are masked, not zero.

    Raises:
        ValueError: the actions are empty or not finite, or a number is out of range.
    """

    actions: np.ndarray
    """float32 [k, a], in the robot's units: the previous chunk's actions not yet executed when inference starts."""
    delay: int
    """d, in control steps: the number of `actions` that will have been executed when the new chunk arrives."""
    execution_horizon: int
    """s, in control steps: the number of actions of the previous chunk executed before inference starts, at least 1."""

    def __post_init__(self) -> None:
        actions = np.asarray(self.actions)
        if actions.ndim != 2 or not actions.size or actions.dtype.kind != "f":
            raise ValueError(f"action_prefix is {actions.dtype} {list(actions.shape)}; expected floats [k, a].")
        if not np.isfinite(actions).all():
            raise ValueError("action_prefix contains NaN or infinity; it must be finite.")
        for name, low, high, limit in (
            ("delay", 0, len(actions), f"0 to {len(actions)}, the length of action_prefix"),
            ("execution_horizon", 1, float("inf"), "at least 1"),
        ):
            value = getattr(self, name)
            is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
            if not is_integer or not low <= value <= high:
                raise ValueError(f"{name} is {value!r}; expected an integer, {limit}.")
            object.__setattr__(self, name, int(value))  # NumPy's small integers overflow

    def to_wire(self) -> dict[str, Any]:
        """Value of the field `RTC`: {"action_prefix": float32 [k, a], "delay": d, "execution_horizon": s}."""
        actions = np.asarray(self.actions, np.float32)
        return {"action_prefix": actions, "delay": self.delay, "execution_horizon": self.execution_horizon}

    @classmethod
    def from_wire(cls, value: Any) -> PreviousChunk:
        """Read the output of `to_wire`.

        Raises:
            ValueError: the value has another form.
        """
        keys = {"action_prefix", "delay", "execution_horizon"}
        if not isinstance(value, dict) or set(value) != keys:
            found = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"{RTC} is {found}; expected a dict of {', '.join(sorted(keys))}.")
        actions = value["action_prefix"]
        if not isinstance(actions, np.ndarray):
            raise ValueError(f"action_prefix is of type {type(actions).__name__}; expected an array [k, a].")
        return cls(actions, value["delay"], value["execution_horizon"])


def require_support(metadata: dict[str, Any], feature: str, instead: str, *, server: str = "The server") -> None:
    """Refuse a feature that the server's metadata do not list.

    Raises:
        ValueError: `metadata[feature]` is not True.
    """
    if metadata.get(feature) is not True:
        raise ValueError(
            f"{server} doesn't support {feature}: its metadata have {feature}={metadata.get(feature)!r}; "
            f"expected True. {instead}"
        )


def content(frame: str | bytes, url: str) -> dict[str, Any]:
    """The dict in a server's frame.

    Raises:
        ServerError: it is a text frame, which holds an error message.
        ValueError: it is not in the wire format, or not a dict.
    """
    if isinstance(frame, str):
        code, message = _read_error(frame)
        raise ServerError(f"The server at {url} reports an error:\n{message}", code)
    try:
        value = unpack(frame)
    except ValueError as error:
        raise ValueError(
            f"Cannot read what {url} sent, {frame[:40]!r}: {error} Is it a policy server, and does no proxy answer in "
            "its place?"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{url} sent a value of type {type(value).__name__}; expected a dict: is it a policy server?")
    return value


def _read_error(frame: str) -> tuple[str | None, str]:
    """Code and message. torchpi sends {"code": …, "message": …}, openpi a traceback."""
    try:
        error = json.loads(frame)
    except ValueError:
        return None, frame
    if isinstance(error, dict) and isinstance(error.get("code"), str) and isinstance(error.get("message"), str):
        return error["code"], error["message"]
    return None, frame

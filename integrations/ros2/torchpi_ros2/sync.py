"""Approximate time synchronization of messages from several topics."""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable, Iterable
from typing import Any

from torchpi_ros2.errors import UnusableError

MAX_MESSAGES = 1000
"""Messages kept per source: one second of joint states at 1 kHz."""


@dataclasses.dataclass(frozen=True)
class Stamped:
    """Message with its times in seconds."""

    message: Any
    stamp: float
    """Time in the message's header, or of its arrival."""
    arrived: float
    """Time of arrival by this machine's monotonic clock."""


class Source:
    """Topic with its recent messages."""

    def __init__(self, label: str, topic: str) -> None:
        self.label = label
        """Key in the observation, for error messages."""
        self.topic = topic
        self.problem: str | None = None
        """Reason why the last message was not used, or None."""
        self.messages: collections.deque[Stamped] = collections.deque(maxlen=MAX_MESSAGES)

    def __str__(self) -> str:
        return f"{self.label} ({self.topic})"


class Synchronizer:
    """Matches messages of several sources by their stamps.

    Args:
        max_age, slop: see `Config`, in seconds.
        by_header: use the stamps in the headers, which must be of this node's clock; otherwise arrival times.
        monotonic: clock of `Stamped.arrived`.
        now: clock of the stamps in headers.
    """

    def __init__(
        self,
        sources: Iterable[Source],
        *,
        max_age: float,
        slop: float,
        by_header: bool,
        monotonic: Callable[[], float],
        now: Callable[[], float],
    ) -> None:
        self.sources = tuple(sources)
        self._max_age = max_age
        self._slop = slop
        self._by_header = by_header
        self._monotonic = monotonic
        self._now = now
        self._lock = threading.Lock()  # messages arrive in another thread

    def add(self, source: Source, message: Any, header: Any) -> None:
        """Store a message; note a missing stamp as the source's problem, drop out-of-order messages."""
        arrived = self._monotonic()
        stamp = header.stamp.sec + 1e-9 * header.stamp.nanosec if self._by_header else arrived
        with self._lock:
            if self._by_header and not stamp:
                source.problem = "its stamp is 0, so the driver sets no time; use time: arrival"
                return
            source.problem = None
            messages = source.messages
            if messages and stamp < messages[-1].stamp:
                # A simulation or a recording was restarted, or one message was overtaken in transit.
                if stamp > messages[-1].stamp - self._max_age:
                    return
                messages.clear()
            messages.append(Stamped(message, stamp, arrived))
            while messages[0].stamp < stamp - self._max_age - self._slop:
                messages.popleft()

    def refuse(self, source: Source, problem: str) -> None:
        """Record why a message is not used."""
        with self._lock:
            source.problem = problem

    def match(self) -> dict[Source, Any]:
        """Select one message per source, nearest to the newest message of the slowest source.

        Raises:
            UnusableError: a source has no recent message, or the stamps are too far apart.
        """
        with self._lock:
            for source in self.sources:
                self._check_age(source)
            moment = min(source.messages[-1].stamp for source in self.sources)
            chosen = {
                source: min(source.messages, key=lambda stamped: abs(stamped.stamp - moment)) for source in self.sources
            }
        first, last = (end(chosen, key=lambda source: chosen[source].stamp) for end in (min, max))
        spread = chosen[last].stamp - chosen[first].stamp
        if spread > self._slop:
            raise UnusableError(
                f"the nearest messages of {first} and {last} are {spread:.3g} s apart, more than the slop of "
                f"{self._slop:g} s; a slow camera needs a larger slop, different clocks need time: arrival"
            )
        return {source: stamped.message for source, stamped in chosen.items()}

    def ages(self) -> dict[str, float | None]:
        """Seconds since the last usable message of each source; None if there was none."""
        now = self._monotonic()
        with self._lock:
            return {str(one): now - one.messages[-1].arrived if one.messages else None for one in self.sources}

    def _check_age(self, source: Source) -> None:
        because = f": {source.problem}" if source.problem else ""
        if not source.messages:
            raise UnusableError(f"no usable message of {source} received{because}")
        newest = source.messages[-1]
        age = self._monotonic() - newest.arrived
        if age > self._max_age:
            raise UnusableError(
                f"the last usable message of {source} is {age:.3g} s old, more than {self._max_age:g} s{because}"
            )
        if not self._by_header:
            return
        stamped = self._now() - newest.stamp
        if abs(stamped) > self._max_age:
            raise UnusableError(
                f"a message of {source} arrived {age:.3g} s ago and is {stamped:.6g} s old by its stamp, more than "
                f"{self._max_age:g} s: it was delayed, or its clock is not this node's (in a simulation set "
                "use_sim_time, with another machine synchronize the clocks, otherwise use time: arrival)"
            )

"""Approximate time synchronisation: messages of several topics that belong to one moment, or the reason for none."""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable, Iterable
from typing import Any

from torchpi_ros2.errors import UnusableError

MAX_MESSAGES = 1000
"""Kept of one source; joint states at 1 kHz of a second."""


@dataclasses.dataclass(frozen=True)
class Stamped:
    """A message and its times in seconds."""

    message: Any
    stamp: float
    """By the message's header, or its arrival."""
    arrived: float
    """By this machine's monotonic clock."""


class Source:
    """The last messages of a topic that are needed together."""

    def __init__(self, label: str, topic: str) -> None:
        self.label = label
        """The key in the observation, for messages."""
        self.topic = topic
        self.problem: str | None = None
        """The reason for which the last message was not used, or None."""
        self.messages: collections.deque[Stamped] = collections.deque(maxlen=MAX_MESSAGES)

    def __str__(self) -> str:
        return f"{self.label} ({self.topic})"


class Synchronizer:
    """Messages of several sources, put together by their stamps.

    Args:
        max_age, slop: see `Config`, in seconds.
        by_header: True: by the stamps in the headers, whose clock has to be this node's; False: by arrival.
        monotonic: the present time of `Stamped.arrived`.
        now: the present time of the stamps, if these are in headers.
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
        """Keep a message; one without a stamp, or older than its predecessor, is a problem of the source."""
        arrived = self._monotonic()
        stamp = header.stamp.sec + 1e-9 * header.stamp.nanosec if self._by_header else arrived
        with self._lock:
            if self._by_header and not stamp:
                source.problem = "its stamp is 0, the driver states no time; use time: arrival"
                return
            source.problem = None
            messages = source.messages
            if messages and stamp < messages[-1].stamp:
                # A simulation or a recording that begins again; or else one message was overtaken on its way.
                if stamp > messages[-1].stamp - self._max_age:
                    return
                messages.clear()
            messages.append(Stamped(message, stamp, arrived))
            while messages[0].stamp < stamp - self._max_age - self._slop:
                messages.popleft()

    def refuse(self, source: Source, problem: str) -> None:
        """Note the reason for which a message is not used."""
        with self._lock:
            source.problem = problem

    def match(self) -> dict[Source, Any]:
        """One message per source, all of about one moment: that of the newest message of the slowest source.

        Raises:
            UnusableError: a source has no message, or none that is new enough; stamps that lie too far apart.
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
                f"{self._slop:g} s; a slow camera needs a larger slop, clocks that differ need time: arrival"
            )
        return {source: stamped.message for source, stamped in chosen.items()}

    def ages(self) -> dict[str, float | None]:
        """Seconds since the last usable message of each source; None: there was none."""
        now = self._monotonic()
        with self._lock:
            return {str(one): now - one.messages[-1].arrived if one.messages else None for one in self.sources}

    def _check_age(self, source: Source) -> None:
        because = f": {source.problem}" if source.problem else ""
        if not source.messages:
            raise UnusableError(f"no usable message of {source} has come{because}")
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
                f"a message of {source} came {age:.3g} s ago and is {stamped:.6g} s old by its stamp, more than "
                f"{self._max_age:g} s: it was delayed, or its clock is not this node's (in simulation use_sim_time, of "
                "another machine synchronized clocks, or else time: arrival)"
            )

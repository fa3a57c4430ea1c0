"""Ending what has no time limit of its own."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator


class Watchdog:
    """Calls `action`, in a thread of its own, when a block of code is not done by its deadline.

    One thread for all blocks. It sleeps until the earliest deadline that it knows, and blocks that end before then
    never wake it; a `threading.Timer` starts a thread per block, which takes 0.1 ms.
    """

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._deadline = math.inf
        """Of the block that runs."""
        self._wakes_at = math.inf
        """The time at which the thread looks again."""
        self._closed = False

    @contextlib.contextmanager
    def until(self, deadline: float) -> Iterator[None]:
        """A block that has until then, in seconds of `time.monotonic`; one at a time. After it nothing is called."""
        with self._changed:
            self._deadline = deadline
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="torchpi-watchdog", daemon=True)
                self._thread.start()
            elif deadline < self._wakes_at:
                self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._deadline = math.inf

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                if now >= self._deadline:
                    self._deadline = math.inf
                    self._action()
                self._wakes_at = min(self._deadline, self._wakes_at if self._wakes_at > now else math.inf)
                left = min(self._wakes_at - now, threading.TIMEOUT_MAX)
                self._changed.wait(left)

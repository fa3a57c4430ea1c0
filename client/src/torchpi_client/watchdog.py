"""Deadlines for blocking calls that have no time-out of their own."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator


class Watchdog:
    """Calls `action`, in a separate thread, when a block of code misses its deadline.

    One thread serves all blocks. It sleeps until the earliest known deadline; blocks that end earlier do not wake it. A
    `threading.Timer` would start a thread per block, which takes 0.1 ms.
    """

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._deadline = math.inf
        """Deadline of the current block."""
        self._wakes_at = math.inf
        """Time of the thread's next check."""
        self._closed = False

    @contextlib.contextmanager
    def until(self, deadline: float) -> Iterator[None]:
        """Set a deadline (`time.monotonic` seconds) for a block, one at a time. Leaving the block cancels it."""
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
                self._changed.wait(min(self._wakes_at - now, threading.TIMEOUT_MAX))

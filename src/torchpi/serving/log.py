"""The log of `torchpi serve`: what clients send can neither forge a line of it, nor fill the disk."""

import logging
import time
import warnings
from typing import Any

from torchpi.errors import printable
from torchpi.serving.settings import RateLimit

_LINE, _TRACEBACK_LINES = 1000, 100
_RATE, _BURST = 5.0, 200.0
"""Lines per second over a long time, and after a silence."""


class LogFormatter(logging.Formatter):
    """One line per record, of a bounded length; the lines of a traceback are indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record), _LINE)

    def formatException(self, ei: Any) -> str:
        lines = super().formatException(ei).splitlines()
        return "\n".join(f"    {printable(line, _LINE)}" for line in lines[-_TRACEBACK_LINES:])


class LogLimit(logging.Filter):
    """So many lines per second; the next one has the number of those that were left out."""

    def __init__(self) -> None:
        super().__init__()
        self._limit, self._left_out = RateLimit(_RATE, time.monotonic(), burst=_BURST), 0

    def filter(self, record: logging.LogRecord) -> bool:
        if not self._limit.allows(time.monotonic()):
            self._left_out += 1
            return False
        if self._left_out:
            record.msg, record.args = f"{record.getMessage()} ({self._left_out} lines before it are left out)", ()
            self._left_out = 0
        return True


def log_to_stderr() -> None:
    """Let the root logger, and Python's warnings, write to stderr in this form."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(LogLimit())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    warnings.showwarning = lambda message, *_, **__: logging.getLogger("torchpi.serving").warning("%s", message)

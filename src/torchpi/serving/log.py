"""Log of `torchpi serve`. Clients can neither forge log lines nor fill the disk with them."""

import logging
import time
import warnings
from typing import Any

from torchpi.errors import printable
from torchpi.serving.settings import RateLimit

_MAX_LINE_LENGTH, _MAX_TRACEBACK_LINES = 1000, 100
_LINES_PER_SECOND, _BURST = 5.0, 200.0


class LogFormatter(logging.Formatter):
    """One line of bounded length per record; the lines of a traceback are indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record), _MAX_LINE_LENGTH)

    def formatException(self, ei: Any) -> str:
        lines = super().formatException(ei).splitlines()
        return "\n".join(f"    {printable(line, _MAX_LINE_LENGTH)}" for line in lines[-_MAX_TRACEBACK_LINES:])


class LogLimit(logging.Filter):
    """Limit on lines per second. The first line after dropped ones states their number."""

    def __init__(self) -> None:
        super().__init__()
        self._limit = RateLimit(_LINES_PER_SECOND, time.monotonic(), burst=_BURST)
        self._num_dropped = 0

    def filter(self, record: logging.LogRecord) -> bool:
        if not self._limit.allows(time.monotonic()):
            self._num_dropped += 1
            return False
        if self._num_dropped:
            record.msg, record.args = f"{record.getMessage()} ({self._num_dropped} lines before this were dropped)", ()
            self._num_dropped = 0
        return True


def log_to_stderr() -> None:
    """Send the root logger's records and Python's warnings to stderr, formatted and rate-limited as above."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(LogLimit())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    warnings.showwarning = lambda message, *_, **__: logging.getLogger("torchpi.serving").warning("%s", message)

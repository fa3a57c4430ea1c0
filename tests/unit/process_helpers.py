"""Programs that the tests start and interrupt."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil

TESTS = pathlib.Path(__file__).parent


@contextlib.contextmanager
def interruptible(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Python in a process group of its own, to which Ctrl-C can be sent as a terminal does it. A test that fails leaves
    nothing running, and waits for nothing."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    try:
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parents[1] / "src")])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        try:
            yield process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for started in psutil.Process(process.pid).children(recursive=True):  # torchrun's have their own groups
                    started.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

"""Jobs for the tests of worker processes, which import this module; it brings nothing heavy."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

TESTS = pathlib.Path(__file__).parent


class Work:
    """Does what a job asks for, and says where and when."""

    def __init__(self, closed=None):
        self.closed = closed

    def __call__(self, job):
        start = time.monotonic()
        match job:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(3)
            case "print":
                print("printed", flush=True)
            case Exception():
                raise job
            case float():
                time.sleep(job)
            case pathlib.Path():
                while not job.exists():
                    time.sleep(0.01)
        return job, os.getpid(), os.environ.get("LP_NUM_THREADS"), start

    def close(self):
        if isinstance(self.closed, pathlib.Path):
            self.closed.with_name(str(os.getpid())).touch()
        elif self.closed is not None:
            self.closed.append(True)


def no_work():
    raise FileNotFoundError("There is no policy")


@contextlib.contextmanager
def interruptible(*arguments):
    """Python in a process group of its own, to which Ctrl-C can be sent as a terminal does it."""
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
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

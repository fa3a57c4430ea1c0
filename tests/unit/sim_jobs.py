"""Jobs for the tests of worker processes, which import this module; it imports nothing heavy."""

import os
import pathlib
import signal
import time


class Work:
    """Runs a job; returns the process, its thread setting and the start time."""

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


def failing_setup():
    raise FileNotFoundError("There is no policy")

"""Jobs in parallel processes: results, error messages, and shutdown."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from process_helpers import interruptible
from sim_jobs import Work, failing_setup

from torchpi.sim.processes import default_workers, run_jobs


def run(jobs, *, workers, make_runner=Work, window=None):
    results = run_jobs(make_runner, jobs, workers=workers, label=lambda job: f"job {job!r}", window=window)
    return dict(enumerate(results))


@pytest.mark.parametrize("workers", [1, 2])
def test_each_job_runs_once(workers, monkeypatch):
    monkeypatch.delenv("LP_NUM_THREADS", raising=False)
    results = run(list("abcdefg"), workers=workers, make_runner=functools.partial(Work, []))
    assert {number: result[0] for number, result in results.items()} == dict(enumerate("abcdefg"))
    processes = {result[1] for result in results.values()}
    if workers == 1:
        assert processes == {os.getpid()}
    else:
        assert os.getpid() not in processes
        assert {result[2] for result in results.values()} == {"1"}  # number of OpenGL's threads
        assert "LP_NUM_THREADS" not in os.environ


@pytest.mark.slow
def test_window_limits_started_jobs(tmp_path):
    """The fourth job waits for the slow first one, although a process is free."""
    released = []

    def release():
        released.append(time.monotonic())
        (tmp_path / "release").touch()

    threading.Timer(3.0, release).start()
    jobs = [tmp_path / "release", "b", "c", "d"]
    results = list(run_jobs(Work, jobs, workers=2, label=str, window=3))
    assert [job for job, *_ in results] == jobs
    assert results[3][3] > released[0]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (KeyError("no camera"), KeyError),
        (ValueError("no camera"), ValueError),
        (FileNotFoundError("no camera"), FileNotFoundError),
        (ConnectionResetError("no camera"), OSError),
        (ModuleNotFoundError("no camera"), ModuleNotFoundError),
    ],
)
def test_user_error_keeps_its_class_and_names_the_job(error, kind):
    with pytest.raises(kind) as caught:
        run([error], workers=1, make_runner=functools.partial(Work, []))
    assert caught.value.args == (f"job {error!r}: no camera",)


def test_user_error_of_another_process_names_the_job():
    with pytest.raises(KeyError) as caught:
        run([0.0, KeyError("no camera")], workers=2)
    assert caught.value.args == ("job KeyError('no camera'): no camera",)


@pytest.mark.parametrize("workers", [1, 2])
def test_internal_error_includes_its_traceback(workers):
    with pytest.raises(RuntimeError, match=r"(?s)job .*Traceback.*in __call__.*ZeroDivisionError: x"):
        run([0.0, ZeroDivisionError("x")], workers=workers, make_runner=functools.partial(Work, []))


def test_setup_error_names_the_first_job():
    with pytest.raises(FileNotFoundError, match=r"job 0\.0: There is no policy"):
        run([0.0, 0.0], workers=2, make_runner=failing_setup)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ("die", r"job 'die'.*: its process has ended unexpectedly \(signal 9\)\. .* out of memory: try fewer workers"),
        ("exit", r"job 'exit'.*: its process has ended unexpectedly \(exit status 3\)\.$"),
    ],
)
def test_killed_process_error_names_its_job(job, message):
    with pytest.raises(ChildProcessError, match=message):
        run([0.0, job, 0.0], workers=2)


def test_single_worker_closes_its_runner():
    closed = []
    run([0.0], workers=1, make_runner=functools.partial(Work, closed))
    with pytest.raises(ValueError, match="no camera"):
        run([ValueError("no camera")], workers=1, make_runner=functools.partial(Work, closed))
    assert closed == [True, True]


def test_worker_processes_close_their_runners(tmp_path):
    results = run([0.0] * 6, workers=2, make_runner=functools.partial(Work, tmp_path / "closed"))
    assert {str(result[1]) for result in results.values()} <= {path.name for path in tmp_path.iterdir()}


def test_closing_the_generator_ends_the_processes():
    jobs = run_jobs(Work, [0.0, 30.0, 30.0], workers=2, label=str)
    _, pid, *_ = next(jobs)
    start = time.monotonic()
    jobs.close()
    assert time.monotonic() - start < 20
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_workers_must_be_positive():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        run([0.0], workers=0)


def test_default_workers_are_limited_by_cores_jobs_and_memory():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert default_workers(1, bytes_each=1) == 1
    assert default_workers(10_000, bytes_each=1) <= cores
    assert default_workers(10_000, bytes_each=2**60) == 1


INTERRUPTED = """
from sim_jobs import Work
from torchpi.sim.processes import run_jobs

if __name__ == "__main__":
    for _, pid, *_ in run_jobs(Work, ["print", "print", 60.0, 60.0], workers=2, label=str):
        print(pid, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_ends_processes_promptly_and_quietly(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(INTERRUPTED)
    with interruptible(program) as process:
        pids = [int(process.stdout.readline()) for _ in range(2)]  # what the jobs print goes to stderr
        time.sleep(0.3)
        start = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - start < 50  # immediately on an idle machine
    assert stderr.count("printed") == 2
    assert stderr.count("Traceback") == 1  # this program's own
    assert stderr.strip().endswith("KeyboardInterrupt")
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_processes_started_while_interrupts_are_held_ignore_ctrl_c(tmp_path):
    """Also the first process of a program, with which Python starts its resource tracker."""
    program = tmp_path / "program.py"
    program.write_text(
        """
import multiprocessing, signal
from torchpi.sim.processes import interrupts_held

def held(queue):
    queue.put(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, set()))

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with interrupts_held():
        queue = context.Queue()
        process = context.Process(target=held, args=(queue,))
        process.start()
    assert queue.get(timeout=60)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, set())
    process.join()
""",
        encoding="utf-8",
    )
    subprocess.run([sys.executable, str(program)], check=True)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_processes_end_when_the_parent_is_killed(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(INTERRUPTED)
    with interruptible(program) as process:
        for _ in range(2):
            assert int(process.stdout.readline())
        process.kill()
        process.communicate(timeout=50)  # until the last process has closed its pipes, long before the end of the jobs

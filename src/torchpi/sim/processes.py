"""Jobs in parallel processes, whose errors name the job."""

import atexit
import collections
import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import psutil

from torchpi.errors import SimulationError, TorchpiError, listed
from torchpi.extras import environment_defaults

Job = TypeVar("Job")
Result = TypeVar("Result")

# A user can do something about these, so they are shown as one line; any other is our mistake, with its traceback.
_FOR_USERS = (KeyboardInterrupt, ModuleNotFoundError, FileNotFoundError, KeyError, ValueError, OSError)
# One thread each: the processes are as many as the cores.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "LP_NUM_THREADS": "1"}


def run_jobs(
    make_work: Callable[[], Callable[[Job], Result]],
    jobs: Sequence[Job],
    *,
    workers: int,
    label: Callable[[Job], str],
    window: int | None = None,
) -> Generator[Result, None, None]:
    """Do the jobs, and yield their results in the order of the jobs.

    Ending the generator early, also by Ctrl-C, ends the processes.

    Args:
        make_work: makes what does a job; called once in each process. With several workers it and the jobs are pickled.
            Its product is closed when all is done, where it has a `close`.
        jobs: begun in order.
        workers: processes; 1: no other than this one.
        label: a job's name in errors.
        window: how far a job may be ahead of the first unfinished one; None: any distance. Results wait that long.
    """
    if workers < 1:
        raise SimulationError(f"workers must be at least 1, got {workers}.")
    if workers > 1:
        yield from _run_in_processes(make_work, jobs, min(workers, len(jobs)), label, window or len(jobs))
        return
    with contextlib.closing(_Worker(make_work)) as worker:
        for job in jobs:
            yield worker(job, label(job))


def default_workers(jobs: int, *, bytes_each: int) -> int:
    """The number of processes worth starting: one per core, as far as there are jobs, and memory for each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, jobs, psutil.virtual_memory().available // bytes_each))


@contextlib.contextmanager
def explaining(remains: Callable[[BaseException], str]) -> Iterator[None]:
    """Say in a user's error, behind its message, what remains of the work: a sentence, or nothing."""
    try:
        yield
    except _FOR_USERS as error:
        if not (text := remains(error)):
            raise
        problem = _message_of(error).rstrip(".")
        end = "" if problem.endswith("?") else "."
        raise _rephrased(error, f"{problem}{end} {text}" if problem else text) from error


def _rephrased(error: BaseException, text: str) -> BaseException:
    """An exception of the same kind with another message."""
    kinds = (type(error),) if isinstance(error, TorchpiError) else _FOR_USERS
    other = next(kind(text) for kind in kinds if isinstance(error, kind))
    for note in getattr(error, "__notes__", ()):
        other.add_note(note)
    return other


def _message_of(error: BaseException) -> str:
    """Its message; str() of a KeyError quotes it."""
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)


class _Worker:
    """Does jobs in one process; what it works with is made for the first one."""

    def __init__(self, make_work: Callable[[], Callable[[Any], Any]]) -> None:
        self._make_work = make_work
        self._work: Callable[[Any], Any] | None = None

    def __call__(self, job: Any, label: str) -> Any:
        try:
            if self._work is None:
                self._work = self._make_work()
            return self._work(job)
        except Exception as error:
            if isinstance(error, _FOR_USERS):
                raise _rephrased(error, f"{label}: {_message_of(error)}") from error
            raise RuntimeError(f"{label} failed:\n{traceback.format_exc()}") from error

    def close(self) -> None:
        getattr(self._work, "close", lambda: None)()


def _run_in_processes(
    make_work: Callable[[], Callable[[Any], Any]],
    jobs: Sequence[Any],
    workers: int,
    label: Callable[[Any], str],
    window: int,
) -> Iterator[Any]:
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # forks of a process with OpenGL or threads in it may hang
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(make_work,))
    remaining, processes = iter(jobs), set[BaseProcess]()
    begun: collections.deque[tuple[str, Future[Any]]] = collections.deque()
    try:
        while True:
            for job in itertools.islice(remaining, window - len(begun)):
                with environment_defaults(**_ONE_THREAD), interrupts_held():
                    begun.append((label(job), pool.submit(_do, job, label(job))))
                processes |= set(multiprocessing.active_children()) - before
            if not begun:
                break
            result = begun[0][1].result()
            begun.popleft()
            yield result
    except BrokenProcessPool as error:
        unfinished = [name for name, future in begun if not future.done() or future.exception()]
        pool.shutdown(cancel_futures=True)  # its thread fetches the exit statuses, and only one thread can
        raise _ended(processes, unfinished[:workers]) from error  # the pool begins them in order
    finally:
        if begun:  # ended early: nobody waits for the jobs that run
            for process in processes:
                process.terminate()
        pool.shutdown(cancel_futures=True)


def _ended(processes: set[BaseProcess], labels: Sequence[str]) -> ChildProcessError:
    codes = [process.exitcode for process in processes if process.exitcode]
    # The pool terminates the others.
    code = next((code for code in codes if code != -signal.SIGTERM), -signal.SIGTERM)
    reason = f"signal {-code}" if code < 0 else f"exit status {code}"
    hint = " The machine may have run out of memory: try fewer workers." if code == -signal.SIGKILL else ""
    return ChildProcessError(f"{listed(labels, 'or')}: its process has ended unexpectedly ({reason}).{hint}")


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Processes started meanwhile never see Ctrl-C; this process sees it afterwards, and ends them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Started with the first process, it would let the signal through again before that one is there.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# In a worker process:

_worker: _Worker | None = None


def _begin(make_work: Callable[[], Callable[[Any], Any]]) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)  # standard output is the command's, libraries may print to it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = _Worker(make_work)
    atexit.register(_worker.close)


def _end_with_parent() -> None:
    """A parent that is killed ends nothing itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(job: Any, label: str) -> Any:
    assert _worker is not None
    return _worker(job, label)

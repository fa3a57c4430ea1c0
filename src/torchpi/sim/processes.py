"""Jobs in parallel processes, with the job's name in error messages."""

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

# Errors that a user can act on are shown as one line; all others are bugs of ours, and are shown with a traceback.
_USER_ERRORS = (KeyboardInterrupt, ModuleNotFoundError, FileNotFoundError, KeyError, ValueError, OSError)
# One thread per process, because there is one process per core.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "LP_NUM_THREADS": "1"}


def run_jobs(
    make_runner: Callable[[], Callable[[Job], Result]],
    jobs: Sequence[Job],
    *,
    workers: int,
    label: Callable[[Job], str],
    window: int | None = None,
) -> Generator[Result, None, None]:
    """Run jobs, and yield their results in the order of the jobs.

    Closing the generator early, or Ctrl-C, ends the processes.

    Args:
        make_runner: makes the function that runs a job; called once in each process. If the function has a method
            `close`, it is called at the end. With several workers, `make_runner` and the jobs are pickled.
        jobs: started in this order.
        workers: number of processes; 1: run the jobs in this process.
        label: name of a job in error messages.
        window: number of jobs, counted from the first unfinished one, that may be started; None: all. It limits the
            number of results that wait for an earlier one.
    """
    if workers < 1:
        raise SimulationError(f"workers must be at least 1, got {workers}.")
    if workers > 1:
        yield from _run_in_processes(make_runner, jobs, min(workers, len(jobs)), label, window or len(jobs))
        return
    with contextlib.closing(_Worker(make_runner)) as worker:
        for job in jobs:
            yield worker(job, label(job))


def default_workers(jobs: int, *, bytes_each: int) -> int:
    """The default number of processes: one per core, limited by the number of jobs and the available memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, jobs, psutil.virtual_memory().available // bytes_each))


@contextlib.contextmanager
def append_to_errors(describe: Callable[[BaseException], str]) -> Iterator[None]:
    """Append a sentence about the finished work, unless it is empty, to the message of a user's error."""
    try:
        yield
    except _USER_ERRORS as error:
        if not (sentence := describe(error)):
            raise
        message = _message_of(error).rstrip(".")
        if message:
            sentence = f"{message} {sentence}" if message.endswith("?") else f"{message}. {sentence}"
        raise _with_message(error, sentence) from error


def _with_message(error: BaseException, message: str) -> BaseException:
    """An exception of the same kind with another message."""
    kinds = (type(error),) if isinstance(error, TorchpiError) else _USER_ERRORS
    copy = next(kind(message) for kind in kinds if isinstance(error, kind))
    for note in getattr(error, "__notes__", ()):
        copy.add_note(note)
    return copy


def _message_of(error: BaseException) -> str:
    """The message of an exception, without the quotes that str() adds to a KeyError's."""
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)


class _Worker:
    """Runs jobs in one process; makes its runner for the first job."""

    def __init__(self, make_runner: Callable[[], Callable[[Any], Any]]) -> None:
        self._make_runner = make_runner
        self._runner: Callable[[Any], Any] | None = None

    def __call__(self, job: Any, label: str) -> Any:
        try:
            if self._runner is None:
                self._runner = self._make_runner()
            return self._runner(job)
        except Exception as error:
            if isinstance(error, _USER_ERRORS):
                raise _with_message(error, f"{label}: {_message_of(error)}") from error
            raise RuntimeError(f"{label} failed:\n{traceback.format_exc()}") from error

    def close(self) -> None:
        if close := getattr(self._runner, "close", None):
            close()


def _run_in_processes(
    make_runner: Callable[[], Callable[[Any], Any]],
    jobs: Sequence[Any],
    workers: int,
    label: Callable[[Any], str],
    window: int,
) -> Iterator[Any]:
    other_children = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # a forked process with OpenGL or threads in it may hang
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_init_process, initargs=(make_runner,))
    remaining, processes = iter(jobs), set[BaseProcess]()
    pending: collections.deque[tuple[str, Future[Any]]] = collections.deque()
    try:
        while True:
            for job in itertools.islice(remaining, window - len(pending)):
                with environment_defaults(**_ONE_THREAD), interrupts_held():
                    pending.append((label(job), pool.submit(_run_job, job, label(job))))
                processes |= set(multiprocessing.active_children()) - other_children
            if not pending:
                break
            result = pending[0][1].result()
            pending.popleft()
            yield result
    except BrokenProcessPool as error:
        unfinished = [name for name, future in pending if not future.done() or future.exception()]
        pool.shutdown(cancel_futures=True)  # its thread fetches the exit statuses, and only one thread can
        raise _unexpected_end(processes, unfinished[:workers]) from error  # the pool starts jobs in order
    finally:
        if pending:  # ended early: nobody waits for the running jobs
            for process in processes:
                process.terminate()
        pool.shutdown(cancel_futures=True)


def _unexpected_end(processes: set[BaseProcess], labels: Sequence[str]) -> ChildProcessError:
    codes = [process.exitcode for process in processes if process.exitcode]
    # The pool sends SIGTERM to the other processes.
    code = next((code for code in codes if code != -signal.SIGTERM), -signal.SIGTERM)
    reason = f"signal {-code}" if code < 0 else f"exit status {code}"
    hint = " The machine may have run out of memory: try fewer workers." if code == -signal.SIGKILL else ""
    return ChildProcessError(f"{listed(labels, 'or')}: its process has ended unexpectedly ({reason}).{hint}")


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Block Ctrl-C: processes started in the block never receive it, this process receives it after the block."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Python starts the resource tracker with the first process, and unblocks the signal again before that process runs.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


# In a worker process:

_worker: _Worker | None = None


def _init_process(make_runner: Callable[[], Callable[[Any], Any]]) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)  # libraries may print to standard output, which is reserved for the command's result
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker = _Worker(make_runner)
    atexit.register(_worker.close)


def _exit_with_parent() -> None:
    """Exit when the parent process ends: a parent that is killed can't end its children."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_job(job: Any, label: str) -> Any:
    assert _worker is not None
    return _worker(job, label)

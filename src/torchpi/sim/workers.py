"""Jobs in parallel processes, whose failures have names: what was being done when a process ended."""

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, TypeVar, runtime_checkable

from torchpi.errors import SimulationError

Job = TypeVar("Job")
Result = TypeVar("Result")

# What a user can do something about is shown as one line; anything else is a mistake of ours, with its traceback.
_FOR_USERS = (KeyboardInterrupt, ModuleNotFoundError, FileNotFoundError, KeyError, ValueError, OSError)
# One thread each: the processes are as many as the cores.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "LP_NUM_THREADS": "1"}


@runtime_checkable
class _Closes(Protocol):
    def close(self) -> None: ...


def run_jobs(
    make_work: Callable[[], Callable[[Job], Result]],
    jobs: Sequence[Job],
    *,
    workers: int,
    label: Callable[[Job], str],
    window: int | None = None,
) -> Generator[tuple[int, Result], None, None]:
    """Do the jobs, and yield (number, result) of each as it is done, in whatever order.

    Ending the generator early, also by Ctrl-C, ends the processes.

    Args:
        make_work: makes what does a job; called once in each process. With several workers it and the jobs are pickled.
            What it makes is closed when all is done, where it has a `close`.
        jobs: begun in order.
        workers: processes; 1: no other than this one.
        label: what a job is called in errors.
        window: how far a job may be ahead of the first unfinished one; None: any distance.
    """
    if workers < 1:
        raise SimulationError(f"workers must be at least 1, got {workers}.")
    if workers == 1:
        yield from _run_here(make_work, jobs, label)
        return
    with _processes(make_work, min(workers, len(jobs))) as processes:
        yield from _run_there(processes, jobs, label, window or len(jobs))


def default_workers(jobs: int, *, bytes_each: int = 0) -> int:
    """How many processes are worth starting: one per core, as far as there are jobs and memory for them.

    Args:
        bytes_each: what one process needs beside the simulator.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, jobs, _free_memory() // (bytes_each + 2**30)))


def _free_memory() -> int:
    """In bytes; where the system does not say, as if it were enough."""
    try:
        with open("/proc/meminfo") as file:
            available = next(line for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 2**63
    return int(available.split()[1]) * 1024


def _run_here(
    make_work: Callable[[], Callable[[Job], Result]], jobs: Sequence[Job], label: Callable[[Job], str]
) -> Iterator[tuple[int, Result]]:
    with contextlib.ExitStack() as stack:
        work = make_work()
        if isinstance(work, _Closes):
            stack.callback(work.close)
        for number, job in enumerate(jobs):
            try:
                result = work(job)
            except Exception as error:
                raise _named(error, label(job), traceback.format_exc()) from error
            yield number, result


class _Process:
    """One worker process and the job that it has."""

    def __init__(self, context: Any, make_work: Callable[[], Any]) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make_work), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process ends the connection
        self.number: int | None = None


def _run_there(
    processes: Sequence[_Process], jobs: Sequence[Job], label: Callable[[Job], str], window: int
) -> Iterator[tuple[int, Any]]:
    unfinished, begun = set(range(len(jobs))), 0
    while unfinished:
        for process in processes:
            if process.number is None and begun < min(len(jobs), min(unfinished) + window):
                _send(process, begun, jobs[begun], label)
                begun += 1
        by_connection = {process.connection: process for process in processes if process.number is not None}
        for connection in wait(list(by_connection)):
            process = by_connection[connection]
            assert process.number is not None
            number = process.number
            result = _receive(process, label(jobs[number]))
            process.number = None
            unfinished.discard(number)
            yield number, result


def _send(process: _Process, number: int, job: Any, label: Callable[[Any], str]) -> None:
    process.number = number
    try:
        process.connection.send(job)
    except OSError as error:
        raise _ended(process, label(job)) from error


def _receive(process: _Process, label: str) -> Any:
    try:
        kind, value = process.connection.recv()
    except (EOFError, OSError) as error:
        raise _ended(process, label) from error
    if kind == "result":
        return value
    raised, text = value
    raise _named(raised, label, text)


def _ended(process: _Process, label: str) -> ChildProcessError:
    process.process.join(timeout=10)
    code = process.process.exitcode
    reason = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
    hint = "; the machine may have run out of memory: try fewer workers" if code == -signal.SIGKILL else ""
    return ChildProcessError(f"{label}: its process has ended unexpectedly ({reason}){hint}")


def rephrased(error: BaseException, text: str) -> BaseException:
    """An exception of the same kind with another message, as far as it is one for users; otherwise a RuntimeError."""
    other = next((kind(text) for kind in _FOR_USERS if isinstance(error, kind)), RuntimeError(text))
    for note in getattr(error, "__notes__", ()):
        other.add_note(note)
    return other


def message_of(error: BaseException) -> str:
    """Its message; str() of a KeyError quotes it."""
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)


def _named(error: Exception, label: str, text: str) -> BaseException:
    if isinstance(error, _FOR_USERS):
        return rephrased(error, f"{label}: {message_of(error)}")
    return RuntimeError(f"{label} failed:\n{text}")


@contextlib.contextmanager
def _processes(make_work: Callable[[], Any], count: int) -> Iterator[list[_Process]]:
    """The worker processes, which end with the context."""
    context = multiprocessing.get_context("spawn")  # forks of a process with OpenGL or threads in it may hang
    processes: list[_Process] = []
    patience = 0.0
    try:
        with _inherited(_ENVIRONMENT), interrupts_held():
            for _ in range(count):
                processes.append(_Process(context, make_work))
        yield processes
        patience = 5.0  # all is done: they may close what they have open
    finally:
        for process in processes:
            process.connection.close()
        for process in processes:
            process.process.join(timeout=patience)
            process.process.terminate()
        for process in processes:
            process.process.join(timeout=5)
            if process.process.is_alive():
                process.process.kill()
                process.process.join()


@contextlib.contextmanager
def _inherited(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the processes started meanwhile, where they are not set."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


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


def _serve(connection: Connection, make_work: Callable[[], Callable[[Any], Any]]) -> None:
    """What a worker process does: jobs in, results out, until the connection ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)  # standard output is the command's, libraries may print to it
    work = None
    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):  # all is done, or the command has ended
            break
        try:
            work = work or make_work()
            answer = "result", work(job)
        except Exception as error:
            answer = "error", (rephrased(error, message_of(error)), traceback.format_exc())
        with contextlib.suppress(BrokenPipeError):
            connection.send(answer)
    if isinstance(work, _Closes):
        work.close()

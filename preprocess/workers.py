"""The same work on many pieces, in this process or in several; the order of pieces never shows in the result."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

WORKERS_LOCK = ".workers.lock"

Piece = TypeVar("Piece")
Result = TypeVar("Result")

_state: dict[str, Any] = {}  # a worker process' own: executors hand it to tasks in no other way


class WorkerDiedError(RuntimeError):
    """A worker process ended without a word, mostly killed for want of memory."""


class StoppedError(Exception):
    """Another piece failed, or the user interrupted: this one is given up."""


class Stop(Protocol):
    """Says whether work is to be given up."""

    def is_set(self) -> bool:
        """Whether it is."""


def default_workers() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def for_each(
    pieces: Iterable[Piece],
    make: Callable[[Stop], Callable[[Piece], Result]],
    *,
    workers: int,
    done: Callable[[Result], None],
) -> None:
    """Do work on every piece.

    Args:
        pieces: what is worked on; picklable.
        make: called once in each process with the sign to stop; returns the function that works on a piece. Picklable.
        workers: processes; with 1 all is done in this one.
        done: called in this process with each result as it comes.

    Raises:
        WorkerDiedError: a worker was killed. Otherwise the first exception of any piece, when all workers have stopped.
    """
    todo = list(pieces)
    workers = min(workers, len(todo))
    if workers <= 1:
        if todo:
            work = make(threading.Event())
            for piece in todo:
                done(work(piece))
        return
    context = multiprocessing.get_context("spawn")  # fork would copy the locks of other threads
    stop = context.Event()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(make, stop, os.getpid())) as executor:
        futures: set[Future[Result]] = set()
        try:
            with _no_interrupts():  # submitting starts processes, which would die of it with a stack trace
                futures |= {executor.submit(_work, piece) for piece in todo}
            while futures:
                finished, futures = wait(futures, return_when=FIRST_COMPLETED)
                for future in finished:
                    done(future.result())
        except BrokenProcessPool as error:
            raise WorkerDiedError(
                "a worker process was killed, most often for want of memory; what is finished is kept. "
                "Run the same command again, with fewer workers if it happens again"
            ) from error
        finally:
            if futures:
                stop.set()
                executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Holds Ctrl-C back, here and in processes that are started."""
    resource_tracker.ensure_running()  # when it starts later, it lets Ctrl-C through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(make: Callable[[Stop], Callable[[Any], Any]], stop: Any, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _state.update(make=make, stop=stop)


def _end_with(parent: int) -> None:
    """A worker waits on a queue of which it holds both ends, so the parent's death would go unnoticed."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _work(piece: Any) -> Any:
    if "work" not in _state:  # not in _start, where an error would look like a killed process
        _state["work"] = _state["make"](_state["stop"])
    return _state["work"](piece)


# --- locks ---------------------------------------------------------------------------------------------------------


def try_lock(handle: IO[bytes], seconds: float) -> bool:
    """Take an exclusive lock within this time. On a file system without locks there is none to wait for."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.2)
        except OSError:
            return True
        else:
            return True


def is_locked(handle: IO[bytes]) -> bool:
    """Whether another process holds an exclusive lock on this open file."""
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    fcntl.flock(handle, fcntl.LOCK_UN)
    return False


def hold_worker_lock(folder: Path) -> IO[bytes]:
    """Mark a folder as having a working process; the kernel takes the mark away with the process. Keep the handle."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = (folder / WORKERS_LOCK).open("a+b")  # NFS has shared locks for readers only
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_SH)
    return handle

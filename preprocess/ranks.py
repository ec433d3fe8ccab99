"""MPI ranks, where preprocessing was started by mpirun or srun; one process otherwise.

Ranks share the file system and speak little: each works on its own parts, and they meet to exchange what each of them found. An
error of one rank is told to all at the next meeting, so that none waits for a rank that gave up.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

Result = TypeVar("Result")

_AGREED = "told_to_all_ranks"
MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MPI_LOCALNRANKS")


class RanksError(RuntimeError):
    """The processes that were started do not form the job that was promised."""


class Ranks(Protocol):
    """The processes that make one corpus together."""

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on all ranks."""


class Alone:
    """One process."""

    rank = 0
    size = 1

    def gather(self, value: Any) -> list[Any]:
        """See :class:`Ranks`."""
        return [value]


class MpiRanks:
    """The ranks of MPI's world communicator."""

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator
        self.rank: int = communicator.Get_rank()
        self.size: int = communicator.Get_size()

    def gather(self, value: Any) -> list[Any]:
        """See :class:`Ranks`."""
        return list(self._communicator.allgather(value))

    def abort(self, code: int) -> None:
        """End all ranks at once; a rank that merely exits would be waited for."""
        self._communicator.Abort(code)


def find_ranks() -> Alone | MpiRanks:
    """The ranks that this process was started with, from the variables that OpenMPI, MPICH, PMI and SLURM set.

    Raises:
        RanksError: a launcher promised several ranks and MPI finds another number: N jobs of one rank would each write the corpus.
    """
    promised = max((int(os.environ.get(name, 1)) for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")), default=1)
    if "SLURM_STEP_ID" in os.environ:
        promised = max(promised, int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)))
    if promised == 1 and not any(name in os.environ for name in MPI_VARIABLES):
        return Alone()
    try:
        with _interrupts_kill():
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise RanksError(
            f"{promised} ranks were started but MPI cannot be loaded ({error}); install an MPI library (`pip install mpich`), "
            "or start one process"
        ) from error
    ranks = MpiRanks(MPI.COMM_WORLD)
    if ranks.size != promised and promised > 1:
        raise RanksError(
            f"the launcher started {promised} ranks, MPI finds {ranks.size}: the launcher and mpi4py use different MPI libraries "
            "(under SLURM try `srun --mpi=pmi2` or `--mpi=pmix`)"
        )
    return ranks if ranks.size > 1 else Alone()


@contextlib.contextmanager
def _interrupts_kill() -> Iterator[None]:
    """Lets Ctrl-C end a rank that waits inside the MPI library for others to start; Python would notice it only afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def on_first(ranks: Ranks, make: Callable[[], Result]) -> Result:
    """Rank 0's value of ``make()`` on all ranks, or its exception."""
    value: Result = _agree(ranks, make if ranks.rank == 0 else lambda: None)[0]
    return value


def on_all(ranks: Ranks, make: Callable[[], Result]) -> list[Result]:
    """Every rank's value of ``make()`` on all ranks, or the exception of the first rank that has one."""
    values: list[Result] = _agree(ranks, make)
    return values


def is_agreed(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, was raised on all ranks alike."""
    return any(item is not None and _AGREED in vars(item) for item in (error, error.__cause__))


def _agree(ranks: Ranks, make: Callable[[], Any]) -> list[Any]:
    value, error = None, None
    try:
        value = make()
    except Exception as caught:
        error = caught
    told = ranks.gather((value, error))
    for rank, (_, other) in enumerate(told):
        if other is not None:  # the same one on all ranks, or they would part ways
            raised = error if rank == ranks.rank and error is not None else other
            vars(raised)[_AGREED] = True
            raise raised
    return [value for value, _ in told]

"""Ranks: finding them, joining them, and dying together.

A rank is found in the variables that deepspeed and torchrun set (RANK, WORLD_SIZE, LOCAL_RANK); without them a step runs alone. The
launcher says in MATES_WORLD_SIZE how many ranks it promised, and in MATES_PARENT which process the ranks must not outlive.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mates.engine.heartbeat import Heartbeats, start_heartbeats

PROMISED_WORLD_SIZE = "MATES_WORLD_SIZE"
PARENT = "MATES_PARENT"
SAYS_EVERY = 5.0  # seconds in which a rank that works alone tells the others so


_beating: list[Heartbeats] = []


class LaunchError(RuntimeError):
    """The processes that were started are not the ones that were promised."""


@dataclass(frozen=True)
class World:
    """This process among the ranks of a step."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes manifests and log lines."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def same(self, make: Callable[[], Any]) -> Any:
        """Rank 0's value of ``make()`` on all ranks, or its exception on all ranks, so that none waits for a rank that gave up."""
        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = make()
            except Exception as error:
                box[1] = error
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def same_after_long(self, make: Callable[[], Any]) -> Any:
        """The same for work that may take longer than a collective may wait: the others are told every few seconds that it goes on."""
        if self.size == 1:
            return make()
        with ThreadPoolExecutor(1, thread_name_prefix="long-work") as thread:
            work = thread.submit(make) if self.first else None
            while not self.same(lambda: bool(work and not wait([work], SAYS_EVERY).not_done)):
                pass
            return self.same(lambda: work and work.result())

    def gathered(self, make: Callable[[], Any]) -> list[Any]:
        """Every rank's value of ``make()``, by rank, on all ranks; or, on all ranks, the exception of the lowest rank that had one."""
        own: list[Any] = [None, None]
        try:
            own[0] = make()
        except Exception as error:
            own[1] = error
        found: list[Any] = [own]
        if self.size > 1:
            found = [None] * self.size
            dist.all_gather_object(found, own)
        for _, failure in found:
            if failure is not None:
                raise failure
        return [value for value, _ in found]

    def team(self, size: int) -> Any:
        """The process group of this rank and its neighbours, ``size`` of them; called by all ranks."""
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, self.size, size)]
        return groups[self.rank // size]

    def every(self, values: torch.Tensor) -> torch.Tensor:
        """A tensor [...] of each rank, on all ranks: [ranks, ...]."""
        if self.size == 1:
            return values[None]
        found = values.new_empty(self.size, *values.shape)
        dist.all_gather(list(found), values)
        return found

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over ranks, on all ranks."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


def join(*, timeout_minutes: float, threads: int) -> World:
    """Join the other ranks of this step.

    Raises:
        LaunchError: another number of ranks than the launcher promised (a wrong MPI or SLURM flag otherwise gives N separate runs
            that each think they are alone).
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    promised = int(os.environ.get(PROMISED_WORLD_SIZE, size))
    if promised != size:
        raise LaunchError(f"rank {rank}: the launcher promised {promised} ranks, this process finds {size}; check the launch command")
    _follow_parent()
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device, backend = torch.device("cuda", local_rank), "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local_size))
    if "RANK" not in os.environ:
        os.environ |= {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
    # a little longer than heartbeats wait, which can name the rank that is silent
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes, seconds=8))
    if size > 1:
        _beating.append(start_heartbeats(rank, size, host=os.environ["MASTER_ADDR"], limit_seconds=60 * timeout_minutes))
    return World(rank, size, device)


def leave() -> None:
    """Leave the process group."""
    while _beating:
        _beating.pop().leave()
    if dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- not outliving the run -----------------------------------------------------------------------------------------


def process_identity(pid: int) -> str | None:
    """``pid:start time``, which names a process for good (pids are reused); None where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else f"{pid}:{fields[19]}"


def _follow_parent() -> None:
    """End this process when the one named in MATES_PARENT is gone: launchers killed by SIGKILL leave their ranks running."""
    parent = os.environ.get(PARENT)
    if not parent:
        return
    pid = int(parent.partition(":")[0])

    def watch() -> None:
        while process_identity(pid) == parent:
            time.sleep(0.5)
        sys.stderr.write("mates: the run that started this process is gone; ending\n")
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="follow-parent").start()

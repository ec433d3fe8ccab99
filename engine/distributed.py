"""Ranks: joining them, and dying together.

The launcher says in MATES_WORLD_SIZE how many ranks it promised, and in MATES_PARENT which process the ranks must not outlive.
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
from mates.engine.ranks import LaunchError, Place, announce, find_place, network_settings

PARENT = "MATES_PARENT"
SAYS_EVERY = 5.0  # seconds in which a rank that works alone tells the others so


_beating: list[Heartbeats] = []


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
        LaunchError: see :func:`~mates.engine.ranks.find_place`; or the others were not found in ``timeout_minutes``.
    """
    place = find_place()
    os.environ |= announce(place)
    os.environ |= network_settings(place, os.environ)
    _follow_parent()
    if torch.cuda.is_available():
        # SLURM may show each rank its own device only
        device, backend = torch.device("cuda", place.local_rank % torch.cuda.device_count()), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        torch.set_num_threads(threads or _own_cores(place))
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # before DeepSpeed looks for one
    _meet(backend, place, timeout_minutes)
    if place.size > 1:
        _beating.append(start_heartbeats(place.rank, place.size, host=os.environ["MASTER_ADDR"], limit_seconds=60 * timeout_minutes))
    return World(place.rank, place.size, device)


def _own_cores(place: Place) -> int:
    """Cores of this rank: SLURM says how many each has; otherwise those of the machine, or of the job, are shared equally."""
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if given.isdigit() and place.launcher == "slurm":
        return int(given)
    return max(1, len(os.sched_getaffinity(0)) // place.local_size)


def _meet(backend: str, place: Place, timeout_minutes: float) -> None:
    # a little longer than heartbeats wait, which can name the rank that is silent
    timeout = timedelta(minutes=timeout_minutes, seconds=8)
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (dist.DistError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
        first = str(error).strip().partition("\n")[0]
        raise LaunchError(
            f"rank {place.rank} of {place.size} on {socket.gethostname()} did not meet the others at {where} in {timeout_minutes:g} "
            f"minutes (launch.timeout_minutes): {first}"
        ) from error


def leave() -> None:
    """Leave the process group."""
    while _beating:
        _beating.pop().leave()
    if dist.is_initialized():
        dist.destroy_process_group()


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

"""Ranks that fall silent: each tells a store now and then that it is alive; who is not heard of is named, and the job ends.

A rank that is stopped, swapped out or cut off leaves the others waiting in a collective, whose timeout then names nobody. Here a thread
of every rank writes to a store on rank 0, which says whose beats have ceased. Where rank 0 itself is silent, so is its store, which
the others notice.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

VERDICT = "silent"
LONGEST_INTERVAL = 2.0  # seconds

Who = dict[str, Any]
"""A rank's ``host`` and ``pid``, and of rank 0 the store's ``port``."""


class Heartbeats:
    """Beats of this rank, and on rank 0 the watch over all. The process ends with exit code 1 where a rank is silent for too long."""

    def __init__(self, store: TCPStore, ranks: list[Who], rank: int, limit_seconds: float) -> None:
        """Begin to beat.

        Args:
            store: rank 0's. ranks: who they are.
            rank: this one.
            limit_seconds: silence that ends the job.
        """
        self._store, self._ranks, self._rank, self._limit = store, ranks, rank, limit_seconds
        self._interval = min(LONGEST_INTERVAL, limit_seconds / 4)
        self._heard = time.monotonic()
        self._stop = threading.Event()
        for work in (self._beat, self._listen):
            threading.Thread(target=work, daemon=True, name="heartbeat").start()

    def leave(self) -> None:
        """Beat no more, and watch no more."""
        self._stop.set()

    def _beat(self) -> None:
        seen = dict.fromkeys(range(len(self._ranks)), ("", time.monotonic()))
        beats = 0
        while not self._stop.wait(self._interval):
            beats += 1
            try:
                self._store.set(f"beat {self._rank}", str(beats))
                if self._rank == 0:
                    self._watch(seen)
                elif self._store.check([VERDICT]):
                    self._end(json.loads(self._store.get(VERDICT)))
            except dist.DistError:
                continue  # _listen tells when that has lasted for too long
            self._heard = time.monotonic()

    def _listen(self) -> None:
        """Whether rank 0's store still answers; in a thread of its own, since one that asks a silent store waits."""
        while self._rank > 0 and not self._stop.wait(self._interval):
            if time.monotonic() - self._heard > self._limit + self._interval:
                self._end([0])

    def _watch(self, seen: dict[int, tuple[str, float]]) -> None:
        """On rank 0: whose beats are not new."""
        now, silent = time.monotonic(), []
        for rank, (last, since) in seen.items():
            key = f"beat {rank}"
            found = self._store.get(key).decode() if self._store.check([key]) else ""
            if found != last:
                seen[rank] = (found, now)
            elif now - since > self._limit:
                silent.append(rank)
        if silent:
            self._store.set(VERDICT, json.dumps(silent))
            time.sleep(2 * self._interval)  # for the others to hear of it before the store is gone
            self._end(silent)

    def _end(self, silent: list[int]) -> None:
        if self._stop.is_set():
            return
        if self._rank == min(set(range(len(self._ranks))) - set(silent)):  # one says it for all
            named = ", ".join(f"rank {rank} ({self._ranks[rank]['host']}, process {self._ranks[rank]['pid']})" for rank in silent[:4])
            more = f" and {len(silent) - 4} more" if len(silent) > 4 else ""
            sys.stderr.write(f"mates: {named}{more}: not heard of for {self._limit:.0f} s (launch.timeout_minutes); the job ends\n")
            sys.stderr.flush()
        for rank in silent:  # a stopped process hears no other signal
            if self._ranks[rank]["host"] == socket.gethostname():
                with contextlib.suppress(OSError):
                    os.kill(self._ranks[rank]["pid"], signal.SIGKILL)
        os._exit(1)


def start_heartbeats(rank: int, size: int, *, host: str, limit_seconds: float) -> Heartbeats:
    """Begin to beat, through a store on rank 0's ``host``. All ranks call it; the default process group must be there."""
    timeout = timedelta(seconds=max(1.0, limit_seconds))
    store = TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False) if rank == 0 else None
    ranks: list[Any] = [None] * size
    dist.all_gather_object(ranks, {"host": socket.gethostname(), "pid": os.getpid(), "port": store.port if store else None})
    if store is None:
        store = TCPStore(host, ranks[0]["port"], is_master=False, timeout=timeout)
    return Heartbeats(store, ranks, rank, limit_seconds)

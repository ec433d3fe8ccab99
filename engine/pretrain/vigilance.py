"""What a long run must notice: that it is asked to stop, and that a step would spoil the weights. All ranks act at the same step.

A scheduler sends SIGTERM or SIGUSR2 some time before it takes the machines away. A rank only notes it; at the end of the step all ranks
agree, save and end with the exit code 75 (EX_TEMPFAIL of sysexits.h: try again), which a batch script can requeue on.
"""

from __future__ import annotations

import math
import os
import signal
import statistics
from collections import deque
from collections.abc import Iterable
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
STOPPED = 75
"""Exit code of a step that was asked to stop and can be continued."""
BAD_STEP = 3
"""Exit code of training that stopped before a bad step: another attempt would meet the same one."""

REMEMBERED = 128
NEEDED = 32


class StopRequestedError(Exception):
    """All ranks have saved their work and end, as somebody asked."""


class BadStepError(RuntimeError):
    """A step whose loss or gradient is not finite or far too large was not taken, and training stops before it."""


class StopSignals:
    """Notes SIGTERM and SIGUSR2 of this process instead of dying of them.

    Steps that work in small units, each of which is kept, need no such care: they may end at once.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        """Begin to listen, of the main thread only; ``at_once``: the first signal ends the process with :data:`STOPPED`."""
        self.received, self._at_once = False, at_once
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if self._at_once:
            os._exit(STOPPED)


class SpikeWatch:
    """Tells losses that are too large to be believed: above mean + ``sd`` standard deviations of the last 128 steps' worst ranks.

    Nothing is known before 32 steps. Steps that were passed over are not counted.
    """

    def __init__(self, sd: float, recent: Iterable[float] = ()) -> None:
        """Take the number of standard deviations (0: only what is not finite is bad), and the losses of an earlier attempt."""
        self._sd = sd
        self.recent = deque(recent, maxlen=REMEMBERED)
        """The worst rank's loss of each of the last steps, in nats."""

    def limit(self) -> float:
        """The largest loss in nats that any rank may have at the next step."""
        if self._sd == 0 or len(self.recent) < NEEDED:
            return math.inf
        return statistics.fmean(self.recent) + self._sd * statistics.pstdev(self.recent)

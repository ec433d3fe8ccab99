"""Progress for people: a bar on a terminal, a plain line now and then otherwise."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_SECONDS = 10.0


def say(text: str) -> None:
    """Print a line, above any progress bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


class Progress:
    """Counts units of work towards ``total``. ``with Progress("score", 100, "chunk") as p: p.add(1, "note")``."""

    def __init__(self, label: str, total: int, unit: str, *, done: int = 0, enabled: bool = True) -> None:
        self._label, self._total, self._unit, self._done, self._first = label, total, unit, done, done
        self._enabled = enabled
        self._bar = tqdm(total=total, initial=done, unit=unit, desc=label) if enabled and sys.stdout.isatty() else None
        self._start = self._last = time.monotonic()

    def add(self, count: int = 1, note: str = "") -> None:
        """Tell of ``count`` more finished units."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            self._bar.set_postfix_str(note)
            return
        now = time.monotonic()
        if self._enabled and (now - self._last >= LINE_SECONDS or self._done >= self._total):
            self._last = now
            rate = (self._done - self._first) / max(now - self._start, 1e-9)
            left = (self._total - self._done) / rate if rate else 0.0
            say(f"{self._label}: {self._done:,}/{self._total:,} {self._unit}s, {left:.0f} s left" + (f", {note}" if note else ""))

    def reach(self, done: int, note: str = "") -> None:
        """Tell that ``done`` units in all are finished."""
        self.add(done - self._done, note)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

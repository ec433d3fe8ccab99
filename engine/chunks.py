"""Work in fixed chunks over any number of ranks, each chunk's file committed on its own, so that an interruption costs one chunk.

What a chunk holds depends on its number alone, never on which rank made it or when.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from mates.engine.distributed import World
from mates.engine.progress import Progress, say
from mates.preprocess import artifact

PLAN, SECONDS = "plan.json", "seconds.json"
PATIENCE = 20.0
"""Seconds without another chunk after which a rank that is done waits in a barrier, which has a limit of its own."""


def run_chunks(
    directory: Path,
    *,
    plan: Mapping[str, Any],
    chunks: int,
    file_name: Callable[[int], str],
    make: Callable[[int, Path], None] | None = None,
    begin: Callable[[int], Callable[[Path], None]] | None = None,
    world: World,
    label: str,
    started: float,
    team: int = 1,
) -> float:
    """Make the missing chunk files of ``directory``; n teams of ranks take turns with them.

    What each attempt took is kept beside the chunks, so that an interrupted step's cost is the sum of its attempts.

    Args:
        plan: all that the chunks' contents depend on; files that were left by another plan are removed, loudly.
        make: writes one chunk's file (atomically). Called by all ranks of a team, the first of which writes.
        begin: instead of ``make``, does what can be done while the chunk before is made, in another thread, and returns what makes it.
        started: ``time.perf_counter()`` when this attempt's work began (loading a model counts).
        team: ranks that make a chunk together.

    Returns:
        Wall-clock seconds of the step, from ``started`` on, earlier attempts included.
    """
    world.same(lambda: _adopt(directory, artifact.normalise(dict(plan)), label))
    # listed once for all, since the ranks of a team must agree
    listed: list[int] = world.same(lambda: [number for number in range(chunks) if not (directory / file_name(number)).exists()])
    own = listed[world.rank // team :: world.size // team]
    spent = world.same(lambda: read_seconds(directory))
    slowest, done = 0.0, (chunks - len(listed)) * team // world.size
    with Progress(label, done + len(own), "chunk", done=done, enabled=world.first) as progress:
        for number, finish in _begun(own, begin) if begin else _plain(own, make):
            begun = time.perf_counter()
            finish(directory / file_name(number))
            slowest = max(slowest, time.perf_counter() - begun)
            progress.add()
            if world.first:
                artifact.write_json(directory / SECONDS, spent + time.perf_counter() - started)
    _await(directory, map(file_name, listed), max(PATIENCE, 10 * slowest))
    world.barrier()
    total: float = spent + time.perf_counter() - started
    return total


def _await(directory: Path, files: Iterable[str], patience: float) -> None:
    """Wait for files, chunks of other ranks among them, as long as one comes every ``patience`` seconds: a barrier alone would give up on
    ranks that are merely slower, and finds those that have died."""
    missing, began = set(files), time.monotonic()
    last = began
    while (left := missing.difference(path.name for path in directory.iterdir())) and time.monotonic() - last < patience:
        if len(left) < len(missing):
            missing, last = left, time.monotonic()
        time.sleep(min(0.1 + (time.monotonic() - began) / 20, patience / 10))


def _plain(numbers: Sequence[int], make: Callable[[int, Path], None] | None) -> Iterator[tuple[int, Callable[[Path], None]]]:
    assert make is not None, "either make or begin"
    return ((number, partial(make, number)) for number in numbers)


def _begun(numbers: Sequence[int], begin: Callable[[int], Callable[[Path], None]]) -> Iterator[tuple[int, Callable[[Path], None]]]:
    """Chunks with what makes them, the next one being begun meanwhile."""
    with ThreadPoolExecutor(1, thread_name_prefix="next-chunk") as thread:
        ahead = [thread.submit(begin, number) for number in numbers[:1]]
        for number, following in zip(numbers, [*numbers[1:], None], strict=False):
            finish = ahead.pop().result()
            if following is not None:
                ahead.append(thread.submit(begin, following))
            yield number, finish


def read_seconds(directory: Path) -> float:
    """Seconds that earlier attempts took; 0 where that cannot be read, since no work should be refused for it."""
    try:
        found = artifact.read_json(directory / SECONDS)
    except (artifact.ArtifactError, OSError):
        return 0.0
    return float(found) if isinstance(found, int | float) else 0.0


def discard_plan(directory: Path) -> None:
    """Remove what is only needed while chunks are being made."""
    for name in (PLAN, SECONDS):
        (directory / name).unlink(missing_ok=True)
    for left in directory.glob(".*.tmp"):  # of ranks that were killed while they wrote
        left.unlink(missing_ok=True)


def _adopt(directory: Path, plan: Mapping[str, Any], label: str) -> None:
    """Keep earlier chunks where they were made by the same plan."""
    path = directory / PLAN
    if path.exists():
        try:
            if artifact.read_json(path) == plan:
                return
        except artifact.ArtifactError:
            pass
    if directory.exists() and any(directory.iterdir()):
        say(f"{label}: unfinished work in {directory} was made for other inputs or settings; starting over")
        aside = directory.with_name(f".{directory.name}.discarded")
        shutil.rmtree(aside, ignore_errors=True)
        directory.rename(aside)  # at once: half of it without its plan could be taken for this one's
        shutil.rmtree(aside)
    artifact.write_json(path, plan)

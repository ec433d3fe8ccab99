"""Who works in a run's folder: one at a time, and what it is doing, for others to see."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mates.engine.loop import Step
from mates.preprocess.workers import WORKERS_LOCK, is_locked, try_lock

RUN_LOCK = ".run.lock"

Note = Callable[[Step], None]


class RunBusyError(RuntimeError):
    """Another process works in the same run folder."""


@contextmanager
def hold_run(run_dir: Path) -> Iterator[Note]:
    """Hold the run's folder: one ``mates run`` or launch at a time. What is yielded notes the step that is worked on, for
    :func:`step_at_work`. RunBusyError where there is another."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / RUN_LOCK).open("ab") as own:
        if not try_lock(own, 1):  # `mates status` may hold it for an instant
            raise RunBusyError(f"{run_dir}: another `mates run` is working here; wait for it, or choose another run_dir")

        def note(step: Step) -> None:
            own.truncate(0)
            own.write(str(step).encode())
            own.flush()

        own.truncate(0)
        yield note


@contextmanager
def run_lock(run_dir: Path) -> Iterator[Note]:
    """The same, and neither jobs of the run are in a queue nor processes of an earlier one still ending."""
    from mates.launchers.slurm import alive_jobs

    with hold_run(run_dir) as note:
        if shutil.which("squeue") and (alive := alive_jobs(run_dir)):
            raise RunBusyError(
                f"{run_dir}: {len(alive)} jobs of it are in SLURM's queue, the first is {alive[0].name} ({alive[0].job}); "
                f"see `mates status {run_dir}`, or `mates cancel {run_dir}` first"
            )
        with (run_dir / WORKERS_LOCK).open("ab") as workers:
            if not try_lock(workers, 60):
                raise RunBusyError(f"{run_dir}: processes of an earlier run are still working here; end them first")
        yield note


def step_at_work(run_dir: Path) -> str | None:
    """The step that a process which holds the run's folder works on, as it is called in messages; None where nobody holds it."""
    path = run_dir / RUN_LOCK
    if not path.is_file():
        return None
    with path.open("rb") as handle:
        return handle.read().decode(errors="replace") if is_locked(handle) else None

"""Training that loses a rank or its disk ends by itself, loses no more than one interval, and comes to the same weights."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from small_disks import resize, small_disk_at
from training import STEPS, command, fingerprint, finish, logged, run_undisturbed, session_folder, write_recipe

from mates.engine.pretrain.checkpoint import LOSSES
from mates.engine.pretrain.stage import superseded
from mates.preprocess import artifact
from mates.preprocess.artifact import MANIFEST_NAME, ArtifactError

EVERY = 4
INTERVAL = ("--pretrain.checkpoint_every", str(EVERY))
LIMIT = 60.0
"""Seconds within which a run ends that has lost a rank."""
MARK = "MATES_TEST_RUN"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(session_folder(tmp_path_factory))


@pytest.fixture(scope="module")
def undisturbed(recipe: Path) -> Path:
    """It saved nothing before its end."""
    return run_undisturbed(recipe)


def processes_of(run_dir: Path) -> list[tuple[int, dict[str, str]]]:
    """Pids and environments of all processes that a run has started, whoever their parent is by now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if environment.get(MARK) == str(run_dir) and process.status() != psutil.STATUS_ZOMBIE:
                found.append((process.pid, environment))
    return found


def partial(run_dir: Path, step: int) -> Path:
    return run_dir / f"shared/stage0/partial/step-{step:08d}"


def is_unfinished(folder: Path) -> bool:
    return folder.exists() and not (folder / MANIFEST_NAME).exists()


def newest_whole(run_dir: Path) -> int:
    """The step of the newest checkpoint that is whole, hashes included; 0 where there is none."""
    steps = [0]
    for folder in (run_dir / "shared/stage0/partial").glob("step-*"):
        with contextlib.suppress(ArtifactError):
            steps.append(int(artifact.verify(folder, "partial checkpoint").info["stage_step"]))
    return max(steps)


class Training:
    """A run that is killed again and again, and what holds of every attempt."""

    def __init__(self, recipe: Path, run_dir: Path, *, in_background: bool = False) -> None:
        """``in_background``: checkpoints are written while training goes on; a kill then costs up to two intervals."""
        self.recipe, self.run_dir = recipe, run_dir
        self.more = (*INTERVAL, "--pretrain.async_checkpoints", str(in_background).lower())
        self.most_lost = EVERY * (1 + in_background)
        self.known: list[int] = []
        """Steps that the attempts before have logged."""

    def new(self) -> list[int]:
        """Steps that this attempt has logged."""
        return logged(self.run_dir)[len(self.known) :]

    def attempt(self, act: Callable[[subprocess.Popen[str]], None]) -> subprocess.CompletedProcess[str]:
        """Run, do something to it, and see it end by itself with no process left; nothing that was saved before may be lost."""
        whole = newest_whole(self.run_dir)
        with subprocess.Popen(
            command(self.recipe, self.run_dir, *self.more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {MARK: str(self.run_dir)},
        ) as process:
            try:
                act(process)
                output, errors = process.communicate(timeout=LIMIT)
                assert not processes_of(self.run_dir)
            finally:
                for pid, _ in processes_of(self.run_dir):  # after a failure, nothing of it may disturb other tests
                    os.kill(pid, signal.SIGKILL)
        steps = self.new()
        assert steps[0] == whole + 1, "it did not go on from the newest whole checkpoint"
        assert steps == list(range(steps[0], steps[0] + len(steps))), "a step was repeated or left out"
        assert (f"continuing from step {whole}\n" in output) == (whole > 0)
        if self.known:
            assert steps[0] > self.known[-1] - self.most_lost, "more was lost than may be"
        self.known += steps
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def wait_for(self, is_time: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 0.005) -> None:
        while not is_time():
            assert process.poll() is None, "the run ended before the moment came"
            time.sleep(seconds)

    def kill(self, rank: int, is_time: Callable[[], bool], *, seconds: float = 0.005) -> None:
        """SIGKILL a rank at some moment after the attempt's first step."""

        def act(process: subprocess.Popen[str]) -> None:
            self.wait_for(lambda: bool(self.new()), process)
            found = processes_of(self.run_dir)
            assert process.pid in dict(found)
            (pid,) = [pid for pid, environment in found if environment.get("RANK") == str(rank)]
            self.wait_for(is_time, process, seconds)
            os.kill(pid, signal.SIGKILL)

        done = self.attempt(act)
        assert done.returncode == 1
        assert re.search(r"mates run: a rank was killed by SIGKILL \(its launcher, process \d+, ended with exit code 247\)\n", done.stderr)

    def kill_inside_save(self, rank: int, moment: str, *, after: int) -> bool:
        """SIGKILL a rank inside the ``after``-th save of steps that have no folder yet; False where the save was already through."""
        begun = [int(folder.name.split("-")[1]) for folder in (self.run_dir / "shared/stage0/partial").glob("step-*")]
        folder = partial(self.run_dir, max(begun, default=0) + after * EVERY)
        self.kill(rank, lambda: MOMENTS[moment](folder), seconds=0)
        return is_unfinished(folder)

    def complete(self) -> None:
        """Train to the end, and not a moment longer: what comes after the checkpoint's manifest takes time and must not change it."""

        def act(process: subprocess.Popen[str]) -> None:
            self.wait_for((self.run_dir / "shared/stage0/checkpoint" / MANIFEST_NAME).exists, process)
            for pid, _ in processes_of(self.run_dir):
                os.kill(pid, signal.SIGKILL)

        self.attempt(act)
        assert self.known[-1] == STEPS
        assert set(self.known) == set(range(1, STEPS + 1))


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "folder": Path.exists,
    "files": lambda folder: any((folder / "deepspeed").glob("*/*.pt")),
    "losses": lambda folder: (folder / LOSSES).exists(),
}
"""What a save has done by then. The manifest comes after the losses."""


def killed_inside_saves(training: Training, moments: Sequence[str], source: random.Random) -> None:
    for moment in moments:
        # the losses and the manifest are written by rank 0 alone, when the others have done their part
        while not training.kill_inside_save(0 if moment == "losses" else source.randrange(2), moment, after=source.randint(1, 2)):
            pass  # it came too late, and counts for nothing


def test_a_rank_killed_inside_a_save(recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    training = Training(recipe, tmp_path / "run")
    while not training.kill_inside_save(1, "files", after=2):
        pass
    training.complete()
    assert fingerprint(tmp_path / "run") == fingerprint(undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("in_background", [False, True])
def test_ranks_killed_inside_five_saves(recipe: Path, undisturbed: Path, tmp_path: Path, in_background: bool) -> None:
    training, source = Training(recipe, tmp_path / "run", in_background=in_background), random.Random(1)
    moments = [*MOMENTS, *source.choices(list(MOMENTS), k=2)]
    source.shuffle(moments)
    killed_inside_saves(training, moments, source)
    training.complete()
    assert fingerprint(tmp_path / "run") == fingerprint(undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_ranks_killed_at_twenty_steps(recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    training, source = Training(recipe, tmp_path / "run"), random.Random(0)
    for step in sorted(source.sample(range(1, STEPS - 8), 20)):
        training.kill(source.randrange(2), lambda step=step: training.new()[-1] >= step)  # type: ignore[misc]
    training.complete()
    assert fingerprint(tmp_path / "run") == fingerprint(undisturbed)


# --- full disks ----------------------------------------------------------------------------------------------------

DISK_FULL = re.compile(r"mates \w+: (\S+): the disk is full: ([\d,]+) bytes free, (?:about )?([\d,]+) are needed")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1,500 KiB: one partial checkpoint of 887 kB and half of the next."""
    with small_disk_at(tmp_path / "small", "1500k") as disk:
        yield disk


def fill(path: Path) -> None:
    """Take all the space that is left."""
    with path.open("wb", buffering=0) as handle, contextlib.suppress(OSError):
        while True:
            handle.write(bytes(4096))


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_a_full_disk_says_what_is_missing_and_that_suffices(small_disk: Path, recipe: Path, undisturbed: Path) -> None:
    """The disk is given what the message asks for, no more, so that it is full again at another place."""
    run_dir, size, full = small_disk / "run", 1500 << 10, []
    while (done := finish(recipe, run_dir, *INTERVAL)).returncode != 0:
        assert done.returncode == 1, done.stderr
        found = DISK_FULL.search(done.stderr)
        assert found, done.stderr
        folder, free, needed = Path(found[1]), *(int(number.replace(",", "")) for number in found.groups()[1:])
        assert free < needed
        assert folder not in full, "the space that was asked for was too little"
        full.append(folder)
        assert not (folder / MANIFEST_NAME).exists()
        assert newest_whole(run_dir) == max(EVERY, (logged(run_dir)[-1] - 1) // EVERY * EVERY)
        size += needed - free
        resize(small_disk, str(size))
    assert full == [partial(run_dir, 2 * EVERY), partial(run_dir, 3 * EVERY), run_dir / "shared/stage0/checkpoint"]
    assert fingerprint(run_dir) == fingerprint(undisturbed)


@pytest.mark.slow
def test_a_disk_too_full_for_a_line_of_metrics(small_disk: Path, recipe: Path, undisturbed: Path) -> None:
    """Full after the checkpoint of step 30, in the middle of a line about ten steps later, where the block ends that lines had gone to."""
    run_dir, filler = small_disk / "run", small_disk / "filler"
    more = ("--pretrain.checkpoint_every", "30")
    resize(small_disk, "8m")
    with subprocess.Popen(command(recipe, run_dir, *more), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not (done := logged(run_dir)) or done[-1] <= 30:
            assert process.poll() is None
            time.sleep(0.005)
        fill(filler)
        _, errors = process.communicate()
    assert process.returncode == 1
    found = DISK_FULL.search(errors)
    assert found, errors
    assert found[1] == str(run_dir / "metrics.jsonl")
    assert (run_dir / "metrics.jsonl").read_bytes().endswith(b"}\n")
    reached = logged(run_dir)[-1]
    assert 30 < reached < STEPS
    assert newest_whole(run_dir) == 30
    filler.unlink()
    continued = finish(recipe, run_dir, *more)
    assert continued.returncode == 0, continued.stderr
    assert logged(run_dir) == [*range(1, reached + 1), *range(31, STEPS + 1)]
    assert fingerprint(run_dir) == fingerprint(undisturbed)


# --- which checkpoints are kept --------------------------------------------------------------------------------------


def test_unfinished_and_foreign_checkpoints_supersede_none(tmp_path: Path) -> None:
    """Of steps 12 to 24 the whole ones are 12, 16, 20 and 24; 18 and 28 were not finished, and 24 was made with other settings."""
    for step in (12, 16, 18, 20, 24, 28):
        partial(tmp_path, step).mkdir(parents=True)
    for step in (12, 16, 20, 24):
        (partial(tmp_path, step) / MANIFEST_NAME).write_text(json.dumps({}))
    assert superseded(partial(tmp_path, 20), 2) == [partial(tmp_path, step) for step in (12, 18, 28)]

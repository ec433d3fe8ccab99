"""Work in chunks: what is kept, what is not believed, and what the next chunk's beginning changes (nothing)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import in_threads

from mates.engine import distributed
from mates.engine.chunks import PLAN, _await, run_chunks
from mates.engine.distributed import World
from mates.preprocess import artifact

ALONE = World(0, 1, torch.device("cpu"))
PLANNED = {"of": "these settings"}


def name(number: int) -> str:
    return f"{number}.npy"


def make(number: int, path: Path) -> None:
    artifact.write_array(path, np.array([number]))


def begin(number: int) -> Callable[[Path], None]:
    return lambda path: make(number, path)


def made(directory: Path, chunks: int = 5) -> list[int]:
    return [int(np.load(directory / name(number))[0]) for number in range(chunks)]


@pytest.mark.parametrize("ahead", [False, True])
def test_chunks_that_are_there_are_kept(tmp_path: Path, ahead: bool) -> None:
    calls: list[int] = []

    def counted(number: int, path: Path) -> None:
        calls.append(number)
        make(number, path)

    work = {"begin": lambda number: lambda path: counted(number, path)} if ahead else {"make": counted}
    for missing in ([0, 1, 2, 3, 4], [1, 3]):
        for number in missing:
            (tmp_path / "work" / name(number)).unlink(missing_ok=True)
        calls.clear()
        run_chunks(tmp_path / "work", plan=PLANNED, chunks=5, file_name=name, world=ALONE, label="test", started=0.0, **work)
        assert calls == missing
        assert made(tmp_path / "work") == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("plan", [None, "{", '{"of": "other settings"}'])
def test_chunks_without_a_plan_or_of_another_are_not_believed(tmp_path: Path, plan: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    np.save(folder / name(2), np.array([-1]))
    if plan is not None:
        (folder / PLAN).write_text(plan)
    run_chunks(folder, plan=PLANNED, chunks=5, file_name=name, begin=begin, world=ALONE, label="test", started=0.0)
    assert made(folder) == [0, 1, 2, 3, 4]
    assert "was made for other inputs or settings; starting over" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


def test_an_error_while_beginning_is_the_steps_error(tmp_path: Path) -> None:
    def fails(number: int) -> Callable[[Path], None]:
        if number == 2:
            raise ValueError("no such sample")
        return begin(number)

    with pytest.raises(ValueError, match="no such sample"):
        run_chunks(tmp_path / "work", plan=PLANNED, chunks=5, file_name=name, begin=fails, world=ALONE, label="test", started=0.0)
    assert (tmp_path / "work" / name(1)).exists()


def test_ranks_wait_in_no_barrier_while_others_make_chunks(tmp_path: Path) -> None:
    """A barrier gives up after a while, on ranks that are merely slower, too."""
    folder, found = tmp_path / "work", []

    def work(world: World) -> None:
        class Watched(type(world)):  # type: ignore[misc]
            def barrier(self) -> None:
                found.append(made(folder, 20))
                super().barrier()

        def slowly(number: int, path: Path) -> None:
            time.sleep(0.03 * world.rank)
            make(number, path)

        watched = Watched(world.rank, world.size, world.device)
        run_chunks(folder, plan=PLANNED, chunks=20, file_name=name, make=slowly, world=watched, label="test", started=0.0)

    in_threads(2, work)
    assert found == [list(range(20))] * 2


def test_chunks_that_do_not_come_are_waited_for_in_a_barrier(tmp_path: Path) -> None:
    _await(tmp_path, ["never"], 0.05)


@pytest.mark.parametrize("left", [[0, 2, 4, 6], [5], []])
def test_missing_chunks_are_dealt_out_to_all(tmp_path: Path, left: list[int]) -> None:
    """Whose they would have been at first does not matter."""
    folder, by = tmp_path / "work", {}

    def work(world: World) -> None:
        def noted(number: int, path: Path) -> None:
            by[number] = world.rank
            make(number, path)

        run_chunks(folder, plan=PLANNED, chunks=8, file_name=name, make=noted, world=world, label="test", started=0.0)

    in_threads(2, work)
    for number in left:
        (folder / name(number)).unlink()
    by.clear()
    in_threads(2, work)
    assert by == {number: place % 2 for place, number in enumerate(left)}
    assert made(folder, 8) == list(range(8))


def test_others_hear_of_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """They never wait for longer than it takes to be told that it goes on; its value and its error reach all."""
    monkeypatch.setattr(distributed, "SAYS_EVERY", 0.05)
    waits: list[float] = []

    def work(world: World) -> int:
        def long() -> int:
            time.sleep(0.5)
            return 7

        plain = type(world).same

        def timed(self: World, make: Callable[[], object]) -> object:
            started = time.perf_counter()
            value = plain(self, make)
            waits.append(time.perf_counter() - started)
            return value

        monkeypatch.setattr(type(world), "same", timed)
        return int(world.same_after_long(long))

    assert in_threads(2, work) == [7, 7]
    assert len(waits) > 6
    with pytest.raises(ZeroDivisionError):
        ALONE.same_after_long(lambda: 1 // 0)

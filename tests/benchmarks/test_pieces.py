"""Pieces of a folder: the same bytes come out, and nothing comes out of damaged ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from mates.preprocess import artifact

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from pieces import LIST, RECIPE, PieceError, main, pack, unpack


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "data"
    (source / "corpus" / "train").mkdir(parents=True)
    (source / "corpus" / "train" / "tokens.bin").write_bytes(np.random.default_rng(0).bytes(300_000))
    (source / "empty").write_bytes(b"")
    (source / "manifest.json").write_text("{}")
    (source / RECIPE).write_text("{}")
    return source


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LIST}


def test_a_folder_comes_out_of_its_pieces(folder: Path, tmp_path: Path) -> None:
    made = pack(folder, tmp_path / "pieces", 70_000)
    sizes = [path.stat().st_size for path in made]
    assert len(sizes) == 5
    assert sizes[:-1] == [70_000] * 4
    assert 0 < sizes[-1] <= 70_000
    unpack(tmp_path / "pieces", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)
    assert not (tmp_path / "again.part").exists()


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_damaged_pieces_are_named(folder: Path, tmp_path: Path, damage: str) -> None:
    piece = pack(folder, tmp_path / "pieces", 100_000)[1]
    if damage == "missing":
        piece.unlink()
    else:
        piece.write_bytes(piece.read_bytes()[:-1] + b"\0")
    with pytest.raises(PieceError, match=f"{piece.name}: missing or damaged"):
        unpack(tmp_path / "pieces", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_what_is_there_is_left_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", str(folder), str(tmp_path / "pieces"), "--mib", "1"]) == 0
    assert "1 pieces, 0.3 MiB" in capsys.readouterr().out
    assert main(["pack", str(folder), str(tmp_path / "pieces")]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main(["unpack", str(tmp_path / "pieces"), str(folder)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main(["unpack", str(tmp_path / "none"), str(tmp_path / "new")]) == 1
    assert main(["pack", str(tmp_path / "none"), str(tmp_path / "other")]) == 1


def test_many_pieces_are_put_together_in_order(folder: Path, tmp_path: Path) -> None:
    assert len(pack(folder, tmp_path / "pieces", 200)) > 1100
    unpack(tmp_path / "pieces", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


def test_what_cannot_be_carried_whole_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "link").symlink_to(folder / "corpus")
    with pytest.raises(PieceError, match="link: a link"):
        pack(folder, tmp_path / "pieces", 100_000)
    (folder / "link").unlink()
    (folder / RECIPE).unlink()
    with pytest.raises(PieceError, match="--data-only"):
        pack(folder, tmp_path / "pieces", 100_000)
    assert not (tmp_path / "pieces").exists()
    with pytest.raises(SystemExit):
        main(["pack", str(folder), str(tmp_path / "pieces"), "--mib", "0"])
    assert "expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "{}", "{"])
def test_a_list_that_is_none_is_named(folder: Path, tmp_path: Path, text: str) -> None:
    pack(folder, tmp_path / "pieces", 100_000)
    (tmp_path / "pieces" / LIST).write_text(text)
    with pytest.raises(PieceError, match=LIST):
        unpack(tmp_path / "pieces", tmp_path / "again")
    assert not list(tmp_path.glob("again*"))


def test_pieces_that_hold_something_else_leave_nothing(folder: Path, tmp_path: Path) -> None:
    (piece,) = pack(folder, tmp_path / "pieces", 1_000_000)
    piece.write_bytes(b"not a zstandard frame")
    (tmp_path / "pieces" / LIST).write_text(json.dumps({piece.name: artifact.digest_of(piece)}))
    with pytest.raises(PieceError, match="pack them again"):
        unpack(tmp_path / "pieces", tmp_path / "again")
    assert not list(tmp_path.glob("again*"))

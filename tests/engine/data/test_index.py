"""The selection index, and .npy files that are not what they should be."""

from __future__ import annotations

import io
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mates.engine.data.index import INDEX_FILE, load_array, read_index, write_ids
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, Cost, Manifest, Request

INT64 = np.dtype(np.int64)


def write_index(request: Request, ids: npt.NDArray[np.int64], *, info: dict[str, Any], cost: Cost) -> Manifest:
    write_ids(request.directory, [ids[: len(ids) // 3], ids[len(ids) // 3 :]], len(ids))
    return request.commit(info=info, cost=cost, files=[INDEX_FILE])


def request_at(directory: Path) -> Request:
    return Request(directory=directory, kind="selection index", settings={"seed": 1}, inputs={"corpus": "c" * 64})


@settings(max_examples=40)
@given(ids=st.lists(st.integers(0, 2**63 - 1), max_size=30))
def test_an_index_comes_back_in_its_order(tmp_path_factory: pytest.TempPathFactory, ids: list[int]) -> None:
    directory = tmp_path_factory.mktemp("index")
    manifest = write_index(request_at(directory), np.array(ids, np.int64), info={"ratio": 0.2}, cost=Cost(seconds=1.0))
    found = read_index(directory, "c" * 64)
    assert found.ids.tolist() == ids
    assert found.ids.dtype == np.int64
    assert found.manifest == manifest
    assert np.load(directory / "index.npy", allow_pickle=False).tolist() == ids  # a plain .npy


def test_an_index_of_another_corpus_is_refused_naming_both(tmp_path: Path) -> None:
    write_index(request_at(tmp_path), np.arange(3), info={}, cost=Cost())
    with pytest.raises(ArtifactError, match=r"selected from corpus cccccccccccc, but the train corpus is dddddddddddd"):
        read_index(tmp_path, "d" * 64)


def test_an_index_that_is_not_complete_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no complete selection index artifact"):
        read_index(tmp_path, "c" * 64)
    write_index(request_at(tmp_path), np.arange(30), info={}, cost=Cost())
    path = tmp_path / "index.npy"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match=rf"{re.escape(str(path))}: \d+ bytes, the manifest says"):
        read_index(tmp_path, "c" * 64)


# --- arrays --------------------------------------------------------------------------------------------------------


def npy(values: npt.NDArray[Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (np.arange(4, dtype=np.int32), "int32 with 1 axes"),
        (np.arange(4, dtype=np.uint64), "uint64 with 1 axes"),
        (np.arange(4.0), "float64 with 1 axes"),
        (np.zeros((2, 2), np.int64), "int64 with 2 axes"),
        (np.int64(3), "int64 with 0 axes"),
        (np.arange(4, dtype=">i8"), ">i8 with 1 axes"),
        (np.zeros(2, [("a", np.int64)]), r".* with 1 axes"),
        (np.array(["one"]), r"<U3 with 1 axes"),
    ],
)
def test_another_dtype_or_shape_is_refused(tmp_path: Path, values: npt.NDArray[Any], found: str) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(npy(values))
    with pytest.raises(ArtifactError, match=rf"^{re.escape(str(path))}: {found}, expected int64 with 1"):
        load_array(path, INT64, 1)


def test_every_cut_and_what_is_no_npy_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    whole = npy(np.arange(5))
    archive = io.BytesIO()
    np.savez(archive, a=np.arange(5))
    bad = [whole[:length] for length in range(len(whole))]
    for data in [*bad, b"some text that is no array", archive.getvalue(), whole.replace(b"<i8", b"<i9"), b"\x80\x05N."]:
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=rf"^{re.escape(str(path))}: not a readable \.npy file"):
            load_array(path, INT64, 1)
    path.unlink()
    with pytest.raises(ArtifactError, match=re.escape(str(path))):
        load_array(path, INT64, 1)


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickled_arrays_are_never_unpickled(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    path = tmp_path / "index.npy"
    objects = np.array([Trap(sprung)], dtype=object)
    attacks = {
        "object array": npy(objects, allow_pickle=True),
        "object field": npy(np.array([(1, Trap(sprung))], [("a", np.int64), ("b", object)]), allow_pickle=True),
        "bare pickle": pickle.dumps(Trap(sprung)),
        "object array of no axes": npy(np.array(Trap(sprung), dtype=object), allow_pickle=True),
    }
    for name, data in attacks.items():
        path.write_bytes(data)
        np.load(path, allow_pickle=True)
        assert sprung.is_dir(), f"{name}: the trap does not work"
        sprung.rmdir()
        with pytest.raises(ArtifactError, match="not a readable"):
            load_array(path, INT64, 1)
        with pytest.raises(ArtifactError, match="not a readable"):
            load_array(path, np.dtype(object), 1)
        assert not sprung.exists(), name

    path.write_bytes(attacks["object array"])
    artifact.commit(tmp_path, kind="selection index", settings={}, inputs={"corpus": "c"}, info={}, cost=Cost())
    with pytest.raises(ArtifactError, match="not a readable"):
        read_index(tmp_path, "c")
    assert not sprung.exists()

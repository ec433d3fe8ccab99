"""Finding input files, local and remote, without losing one silently."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mates.preprocess import inputs, readers
from mates.preprocess.inputs import InputError, InputFile, find_inputs, open_raw


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    put(tmp_path, "b.jsonl", "a.json.gz", "deep/c.parquet", "deep/d.jsonl.zst", "notes.txt", "deep/[x].jsonl")
    return tmp_path


def put(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(b"x" * number)


def found_in(tree: Path, *patterns: str) -> list[str]:
    found = find_inputs([f"{tree}/{pattern}" for pattern in patterns])
    assert [file.bytes for file in found] == [Path(file.name).stat().st_size for file in found]
    return [str(Path(file.name).relative_to(tree)) for file in found]


# --- local ---------------------------------------------------------------------------------------------------------


def test_files_are_found_in_the_order_given(tree: Path) -> None:
    everything = ["a.json.gz", "b.jsonl", "deep/[x].jsonl", "deep/c.parquet", "deep/d.jsonl.zst"]
    assert found_in(tree, "b.jsonl", "a.json.gz") == ["b.jsonl", "a.json.gz"]
    assert found_in(tree, ".") == found_in(tree, "") == everything
    assert found_in(tree, "deep", "[ab].*") == ["deep/[x].jsonl", "deep/c.parquet", "deep/d.jsonl.zst", "a.json.gz", "b.jsonl"]
    assert found_in(tree, "**/*.parquet", "*.jsonl") == ["deep/c.parquet", "b.jsonl"]
    assert found_in(tree, "deep/[x].jsonl") == ["deep/[x].jsonl"]
    assert found_in(tree, "deep/**") == everything[2:]
    assert found_in(tree, "d*") == everything[2:]


def test_names_are_as_given_or_found(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    assert find_inputs(["b.jsonl"]) == [InputFile("b.jsonl", 0)]
    assert find_inputs(["./deep/../b.jsonl"]) == [InputFile("b.jsonl", 0)]
    assert find_inputs(["deep/*quet"]) == [InputFile("deep/c.parquet", 2)]
    assert find_inputs([f"file://{tree}/b.jsonl"]) == [InputFile(f"file://{tree}/b.jsonl", 0)]
    assert [file.name for file in find_inputs([f"file://{tree}/deep"])][1] == f"file://{tree}/deep/c.parquet"
    assert readers.find_inputs is find_inputs
    assert readers.InputError is InputError


def test_a_folder_is_sorted_as_its_paths_are(tmp_path: Path) -> None:
    put(tmp_path, "b/2.jsonl", "b/10.jsonl", "b.jsonl", "a/z/1.jsonl", "a/b.jsonl", "b-c/1.jsonl")
    assert found_in(tmp_path, ".") == [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*.jsonl"))]
    assert found_in(tmp_path, "**/*.jsonl") == found_in(tmp_path, ".")


def test_hidden_files_and_other_endings_in_a_folder_are_left_out(tree: Path) -> None:
    put(tree, "deep/.hidden.jsonl", ".cache/e.jsonl", "deep/README", "deep/c.parquet.crc", "deep/e.jsonl.tmp")
    assert found_in(tree, ".") == ["a.json.gz", "b.jsonl", "deep/[x].jsonl", "deep/c.parquet", "deep/d.jsonl.zst"]
    assert found_in(tree, ".cache", "deep/.hidden.jsonl") == [".cache/e.jsonl", "deep/.hidden.jsonl"]  # named outright


def test_no_match_is_an_error_naming_the_pattern(tree: Path) -> None:
    (tree / "empty").mkdir()
    for pattern in ("none.jsonl", "*.arrow", "none/", "empty/**"):
        with pytest.raises(InputError, match=re.escape(f"{tree}/{pattern}: no such file, folder or match")):
            found_in(tree, "b.jsonl", pattern)
    for pattern in ("empty", "emp*"):
        with pytest.raises(InputError, match=re.escape(f"{tree / 'empty'}: no file ending in .json.gz")):
            found_in(tree, pattern)


def test_an_unknown_ending_is_an_error(tree: Path) -> None:
    for pattern in ("notes.txt", "*", "**"):
        with pytest.raises(InputError, match=r"notes\.txt: unknown form; expected a name ending in \.json\.gz"):
            found_in(tree, pattern)


def test_a_file_named_twice_is_an_error(tree: Path) -> None:
    (tree / "link.jsonl").symlink_to(tree / "b.jsonl")
    (tree / "again").symlink_to("deep")
    for patterns in (
        ["b.jsonl", "b.jsonl"],
        ["b.jsonl", "*.jsonl"],
        ["b.jsonl", "deep/../b.jsonl"],
        ["b.jsonl", "link.jsonl"],
        ["*.jsonl"],
    ):
        with pytest.raises(InputError, match=r"b\.jsonl: named more than once"):
            found_in(tree, *patterns)
    with pytest.raises(InputError, match=r"b\.jsonl: named more than once \(again as file:///"):
        find_inputs([f"{tree}/b.jsonl", f"file://{tree}/b.jsonl"])
    with pytest.raises(InputError, match=r"again/\[x\]\.jsonl: named more than once \(again as .*deep/\[x\]\.jsonl"):
        found_in(tree, ".")


def test_symbolic_links_are_followed_and_keep_their_names(tmp_path: Path) -> None:
    put(tmp_path, "store/x/1.jsonl", "store/2.jsonl", "store/blob", "in/3.jsonl")
    (tmp_path / "in/folder").symlink_to("../store/x")
    (tmp_path / "in/file.jsonl").symlink_to(tmp_path / "store/2.jsonl")
    (tmp_path / "in/blob.jsonl").symlink_to(tmp_path / "store/blob")  # as in a cache of Hugging Face
    expected = ["in/3.jsonl", "in/blob.jsonl", "in/file.jsonl", "in/folder/1.jsonl"]
    assert found_in(tmp_path, "in") == expected
    assert found_in(tmp_path, "in/**/*.jsonl") == expected
    # x is elsewhere, so that its parent is not the folder that the link is in
    assert found_in(tmp_path, "in/folder/../2.jsonl") == ["in/folder/../2.jsonl"]
    with pytest.raises(InputError, match="named more than once"):
        found_in(tmp_path, "in/folder/../2.jsonl", "store/2.jsonl")


def test_links_that_lead_back_are_walked_once(tmp_path: Path) -> None:
    put(tmp_path, "a/b/1.jsonl", "a/2.jsonl")
    (tmp_path / "a/b/up").symlink_to("..")
    (tmp_path / "a/b/here").symlink_to(".")
    (tmp_path / "a/root").symlink_to(tmp_path)
    for pattern in ("a", ".", "a/**/*.jsonl", "**", "a/**"):
        assert found_in(tmp_path, pattern) == ["a/2.jsonl", "a/b/1.jsonl"]


def test_a_broken_link_is_an_error_naming_its_target(tree: Path) -> None:
    for name in ("gone.jsonl", "gone"):  # the second may have been a folder
        link = tree / "deep" / name
        link.symlink_to("../nowhere")
        for pattern in ("deep", ".", f"deep/{name}", "deep/g*", "**/g*"):
            with pytest.raises(InputError, match=re.escape(f"{link}: a broken symbolic link to ../nowhere; mend it or remove it")):
                found_in(tree, pattern)
        link.unlink()
    (tree / "self.jsonl").symlink_to("self.jsonl")
    with pytest.raises(InputError, match=r"self\.jsonl: a broken symbolic link to self\.jsonl"):
        found_in(tree, ".")
    (tree / "self.jsonl").unlink()
    (tree / ".gone.jsonl").symlink_to("nowhere")
    assert len(found_in(tree, ".")) == 5


def test_what_is_no_regular_file_is_an_error(tree: Path) -> None:
    os.mkfifo(tree / "pipe.jsonl")
    for pattern in ("pipe.jsonl", ".", "p*"):
        with pytest.raises(InputError, match=r"pipe\.jsonl: not a regular file"):
            found_in(tree, pattern)


def test_a_folder_that_cannot_be_listed_is_an_error(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)  # tests may run as root, whom no permission stops
    with pytest.raises(InputError, match=r"cannot be searched \(.*Permission denied"):
        find_inputs([str(tree)])


# --- remote --------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    for number, name in enumerate(
        ("b.jsonl", "a.json.gz", "deep/c.parquet", "deep/d.jsonl.zst", "deep/.x.jsonl", ".y/z.jsonl", "notes.txt")
    ):
        system.pipe(f"/test_inputs/{name}", b"x" * number)
    yield system
    system.rm("/test_inputs", recursive=True)


@pytest.mark.usefixtures("memory")
def test_remote_files_folders_and_globs(tmp_path: Path) -> None:
    def found(*patterns: str) -> list[InputFile]:
        return find_inputs([f"memory://test_inputs/{pattern}" for pattern in patterns])

    a, b, c, d = (
        InputFile(f"memory:///test_inputs/{name}", size)
        for name, size in (("a.json.gz", 1), ("b.jsonl", 0), ("deep/c.parquet", 2), ("deep/d.jsonl.zst", 3))
    )
    assert found("b.jsonl", "a.json.gz") == [b, a]
    assert found("") == [a, b, c, d]
    assert found("deep", "[ab].*") == [c, d, a, b]
    assert found("**/*.parquet") == [c]
    assert open_raw(c).read() == b"xx"
    for pattern in ("none.jsonl", "*.arrow", "none/"):
        with pytest.raises(InputError, match=re.escape(f"memory://test_inputs/{pattern}: no such file, folder or match")):
            found(pattern)
    with pytest.raises(InputError, match=r"notes\.txt: unknown form"):
        found("notes.txt")
    with pytest.raises(InputError, match=r"memory:///test_inputs/b\.jsonl: named more than once"):
        found("b.jsonl", "b*")
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert [file.name for file in find_inputs([str(tmp_path), "memory://test_inputs/deep"])] == [str(tmp_path / "a.jsonl"), c.name, d.name]


def test_an_empty_remote_folder_is_an_error(memory: Any) -> None:
    memory.pipe("/test_inputs/other/notes.txt", b"")
    with pytest.raises(InputError, match=r"memory://test_inputs/other: no file ending in"):
        find_inputs(["memory://test_inputs/other"])


@pytest.mark.usefixtures("memory")
def test_a_chain_of_file_systems() -> None:
    url = "simplecache::memory://test_inputs/deep/c.parquet"
    assert find_inputs([url]) == [InputFile(url, 2)]
    with open_raw(InputFile(url, 2)) as handle:
        assert handle.read() == b"xx"
    for pattern in ("simplecache::memory://test_inputs/deep/*", "simplecache::memory://test_inputs/deep"):
        with pytest.raises(InputError, match="name the files one by one"):
            find_inputs([pattern])


def test_protocols_that_are_not_installed_or_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    with pytest.raises(InputError, match=r"foo://a\.jsonl: no file system can open it \(Protocol not known: foo\)"):
        find_inputs(["foo://a.jsonl"])
    monkeypatch.setattr(inputs, "url_to_fs", missing)
    message = r"s3://bucket/a\.jsonl: no support for s3:// is installed here\. Install s3fs to access S3"
    with pytest.raises(InputError, match=message):
        find_inputs(["s3://bucket/a.jsonl"])
    with pytest.raises(InputError, match=message):
        open_raw(InputFile("s3://bucket/a.jsonl", 1))


@pytest.mark.usefixtures("memory")
def test_what_a_server_does_not_tell_or_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    info = MemoryFileSystem.info
    monkeypatch.setattr(MemoryFileSystem, "info", lambda self, path, **options: {**info(self, path, **options), "size": None})
    with pytest.raises(InputError, match=r"b\.jsonl: its size is unknown to the server"):
        find_inputs(["memory://test_inputs/b.jsonl"])

    def refuse(self: object, path: str, **options: object) -> None:
        raise RuntimeError("403 Forbidden")

    monkeypatch.setattr(MemoryFileSystem, "info", refuse)
    with pytest.raises(InputError, match=r"b\.jsonl: cannot be looked up \(RuntimeError: 403 Forbidden\)"):
        find_inputs(["memory://test_inputs/b.jsonl"])


# --- opening -------------------------------------------------------------------------------------------------------


def test_opening(tmp_path: Path, memory: Any) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"abc")
    for name in (f"{tmp_path}/a.jsonl", f"file://{tmp_path}/a.jsonl"):
        with open_raw(InputFile(name, 3)) as handle:
            assert handle.read(2) == b"ab"
        assert handle.closed
    for name in (f"{tmp_path}/none.jsonl", str(tmp_path), "memory://test_inputs/none.jsonl"):
        with pytest.raises(InputError, match=re.escape(f"{name}: cannot be opened")):
            open_raw(InputFile(name, 3))


def test_files_are_closed(tmp_path: Path) -> None:
    """However the reading ends."""
    names = []
    for ending in (".jsonl", ".json.gz", ".jsonl.zst", ".parquet"):
        path = tmp_path / f"a{ending}"
        path.write_bytes(b"nonsense\n" * 9)
        names.append(path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for path in names:
        list(readers.PartReader(InputFile(str(path), 81), readers.ReadOptions()))
        with pytest.raises(InputError):
            list(readers.PartReader(InputFile(str(path), 81), readers.ReadOptions(on_bad_input="fail")))
    blocks = iter(readers.PartReader(InputFile(str(names[0]), 81), readers.ReadOptions()))
    next(blocks)
    del blocks
    assert len(list(Path("/proc/self/fd").iterdir())) == before

"""Atomic files, manifests, and what is refused."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, ArtifactMismatchError, Cost, DiskFullError, Manifest, append_line, atomic_file

Json = Any

SETTINGS = {"length": 128, "ratio": 0.2, "model": {"layers": 2, "family": "llama"}, "methods": ["random", "mates"]}
INPUTS = {"corpus": "c0", "tokenizer": "t0"}
FILES = {"a.bin": b"first file", "deep/b.bin": bytes(range(40)), "empty.bin": b""}


def make(
    directory: Path,
    files: Mapping[str, bytes] = FILES,
    *,
    kind: str = "corpus",
    settings: Mapping[str, Json] = SETTINGS,
    inputs: Mapping[str, str] = INPUTS,
    info: Mapping[str, Json] | None = None,
    identity: list[str] | None = None,
) -> Manifest:
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return artifact.commit(
        directory,
        kind=kind,
        settings=settings,
        inputs=inputs,
        info=info or {},
        cost=Cost(flops=1e12, seconds=0.5, tokens=7),
        identity=identity,
    )


def names_in(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


# --- atomic files --------------------------------------------------------------------------------------------------


def test_file_appears_whole_at_the_end_of_the_block(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.bin"
    with atomic_file(path) as handle:
        handle.write(b"one")
        handle.flush()
        assert not path.exists()
    assert path.read_bytes() == b"one"
    with atomic_file(path) as handle:
        handle.write(b"two, longer")
        handle.flush()
        assert path.read_bytes() == b"one"
    assert path.read_bytes() == b"two, longer"
    assert names_in(tmp_path) == {"new/folder/file.bin"}


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), OSError(5, "input/output error"), SystemExit(3)])
@pytest.mark.parametrize("old", [None, b"old content"])
def test_exception_leaves_the_old_content_and_no_temporary_file(tmp_path: Path, error: BaseException, old: bytes | None) -> None:
    path = tmp_path / "file.bin"
    if old is not None:
        path.write_bytes(old)

    def fail() -> None:
        with atomic_file(path) as handle:
            handle.write(b"half of the new con")
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert names_in(tmp_path) == (set() if old is None else {"file.bin"})
    assert old is None or path.read_bytes() == old


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tiny tmpfs to fill needs root and the right to mount")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("block", [100, 1 << 20])  # fails at the flush of a buffer, and in a write that passes it by
def test_full_disk_is_named_and_nothing_changes(tiny_disk: Path, block: int) -> None:
    path = tiny_disk / "file.bin"
    path.write_bytes(b"old")

    def fill() -> None:
        with atomic_file(path) as handle:
            for _ in range((1 << 20) // block):
                handle.write(bytes(block))

    with pytest.raises(ArtifactError, match=rf"^{re.escape(str(path))}: the disk is full \([\d,]+ bytes free\)"):
        fill()
    assert path.read_bytes() == b"old"
    assert names_in(tiny_disk) == {"file.bin"}
    with atomic_file(path) as handle:  # and the space is free again
        handle.write(bytes(32 << 10))
    assert path.stat().st_size == 32 << 10


def test_a_line_is_appended_wholly_or_not_at_all(tiny_disk: Path) -> None:
    path, line = tiny_disk / "lines.jsonl", "x" * 999
    path.write_text(f"{line}\n" * 64)
    append_line(path, line)  # 65,000 of 65,536 bytes
    with pytest.raises(DiskFullError, match=rf"^{re.escape(str(path))}: the disk is full: 0 bytes free, 1,000 are needed for a line"):
        append_line(path, line)
    assert path.read_text() == f"{line}\n" * 65


@pytest.mark.parametrize("torn", ["", '{"step": 1', "{" * 70_000])
@pytest.mark.parametrize("whole", ["", "one\ntwo\n"])
def test_part_of_a_line_is_cut_off_before_the_next(tmp_path: Path, whole: str, torn: str) -> None:
    path = tmp_path / "lines"
    path.write_text(whole + torn)
    append_line(path, "next")
    assert path.read_text() == f"{whole}next\n"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_json_lacks_are_refused(tmp_path: Path, value: float) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="JSON compliant"):
        artifact.write_json(path, {"a": [1.0, value]})
    assert path.read_text() == "old"
    with pytest.raises(ValueError, match="JSON compliant"):
        artifact.fingerprint_of([value])
    for bad in ({"settings": {"a": value}}, {"info": {"a": value}}):
        directory = tmp_path / next(iter(bad))
        with pytest.raises(ValueError, match="JSON compliant"):
            make(directory, **bad)  # type: ignore[arg-type]
        assert not (directory / "manifest.json").exists()


def test_unreadable_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(ArtifactError, match=re.escape(str(path))):
        artifact.read_json(path)
    for data in (b"", b'{"a": 1', b'{"a": "\xff"}'):
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=re.escape(f"{path}: cannot be read as JSON")):
            artifact.read_json(path)


def test_json_is_written_the_same_whatever_the_order(tmp_path: Path) -> None:
    artifact.write_json(tmp_path / "a", {"b": [1, None], "a": "é"})
    artifact.write_json(tmp_path / "b", {"a": "é", "b": [1, None]})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert json.loads((tmp_path / "a").read_text(encoding="utf-8")) == {"b": [1, None], "a": "é"}


# --- commit and load -----------------------------------------------------------------------------------------------


def test_load_gives_back_what_was_committed(tmp_path: Path) -> None:
    made = make(tmp_path, info={"tokens": 12, "shape": (2, 3)})
    assert artifact.load(tmp_path, "corpus") == artifact.load(tmp_path) == artifact.verify(tmp_path, "corpus") == made
    assert {name: (record.bytes, record.blake3) for name, record in made.files.items()} == {
        name: (len(data), blake3(data).hexdigest()) for name, data in FILES.items()
    }
    assert made.settings == SETTINGS
    assert made.inputs == INPUTS
    assert made.info == {"tokens": 12, "shape": [2, 3]}
    assert made.cost == Cost(flops=1e12, seconds=0.5, tokens=7)


def test_temporary_files_of_others_are_no_part_of_an_artifact(tmp_path: Path) -> None:
    (tmp_path / ".a.bin.77.tmp").write_bytes(b"left by a killed process")
    assert set(make(tmp_path).files) == set(FILES)


def test_no_manifest_is_no_artifact(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ArtifactError, match=rf"{re.escape(str(directory))}: no complete corpus .*manifest\.json is missing"):
            artifact.load(directory, "corpus")
        assert artifact.find_complete(directory, kind="corpus", settings=SETTINGS, inputs=INPUTS) is None
    make(tmp_path)
    artifact.unmake(tmp_path)
    artifact.unmake(tmp_path)
    assert names_in(tmp_path) == set(FILES)
    with pytest.raises(ArtifactError, match="is missing"):
        artifact.load(tmp_path)


def test_another_kind_is_refused_naming_both(tmp_path: Path) -> None:
    make(tmp_path, kind="labels")
    for open_as in (artifact.load, artifact.verify):
        with pytest.raises(ArtifactError, match=r"holds a 'labels' artifact, expected 'corpus'"):
            open_as(tmp_path, "corpus")


@pytest.mark.parametrize("name", ["a.bin", "deep/b.bin"])
def test_every_other_length_is_refused_at_load(tmp_path: Path, name: str) -> None:
    make(tmp_path)
    whole = FILES[name]
    for data in [whole[:length] for length in range(len(whole))] + [whole + b"x"]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ArtifactError, match=re.escape(f"{tmp_path / name}: {len(data)} bytes, the manifest says {len(whole)}")):
            artifact.load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ArtifactError, match=re.escape(f"{tmp_path / name}: missing")):
        artifact.load(tmp_path)


@pytest.mark.parametrize("name", ["a.bin", "deep/b.bin"])
def test_every_flipped_byte_is_found_by_verify(tmp_path: Path, name: str) -> None:
    make(tmp_path)
    for at in range(len(FILES[name])):
        changed = bytearray(FILES[name])
        changed[at] ^= 1 << at % 8
        (tmp_path / name).write_bytes(changed)
        artifact.load(tmp_path)
        with pytest.raises(ArtifactError, match=re.escape(f"{tmp_path / name}: BLAKE3 {blake3(changed).hexdigest()}")):
            artifact.verify(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(value=json_values)
def test_a_manifest_of_other_json_is_refused(tmp_path_factory: pytest.TempPathFactory, value: Json) -> None:
    directory = tmp_path_factory.mktemp("other")
    (directory / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(ArtifactError, match="manifest"):
        artifact.load(directory)


@pytest.mark.parametrize("field", ["kind", "fingerprint", "settings", "inputs", "info", "files", "cost", "format"])
def test_a_manifest_without_a_field_is_refused(tmp_path: Path, field: str) -> None:
    make(tmp_path)
    path = tmp_path / "manifest.json"
    raw = json.loads(path.read_text())
    del raw[field]
    path.write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match=rf"not a manifest of this program.*{field}"):
        artifact.load(tmp_path)


def test_a_flipped_bit_in_any_byte_of_the_manifest_is_found(tmp_path: Path) -> None:
    made = make(tmp_path)
    path = tmp_path / "manifest.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        try:
            found = artifact.load(tmp_path)
        except ArtifactError:
            continue
        assert found == made, at  # white space, or the case of an escape: nothing that means anything


def test_sections_are_hashed_apart_and_each_is_verified(tmp_path: Path) -> None:
    pieces = [b"first", b"", b"the second", b"3"]
    (tmp_path / "data").write_bytes(b"".join(pieces))
    record = artifact.FileRecord.of_sections((len(piece), blake3(piece).hexdigest()) for piece in pieces)
    assert record.bytes == 16
    assert [size for size, _ in record.sections] == [5, 10, 1]
    made = artifact.commit(tmp_path, kind="test", settings={}, inputs={}, info={}, cost=Cost(), hashed={"data": record})
    assert made.files["data"] == record
    assert artifact.verify(tmp_path) == made
    for at in range(16):
        changed = bytearray(b"".join(pieces))
        changed[at] ^= 1
        (tmp_path / "data").write_bytes(changed)
        with pytest.raises(ArtifactError, match=r"BLAKE3 .* of bytes"):
            artifact.verify(tmp_path)


def test_a_file_of_one_section_is_recorded_by_its_own_hash() -> None:
    digest = blake3(b"all").hexdigest()
    empty = blake3(b"").hexdigest()
    assert artifact.FileRecord.of_sections([(0, empty), (3, digest)]) == artifact.FileRecord(bytes=3, blake3=digest)


def test_another_format_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(ArtifactError, match="format 2, this version reads 3"):
        artifact.load(tmp_path)


# --- fingerprints --------------------------------------------------------------------------------------------------


def test_equal_contents_have_equal_fingerprints_wherever_they_are(tmp_path: Path) -> None:
    first = make(tmp_path / "one")
    second = make(tmp_path / "other" / "place", settings={"length": 9}, inputs={}, info={"tokens": 3})
    assert first.fingerprint == second.fingerprint
    reordered = dict(reversed(FILES.items()))
    assert make(tmp_path / "reordered", reordered).fingerprint == first.fingerprint


def test_different_artifacts_have_different_fingerprints(tmp_path: Path) -> None:
    made = [
        make(tmp_path / "0"),
        make(tmp_path / "1", kind="labels"),
        make(tmp_path / "2", FILES | {"a.bin": b"first filf"}),
        make(tmp_path / "3", FILES | {"c.bin": b""}),
        make(tmp_path / "4", {"b.bin" if name == "a.bin" else name: data for name, data in FILES.items()}),
        make(tmp_path / "5", {"a.bin": FILES["deep/b.bin"], "deep/b.bin": FILES["a.bin"], "empty.bin": b""}),
    ]
    assert len({manifest.fingerprint for manifest in made}) == len(made)


def test_identity_chooses_what_the_fingerprint_is_of(tmp_path: Path) -> None:
    def fingerprint(number: int, **changed: bytes) -> str:
        files = FILES | {f"{name}.bin": data for name, data in changed.items()}
        return make(tmp_path / str(number), files, identity=["a.bin"]).fingerprint

    assert fingerprint(0) == fingerprint(1, empty=b"not now")
    assert fingerprint(2) != fingerprint(3, a=b"First file")
    make(tmp_path / "4", identity=["a.bin"])
    (tmp_path / "4" / "deep" / "b.bin").write_bytes(bytes(40))
    with pytest.raises(ArtifactError, match=r"b\.bin: BLAKE3"):  # still verified
        artifact.verify(tmp_path / "4")


# --- looking for what was asked ------------------------------------------------------------------------------------


def find(directory: Path, settings: Mapping[str, Json] = SETTINGS, inputs: Mapping[str, str] = INPUTS) -> Manifest | None:
    return artifact.find_complete(directory, kind="corpus", settings=settings, inputs=inputs)


def test_what_fits_is_found(tmp_path: Path) -> None:
    made = make(tmp_path)
    assert find(tmp_path) == made
    assert find(tmp_path, dict(reversed(SETTINGS.items()))) == made
    request = artifact.Request(directory=tmp_path, kind="corpus", settings=SETTINGS, inputs=INPUTS)
    assert request.find() == made


def test_mismatch_names_each_difference_and_no_other(tmp_path: Path) -> None:
    make(tmp_path)
    asked = {"length": 256, "ratio": 0.2, "model": {"layers": 2, "family": "gpt_neox"}, "seed": 1}
    with pytest.raises(ArtifactMismatchError) as caught:
        find(tmp_path, asked, {"corpus": "c1", "scores": "s0"})
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{tmp_path}: a complete corpus artifact is here, made with"
    assert [line.strip() for line in lines[1:-1]] == [
        "length: 128, now asked 256",
        'methods: ["random", "mates"], now not asked for',
        'model.family: "llama", now asked "gpt_neox"',
        "seed: not set, now asked 1",
        'input corpus: "c0", now asked "c1"',
        'input scores: not set, now asked "s0"',
        'input tokenizer: "t0", now not asked for',
    ]
    assert f"remove {tmp_path}" in lines[-1]
    assert artifact.verify(tmp_path).settings == SETTINGS  # and nothing was overwritten


def test_mismatch_between_a_section_and_a_value(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(ArtifactMismatchError, match=r"\n  model: \{.*\}, now asked 3\n"):
        find(tmp_path, SETTINGS | {"model": 3})
    with pytest.raises(ArtifactMismatchError, match=r'\n  length: 128, now asked \{"a": 1\}\n'):
        find(tmp_path, SETTINGS | {"length": {"a": 1}})


def test_a_damaged_artifact_is_an_error_also_where_it_would_not_fit(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "a.bin").write_bytes(b"cut")
    for settings in (SETTINGS, {"length": 1}):
        with pytest.raises(ArtifactError, match="3 bytes, the manifest says 10"):
            find(tmp_path, settings)


# --- normalise -----------------------------------------------------------------------------------------------------

python_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
        | st.dictionaries(st.integers(), inner, max_size=3)
    ),
    max_leaves=10,
)


def through_json(value: Json) -> Json:
    if isinstance(value, (list, tuple)):
        return [through_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): through_json(item) for key, item in value.items()}
    return value


@given(value=python_values)
def test_normalise(value: Json) -> None:
    normal = artifact.normalise(value)
    assert normal == through_json(value)
    assert repr(artifact.normalise(normal)) == repr(normal)


@hypothesis_settings(max_examples=50)
@given(settings=st.dictionaries(st.text(max_size=4), python_values, max_size=4))
def test_settings_with_tuples_fit_themselves(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Json]) -> None:
    directory = tmp_path_factory.mktemp("tuples")
    made = make(directory, {"a": b"1"}, settings=settings)
    assert find(directory, settings) == made

"""Compressed streams of every make: read to their end, or seen to be cut, broken or bombs."""

from __future__ import annotations

import gzip
import io
import json
import random
import zlib
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from mates.preprocess import streams
from mates.preprocess.inputs import RawFile
from mates.preprocess.readers import InputError, PartReader

from .test_readers import (
    COMPRESS,
    COMPRESSED,
    DOCUMENTS,
    FAIL,
    MIB,
    ROWS,
    SKIP,
    Row,
    damage_of,
    documents,
    lines_of,
    measure,
    put_raw,
    write_stream,
    zstd,
)


def is_prefix(texts: list[str], rows: list[Row]) -> bool:
    return texts == [row["text"] for row in rows][: len(texts)]


# --- cut and changed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", COMPRESSED)
def test_every_cut_of_a_compressed_file_is_damage(tmp_path: Path, ending: str) -> None:
    rows = ROWS * 5
    whole = COMPRESS[ending](lines_of(rows))
    for length in range(len(whole)):
        texts, damage = damage_of(put_raw(tmp_path, ending, whole[:length]))
        assert is_prefix(texts, rows)
        assert "0 bytes" in damage if length == 0 else "is cut" in damage


@pytest.mark.parametrize("ending", [".json.gz", ".jsonl.zst"])
def test_documents_before_a_cut_are_kept(tmp_path: Path, ending: str) -> None:
    """As many as the standard library can decompress of the file, which here has several blocks and reads."""
    source = random.Random(2)
    rows = [{"text": source.randbytes(500).hex()} for _ in range(9_000)]
    data = lines_of(rows)
    half = COMPRESS[ending](data[: len(data) // 2])
    whole = half + COMPRESS[ending](data[len(data) // 2 :])  # two members or frames
    for length in sorted({len(half) - 1, len(half) + 1, *source.sample(range(len(whole)), 8)}):
        texts, _ = damage_of(put_raw(tmp_path, ending, whole[:length]))
        if ending == ".json.gz":
            first = zlib.decompressobj(31)
            out = first.decompress(whole[:length])
            out += zlib.decompressobj(31).decompress(first.unused_data)
            expected = out.count(b"\n")
        else:
            expected = max(0, len(data) * length // len(whole) // 1_014 - 300)  # a zstandard block of 128 KiB may be lost
        assert is_prefix(texts, rows)
        assert len(texts) >= expected
        assert len(texts) <= len(data) * length // len(whole) // 1_014 + 200
    assert documents(put_raw(tmp_path, ending, whole[: len(half)])) != []  # a cut between two leaves a sound, shorter file


@pytest.mark.parametrize("ending", [".json.gz", ".json.zst"])  # both with a checksum of the contents
def test_changed_bytes_are_damage(tmp_path: Path, ending: str) -> None:
    whole = COMPRESS[ending](lines_of(ROWS * 5))
    for at in range(20, len(whole)):
        file = put_raw(tmp_path, ending, whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        reader = PartReader(file, SKIP)
        for _ in reader:
            pass
        assert reader.damage is not None
        with pytest.raises(InputError):  # of the damage, or of a row that it spoilt
            list(PartReader(file, FAIL))


@pytest.mark.parametrize("ending", [".json.gz", ".jsonl.zst"])
def test_what_is_not_compressed_at_all_is_damage(tmp_path: Path, ending: str) -> None:
    other = zstd if ending.endswith("gz") else gzip.compress
    for data in (lines_of(ROWS), other(lines_of(ROWS)), b"\0" * 1_000, b"PK\x03\x04 and so on", b"\n"):
        assert damage_of(put_raw(tmp_path, ending, data))[0] == []
    for tail in (b"something else", b"x", b"\x1f", b"\x1f\x8b", b"\x28\xb5\x2f", b"\0\0\0x"):
        texts, _ = damage_of(put_raw(tmp_path, ending, COMPRESS[ending](lines_of(ROWS)) + tail))
        assert is_prefix(texts, ROWS)


# --- zstandard -------------------------------------------------------------------------------------------------------


@given(cuts=st.lists(st.integers(0, 10**6), max_size=5), skippable=st.booleans(), data=st.data())
def test_zstd_of_several_frames(tmp_path_factory: pytest.TempPathFactory, cuts: list[int], skippable: bool, data: st.DataObject) -> None:
    """Frames may end anywhere, inside a line or a character, and may be empty; pzstd puts skippable frames between."""
    lines = lines_of(ROWS)
    bounds = sorted({0, len(lines), *(cut % (len(lines) + 1) for cut in cuts)})
    pieces = [lines[start:stop] for start, stop in zip(bounds, [*bounds[1:], len(lines)], strict=True)]  # the last is empty
    between = b"\x5a\x2a\x4d\x18\x04\x00\x00\x00skip" if skippable else b""
    frames = [between + data.draw(st.sampled_from([zstd, COMPRESS[".jsonl.zst"]]))(piece) for piece in pieces] + [between]
    whole = b"".join(frames)
    directory = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "RAW_BYTES", data.draw(st.sampled_from([1, 3, 1 << 20])))
        assert documents(put_raw(directory, ".jsonl.zst", whole)) == DOCUMENTS
        damage_of(put_raw(directory, ".jsonl.zst", whole[:-1]))


@pytest.mark.parametrize("level", [-5, 1, 3, 19])
def test_zstd_frames_of_every_kind_of_block(tmp_path: Path, level: int) -> None:
    """Raw, repeated and compressed blocks, with and without sizes and checksums, are walked over as the library does."""
    source = random.Random(level)
    contents = source.randbytes(300_000) + b"a" * 400_000 + json.dumps(ROWS).encode() * 500
    for size in (0, 1, 255, 256, 300_000, 66_000, len(contents)):
        for checksum in (False, True):
            compressor = zstandard.ZstdCompressor(level, write_checksum=checksum)
            streamed = compressor.compressobj()  # does not know the size
            for frame in (compressor.compress(contents[:size]), streamed.compress(contents[:size]) + streamed.flush()):
                for raw, complete in ((frame, True), (frame + frame[:-1], False), (frame[:-1], False)):
                    file = put_raw(tmp_path, ".jsonl.zst", raw)
                    with RawFile(file) as handle:
                        walked = streams._WalkedFile(handle)
                        while walked.read(1_000):
                            pass
                        assert walked.complete == complete


def test_zstd_without_a_content_size(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(buffer, closefd=False) as writer:
        for row in ROWS:
            writer.write(lines_of([row]))
            writer.flush(zstandard.FLUSH_BLOCK)
    assert documents(put_raw(tmp_path, ".jsonl.zst", buffer.getvalue())) == DOCUMENTS


def test_a_zstd_window_too_large_for_the_memory(tmp_path: Path) -> None:
    for log, fits in ((27, True), (28, False)):
        parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=log)
        streamed = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        file = put_raw(tmp_path, ".jsonl.zst", streamed.compress(lines_of(ROWS)) + streamed.flush())
        if fits:
            assert documents(file) == DOCUMENTS
        else:
            assert "zstd --long" in damage_of(file)[1]


# --- gzip ------------------------------------------------------------------------------------------------------------


@given(cuts=st.lists(st.integers(0, 10**6), max_size=5), zeros=st.sampled_from([0, 1, 512, 9_000]), piece=st.sampled_from([30, 1 << 20]))
def test_gzip_of_several_members(tmp_path_factory: pytest.TempPathFactory, cuts: list[int], zeros: int, piece: int) -> None:
    data = lines_of(ROWS)
    bounds = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    members = [gzip.compress(data[start:stop]) for start, stop in zip(bounds, [*bounds[1:], len(data)], strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "RAW_BYTES", piece)
        directory = tmp_path_factory.getbasetemp()
        assert documents(put_raw(directory, ".json.gz", b"".join(members) + bytes(zeros))) == DOCUMENTS
        assert documents(put_raw(directory, ".json.gz", bytes(zeros).join(members))) == DOCUMENTS
        damage_of(put_raw(directory, ".json.gz", b"".join(members)[:-1]))


def test_gzip_headers_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "RAW_BYTES", 7)  # headers come in pieces
    data = lines_of(ROWS)
    plain = gzip.compress(data)
    parts = {4: b"\x03\x00abc", 8: b"name\0", 16: b"comment\0"}
    for flags in range(0, 32, 2):
        header = plain[:3] + bytes([flags]) + plain[4:10] + b"".join(extra for flag, extra in parts.items() if flags & flag)
        header += (zlib.crc32(header) & 0xFFFF).to_bytes(2, "little") if flags & 2 else b""
        assert gzip.decompress(header + plain[10:]) == data
        assert documents(put_raw(tmp_path, ".json.gz", (header + plain[10:]) * 2)) == DOCUMENTS * 2


# --- bombs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".json.gz", ".jsonl.zst"])
def test_a_decompression_bomb_is_refused_early(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    good = b'{"text": "good"}\n'
    write_stream(path, [(good, 1), (MIB, 32)])
    size = path.stat().st_size
    with path.open("ab") as handle:  # repeated to 10 MB, many GB in all
        raw = path.read_bytes()
        for _ in range(10_000_000 // size):
            handle.write(raw)
    documents, dropped, damage, memory, seconds = measure(path)
    assert documents == 1
    assert set(dropped) == {"too long"}
    assert damage is not None
    assert "decompression bomb" in damage
    assert memory < 80, f"{memory} MiB"
    assert seconds < 5


def test_what_compresses_well_is_no_bomb(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    row = b'{"text": "' + b"good " * 200 + b'"}\n'
    write_stream(path, [(row, 40_000)])  # 40 MB in a few KB
    documents, dropped, damage, memory, _ = measure(path)
    assert (documents, dropped, damage) == (40_000, {}, None)
    assert memory < 60, f"{memory} MiB"

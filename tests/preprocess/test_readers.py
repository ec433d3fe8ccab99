"""Documents out of files: every form gives the same, and what cannot be used is accounted for."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from mates.preprocess.readers import Document, Dropped, InputError, find_inputs, read_documents

Row = dict[str, Any]

ROWS: list[Row] = [
    {"text": "Plain text.", "url": "https://example.org/a", "timestamp": "2019-04-25T12:57:54Z", "source": "a"},
    {"text": "Line one\nline two\r\n\tand \u2028 a separator, \u0085 another\x0c", "url": None},
    {"url": "https://example.org/é", "text": "日本語 \U0001f600"},
    {"text": " leading and trailing ", "timestamp": "2020"},
]
DOCUMENTS = [Document(row["text"], row.get("url"), row.get("timestamp"), row.get("source")) for row in ROWS]


def lines_of(rows: list[Row]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": lambda data: data,
    ".json": lambda data: data,
    ".json.gz": gzip.compress,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": lambda data: zstandard.ZstdCompressor().compress(data),
    ".json.zst": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
}


def put(directory: Path, ending: str, data: bytes) -> Path:
    path = directory / f"documents{ending}"
    path.write_bytes(COMPRESS[ending](data))
    return path


def put_parquet(directory: Path, columns: Row) -> Path:
    path = directory / "documents.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def count_until_error(path: Path, message: str) -> int:
    """Documents before the InputError that must come; its message must name the file and that count."""
    count = 0
    with pytest.raises(InputError) as caught:  # noqa: PT012 (the loop is what raises)
        for _ in read_documents(path):
            count += 1
    assert str(caught.value).startswith(f"{path}: ")
    assert re.search(message.format(count=count), str(caught.value)), str(caught.value)
    return count


# --- what comes out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", COMPRESS)
def test_json_lines_in_every_wrapping(tmp_path: Path, ending: str) -> None:
    assert list(read_documents(put(tmp_path, ending, lines_of(ROWS)))) == DOCUMENTS


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
def test_parquet(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "documents.parquet"
    columns: Row = {name: [row.get(name) for row in ROWS] for name in ("source", "text", "url", "timestamp")}
    columns["other"] = [1.5] * len(ROWS)
    pq.write_table(pa.table(columns), path, compression=compression, row_group_size=3)
    assert list(read_documents(path)) == DOCUMENTS
    put_parquet(tmp_path, {"body": pa.array(columns["text"], pa.large_string())})
    assert list(read_documents(path, "body")) == [Document(row["text"]) for row in ROWS]


def test_parquet_of_more_rows_than_a_batch(tmp_path: Path) -> None:
    texts = [f"document {number}" for number in range(2_500)]
    assert list(read_documents(put_parquet(tmp_path, {"text": texts}))) == [Document(text) for text in texts]


@pytest.mark.parametrize("ending", COMPRESS)
def test_last_line_without_an_end_blank_lines_and_windows_line_ends(tmp_path: Path, ending: str) -> None:
    data = lines_of(ROWS)
    for variant in (
        data[:-1],
        b"\n\n" + data.replace(b'"}\n', b'"}\n\n  \t \n') + b"\n",
        b"\r\n".join(data.split(b"\n")),
        b"\r\n\r\n" + b"\r\n".join(data.split(b"\n"))[:-2],
        b"\xef\xbb\xbf" + data,  # the byte order mark that Windows tools put
    ):
        assert list(read_documents(put(tmp_path, ending, variant))) == DOCUMENTS


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_file_without_documents(tmp_path: Path, ending: str) -> None:
    for data in (b"", b"\n \n"):
        assert list(read_documents(put(tmp_path, ending, data))) == []


@pytest.mark.parametrize("ending", COMPRESS)
def test_documents_longer_than_any_buffer(tmp_path: Path, ending: str) -> None:
    source = random.Random(1)  # hexadecimal noise compresses to a half, so that blocks of 1 MiB end inside documents
    rows = [{"text": source.randbytes(size).hex()} for size in (10, 800_000, 3, 700_000, 0, 500_000)]
    expected = [Document(row["text"]) if row["text"] else Dropped("empty text") for row in rows]
    path = put(tmp_path, ending, lines_of(rows))
    assert path.stat().st_size > 3 << 19
    assert list(read_documents(path)) == expected


def test_metadata_of_other_types_becomes_text(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "url": 7, "timestamp": {"y": 1}, "source": ["b"]},
        {"text": "b", "url": "x\ud800y", "source": "\udfff"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read_documents(path)
    assert first == Document("a", "7", "{'y': 1}", "['b']")
    assert isinstance(second, Document)
    for value in (second.url, second.source):  # lone surrogates cannot be written anywhere
        assert value is not None
        assert value.encode().decode() == value
    assert (second.text, second.url) == ("b", "x?y")


# --- rows that are dropped -----------------------------------------------------------------------------------------

GOOD = Document("good")
CASES: list[tuple[bytes, Document | Dropped]] = [
    (b'{"text": "good"}', GOOD),
    (b'{"text": "good"', Dropped("malformed JSON")),
    (b'{"text": "go\xff\xfeod"}', Dropped("malformed JSON")),
    (b"good", Dropped("malformed JSON")),
    (b'{"text": "good"} {"text": "good"}', Dropped("malformed JSON")),
    (b"[" * 200_000, Dropped("malformed JSON")),
    (b'{"text": "good", "n": ' + b"9" * 5_000 + b"}", Dropped("malformed JSON")),
    (b'["text"]', Dropped("not an object")),
    (b'"text"', Dropped("not an object")),
    (b"null", Dropped("not an object")),
    (b"1e5", Dropped("not an object")),
    (b"{}", Dropped("no text field")),
    (b'{"Text": "good", "body": "good"}', Dropped("no text field")),
    (b'{"text": null}', Dropped("text is not a string")),
    (b'{"text": ["good"]}', Dropped("text is not a string")),
    (b'{"text": 3}', Dropped("text is not a string")),
    (b'{"text": ""}', Dropped("empty text")),
    (b'{"text": " \\n\\t\\u00a0\\u3000"}', Dropped("empty text")),
    (b'{"text": "a \\ud83d b"}', Dropped("invalid unicode")),
    (b'{"text": "\\udc00\\ud800"}', Dropped("invalid unicode")),
    (b'{"text": "a \xed\xa0\x80 b"}', Dropped("invalid unicode")),
    (b'{"text": "\\ud83d\\ude00"}', Document("\U0001f600")),
    (b'{"text": "good", "score": NaN}', GOOD),
]


@pytest.mark.parametrize("ending", COMPRESS)
def test_each_bad_row_has_its_reason_and_its_place(tmp_path: Path, ending: str) -> None:
    data = b"".join(line + b"\n" for line, _ in CASES)
    assert list(read_documents(put(tmp_path, ending, data))) == [expected for _, expected in CASES]


@given(chosen=st.lists(st.sampled_from(CASES), max_size=40), data=st.data())
def test_rows_in_are_documents_and_drops_out(
    tmp_path_factory: pytest.TempPathFactory, chosen: list[tuple[bytes, Document | Dropped]], data: st.DataObject
) -> None:
    ends = [data.draw(st.sampled_from([b"\n", b"\r\n", b"\n\n", b" \n"])) for _ in chosen]
    whole = b"".join(line + end for (line, _), end in zip(chosen, ends, strict=True))
    path = put(tmp_path_factory.mktemp("rows"), data.draw(st.sampled_from(sorted(COMPRESS))), whole)
    found = list(read_documents(path))
    assert found == [expected for _, expected in chosen]
    reasons = Counter(row.reason for row in found if isinstance(row, Dropped))
    assert len(chosen) == sum(isinstance(row, Document) for row in found) + reasons.total()


def test_bad_parquet_rows(tmp_path: Path) -> None:
    path = put_parquet(tmp_path, {"text": ["good", None, "", " \n", "good"]})
    none, empty = Dropped("text is not a string"), Dropped("empty text")
    assert list(read_documents(path)) == [GOOD, none, empty, empty, GOOD]
    path = put_parquet(tmp_path, {"text": [1, 2]})
    assert list(read_documents(path)) == [Dropped("text is not a string")] * 2
    path = put_parquet(tmp_path, {"text": [b"good"]})
    assert list(read_documents(path)) == [Dropped("text is not a string")]


def test_parquet_text_that_is_no_unicode(tmp_path: Path) -> None:
    texts = pa.array([b"good", b"\xff\xfe", b"good", b"\xed\xa0\x80", b"\xc3\xa9"] * 500, pa.binary()).view(pa.string())
    found = list(read_documents(put_parquet(tmp_path, {"text": texts, "url": ["u"] * 2_500})))
    good, bad = Document("good", "u"), Dropped("invalid unicode")
    assert found == [good, bad, good, bad, Document("é", "u")] * 500


# --- damaged files -------------------------------------------------------------------------------------------------

DAMAGED = r"damaged after {count} documents"


@pytest.mark.parametrize("ending", [".json.gz", ".jsonl.gz", ".jsonl.zst", ".json.zst"])
def test_every_cut_of_a_compressed_file_is_an_error(tmp_path: Path, ending: str) -> None:
    path = put(tmp_path, ending, lines_of(ROWS * 5))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert count_until_error(path, DAMAGED) <= len(ROWS) * 5


@pytest.mark.parametrize("ending", [".json.gz", ".jsonl.zst"])
def test_documents_before_a_cut_are_counted(tmp_path: Path, ending: str) -> None:
    source = random.Random(2)
    rows = [{"text": source.randbytes(500).hex()} for _ in range(5_000)]
    path = put(tmp_path, ending, lines_of(rows))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert 2_000 < count_until_error(path, DAMAGED) < 2_600


@pytest.mark.parametrize("ending", [".json.gz", ".json.zst"])  # both with a checksum of the contents
def test_changed_bytes_are_an_error(tmp_path: Path, ending: str) -> None:
    path = put(tmp_path, ending, lines_of(ROWS * 5))
    whole = path.read_bytes()
    for at in range(20, len(whole) - 8):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        count_until_error(path, DAMAGED)


@pytest.mark.parametrize("ending", [".json.gz", ".jsonl.zst"])
def test_what_is_not_compressed_at_all_is_an_error(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(lines_of(ROWS))
    assert count_until_error(path, DAMAGED) == 0
    path.write_bytes(COMPRESS[ending](lines_of(ROWS)) + b"something else")
    assert count_until_error(path, DAMAGED) <= len(ROWS)


@given(cuts=st.lists(st.integers(0, 10**6), max_size=5), skippable=st.booleans())
def test_zstd_of_several_frames(tmp_path_factory: pytest.TempPathFactory, cuts: list[int], skippable: bool) -> None:
    """Frames may end anywhere, inside a line or a character, and may be empty; pzstd puts skippable frames between."""
    data = lines_of(ROWS)
    bounds = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    pieces = [data[start:stop] for start, stop in zip(bounds, [*bounds[1:], len(data)], strict=True)]  # the last is empty
    between = b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip" if skippable else b""
    frames = [between + zstandard.ZstdCompressor().compress(piece) for piece in pieces]
    path = tmp_path_factory.mktemp("frames") / "documents.jsonl.zst"
    path.write_bytes(b"".join(frames))
    assert list(read_documents(path)) == DOCUMENTS
    path.write_bytes(b"".join(frames)[:-1])
    count_until_error(path, DAMAGED)


def test_zstd_without_a_content_size(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(buffer, closefd=False) as writer:
        for row in ROWS:
            writer.write(lines_of([row]))
            writer.flush(zstandard.FLUSH_BLOCK)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(buffer.getvalue())
    assert list(read_documents(path)) == DOCUMENTS


def test_gzip_of_several_members(tmp_path: Path) -> None:
    data = lines_of(ROWS)
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(data[:70]) + gzip.compress(b"") + gzip.compress(data[70:]))
    assert list(read_documents(path)) == DOCUMENTS


def test_every_cut_of_a_parquet_file_is_an_error(tmp_path: Path) -> None:
    path = put_parquet(tmp_path, {"text": [f"document {number}" for number in range(50)]})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert count_until_error(path, "not a Parquet file") == 0


def test_damage_inside_a_parquet_file_is_an_input_error(tmp_path: Path) -> None:
    """Parquet has no checksums by default, so not all damage shows; what shows is an InputError and nothing else."""
    path = tmp_path / "documents.parquet"
    table = pa.table({"text": [f"document {number} " * 9 for number in range(4_000)]})
    pq.write_table(table, path, compression="zstd", use_dictionary=False, row_group_size=1_000)
    whole = path.read_bytes()
    messages = []
    for at in range(4, len(whole), len(whole) // 150):
        path.write_bytes(whole[:at] + bytes(byte ^ 0x5A for byte in whole[at : at + 8]) + whole[at + 8 :])
        try:
            list(read_documents(path))
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert all(message.startswith(f"{path}: ") for message in messages)


def test_a_parquet_file_without_the_column_says_what_it_has(tmp_path: Path) -> None:
    path = put_parquet(tmp_path, {"content": ["a"], "url": ["b"]})
    assert count_until_error(path, "no column 'text'; found content, url") == 0


@pytest.mark.parametrize("ending", [*COMPRESS, ".parquet"])
def test_a_file_that_went_away_is_an_input_error(tmp_path: Path, ending: str) -> None:
    assert count_until_error(tmp_path / f"gone{ending}", DAMAGED) == 0


# --- finding files -------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.json.gz", "deep/c.parquet", "deep/d.jsonl.zst", "notes.txt", "deep/[x].jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    return tmp_path


def found_in(tree: Path, *patterns: str) -> list[str]:
    return [str(path.relative_to(tree)) for path in find_inputs([str(tree / pattern) for pattern in patterns])]


def test_files_are_found_in_the_order_given(tree: Path) -> None:
    assert found_in(tree, "b.jsonl", "a.json.gz") == ["b.jsonl", "a.json.gz"]
    assert found_in(tree, ".") == ["a.json.gz", "b.jsonl", "deep/[x].jsonl", "deep/c.parquet", "deep/d.jsonl.zst"]
    assert found_in(tree, "deep", "[ab].*") == [
        "deep/[x].jsonl",
        "deep/c.parquet",
        "deep/d.jsonl.zst",
        "a.json.gz",
        "b.jsonl",
    ]
    assert found_in(tree, "**/*.parquet", "*.jsonl") == ["deep/c.parquet", "b.jsonl"]
    assert found_in(tree, "deep/[x].jsonl") == ["deep/[x].jsonl"]


def test_no_match_is_an_error_naming_the_pattern(tree: Path) -> None:
    (tree / "empty").mkdir()
    for pattern in ("none.jsonl", "*.arrow", "none/"):
        with pytest.raises(InputError, match=re.escape(str(tree / pattern))):
            found_in(tree, "b.jsonl", pattern)
    with pytest.raises(InputError, match=re.escape(f"{tree / 'empty'}: no file ending in .json.gz")):
        found_in(tree, "empty")


def test_an_unknown_suffix_is_an_error(tree: Path) -> None:
    for pattern in ("notes.txt", "*"):
        with pytest.raises(InputError, match=r"unknown form; expected a name ending in \.json\.gz"):
            found_in(tree, pattern)


def test_a_file_named_twice_is_an_error(tree: Path) -> None:
    (tree / "link.jsonl").symlink_to(tree / "b.jsonl")
    for patterns in (
        ["b.jsonl", "b.jsonl"],
        ["b.jsonl", "*.jsonl"],
        [".", "deep/../b.jsonl"],
        ["b.jsonl", "link.jsonl"],
    ):
        with pytest.raises(InputError, match=r"b\.jsonl: named more than once"):
            found_in(tree, *patterns)

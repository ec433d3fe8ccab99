"""Documents out of files: every form gives the same, and what cannot be used is accounted for."""

from __future__ import annotations

import gzip
import io
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from mates.preprocess import inputs, readers
from mates.preprocess.parquet import DICTIONARY_ROWS
from mates.preprocess.readers import (
    Block,
    InputError,
    InputFile,
    PartReader,
    ReadOptions,
    Reject,
    parts_of,
    read_texts,
)
from mates.preprocess.rows import EXCERPT_CHARACTERS

Row = dict[str, Any]
Document = tuple[str | None, ...]  # text, url, timestamp, source

SKIP, FAIL = ReadOptions(), ReadOptions(on_bad_input="fail")
ROWS: list[Row] = [
    {"text": "Plain text.", "url": "https://example.org/a", "timestamp": "2019-04-25T12:57:54Z", "source": "a"},
    {"text": "Line one\nline two\r\n\tand \u2028 a separator, \u0085 another\x0c", "url": None},
    {"url": "https://example.org/é", "text": "日本語 \U0001f600"},
    {"text": " leading and trailing ", "timestamp": "2020", "more": [{}, {"}": "{"}]},
    {"text": "a NUL \0 is text"},
]
DOCUMENTS: list[Document] = [(row["text"], row.get("url"), row.get("timestamp"), row.get("source")) for row in ROWS]


def lines_of(rows: list[Row]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": lambda data: data,
    ".json": lambda data: data,
    ".json.gz": gzip.compress,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": zstandard.ZstdCompressor().compress,
    ".json.zst": zstd,
}
COMPRESSED = [ending for ending in COMPRESS if ending.endswith(("gz", "zst"))]


def put(directory: Path, ending: str, data: bytes) -> InputFile:
    return put_raw(directory, ending, COMPRESS[ending](data))


def put_raw(directory: Path, ending: str, data: bytes) -> InputFile:
    path = directory / f"documents{ending}"
    path.write_bytes(data)
    return InputFile(str(path), len(data))


def put_parquet(directory: Path, columns: Row, **options: Any) -> InputFile:
    path = directory / "documents.parquet"
    pq.write_table(pa.table(columns), path, **options)
    return InputFile(str(path), path.stat().st_size)


def documents_of(block: Block) -> list[Document]:
    return list(zip(block.texts, *block.metadata, strict=True))


def documents(file: InputFile, options: ReadOptions = SKIP) -> list[Document]:
    """All documents of a file in which nothing may be wrong."""
    reader = PartReader(file, options)
    blocks = list(reader)
    assert reader.damage is None
    assert [block.dropped for block in blocks] == [Counter()] * len(blocks)
    return [document for block in blocks for document in documents_of(block)]


def dropped(file: InputFile, options: ReadOptions = SKIP) -> Counter[str]:
    return sum((Counter[str](block.dropped) for block in PartReader(file, options)), Counter())


def damage_of(file: InputFile) -> tuple[list[str], str]:
    """Texts kept of a damaged file, and what is said of the damage, under both policies."""
    reader = PartReader(file, SKIP)
    texts = [text for block in reader for text in block.texts]
    assert reader.damage is not None
    assert reader.digest is None
    assert reader.damage.startswith(f"damaged after {len(texts):,} documents, {reader.lines:,} lines: ")
    kept = []
    with pytest.raises(InputError) as caught:  # noqa: PT012 - the loop is what raises
        for text in read_texts(file, FAIL):
            kept.append(text)
    assert kept == texts
    assert str(caught.value) == f"{file.name}: {reader.damage}. Fetch it again, leave it out, or set corpus.on_bad_input to skip"
    return texts, reader.damage


# --- an independent reader -----------------------------------------------------------------------------------------


def reference_row(line: bytes, limit: int) -> Document | str:
    """One line's document, or the reason against it, by the standard library."""
    if len(line) > limit:
        return "too long"
    try:
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode())
    except UnicodeDecodeError:
        return "invalid UTF-8"
    except (ValueError, RecursionError):
        return "malformed JSON"
    if not isinstance(row, dict):
        return "not an object"
    if "text" not in row:
        return "no text field"
    if not isinstance(row["text"], str):
        return "text is not a string"
    if any("\ud800" <= character <= "\udfff" for character in row["text"]):
        return "invalid unicode"
    if not row["text"].strip():
        return "empty text"
    known = [row.get(name) for name in ("url", "timestamp", "source")]
    spelt = [value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in known]
    return (row["text"], *(value and re.sub("[\ud800-\udfff]", "?", value) for value in spelt))


def reference(data: bytes, limit: int = SKIP.max_document_bytes) -> list[Document | str]:
    lines = data.split(b"\n")
    return [reference_row(line, limit) for line in lines if len(line) > limit or line.removeprefix(b"\xef\xbb\xbf").strip()]


def check_against_reference(file: InputFile, data: bytes, options: ReadOptions = SKIP, parts: int = 1) -> None:
    """What all parts give must be what the reference gives: documents in order, reasons counted, rejects named by their lines."""
    expected = reference(data, options.max_document_bytes)
    lines = data.split(b"\n")
    found: list[Document] = []
    reasons: Counter[str] = Counter()
    first_line = 0
    digest = []
    for part in range(parts):
        reader = PartReader(file, options, part, parts)
        rejects: list[Reject] = []
        for block in reader:
            found += documents_of(block)
            reasons.update(block.dropped)
            rejects += block.rejects
        for reject in rejects:
            line = lines[first_line + reject.line - 1]
            assert reference_row(line, options.max_document_bytes) == reject.reason
            excerpt = line.decode(errors="replace")[:EXCERPT_CHARACTERS]
            if reject.reason == "too long" and options.max_document_bytes < len(excerpt):
                excerpt = excerpt[: len(reject.excerpt)]  # no more than that may have been held
            assert reject.excerpt == excerpt
        assert [reject.line for reject in rejects] == sorted({reject.line for reject in rejects})
        kept = Counter(reject.reason for reject in rejects)
        assert all(count <= readers.REJECTS_KEPT for count in kept.values())
        first_line += reader.lines
        digest.append(reader.digest)
    assert found == [row for row in expected if not isinstance(row, str)]
    assert reasons == Counter(row for row in expected if isinstance(row, str))
    assert first_line == len(lines) - (not lines[-1])
    if parts == 1:
        assert digest == [blake3(Path(file.name).read_bytes()).hexdigest()]


# --- what comes out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", COMPRESS)
def test_json_lines_in_every_wrapping(tmp_path: Path, ending: str) -> None:
    file = put(tmp_path, ending, lines_of(ROWS))
    for options in (SKIP, FAIL):
        assert documents(file, options) == DOCUMENTS
    assert list(read_texts(file, SKIP)) == [row["text"] for row in ROWS]


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
def test_parquet(tmp_path: Path, compression: str) -> None:
    columns: Row = {name: [row.get(name) for row in ROWS] for name in ("source", "text", "url", "timestamp")}
    columns["other"] = [1.5] * len(ROWS)
    file = put_parquet(tmp_path, columns, compression=compression, row_group_size=3)
    for options in (SKIP, FAIL):
        assert documents(file, options) == DOCUMENTS
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        file = put_parquet(tmp_path, {"a.body": pa.array(columns["text"], kind)})
        assert documents(file, ReadOptions(text_field="a.body")) == [(row["text"], None, None, None) for row in ROWS]


def test_parquet_of_more_rows_than_a_batch(tmp_path: Path) -> None:
    for count, dictionary in ((2_500, True), (5_000, False)):
        texts = [f"document {number}" for number in range(count)]
        file = put_parquet(tmp_path, {"text": texts}, use_dictionary=dictionary)
        blocks = list(PartReader(file, SKIP))
        assert [block.texts for block in blocks] == [texts]


def test_blocks_of_parquet_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1_000)
    source = random.Random(3)
    texts = ["x" * source.choice([1, 10, 400, 999, 1_000, 1_001, 3_000]) for _ in range(300)]  # mostly in the dictionary
    blocks = [block.texts for block in PartReader(put_parquet(tmp_path, {"text": texts}), SKIP)]
    assert [text for block in blocks for text in block] == texts
    assert all(len(block) == 1 or sum(map(len, block)) <= 1_000 for block in blocks)
    assert all(sum(map(len, first)) + len(second[0]) > 1_000 for first, second in pairwise(blocks))


@pytest.mark.parametrize("ending", COMPRESS)
def test_last_line_without_an_end_blank_lines_and_windows_line_ends(tmp_path: Path, ending: str) -> None:
    data = lines_of(ROWS)
    mark = b"\xef\xbb\xbf"  # the byte order mark that Windows tools put
    for variant in (
        data[:-1],
        b"\n\n" + data.replace(b'"}\n', b'"}\n\n  \t \n') + b"\n",
        b"\r\n".join(data.split(b"\n")),
        b"\r\n\r\n" + b"\r\n".join(data.split(b"\n"))[:-2],
        mark + data,
        mark + data[:-1],
    ):
        assert documents(put(tmp_path, ending, variant)) == DOCUMENTS
    assert documents(put(tmp_path, ending, mark + data + mark + data)) == DOCUMENTS * 2  # two such files joined


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_file_without_documents(tmp_path: Path, ending: str) -> None:
    for data in (b"", b"\n \n", b"\xef\xbb\xbf"):
        file = put(tmp_path, ending, data)
        assert documents(file, FAIL) == []
        check_against_reference(file, data)


@pytest.mark.parametrize("ending", COMPRESS)
def test_documents_longer_than_any_buffer(tmp_path: Path, ending: str) -> None:
    source = random.Random(1)  # hexadecimal noise compresses to a half, so that blocks end inside documents
    sizes = (10, 800_000, 3, 2_700_000, 1, 500_000, 1_500_000, 4_000_000)
    texts = [source.randbytes(size).hex() for size in sizes]
    blocks = [block.texts for block in PartReader(put(tmp_path, ending, lines_of([{"text": text} for text in texts])), SKIP)]
    assert [text for block in blocks for text in block] == texts
    assert all(len(block) == 1 or sum(map(len, block)) <= readers.BLOCK_BYTES for block in blocks)


def test_metadata_of_other_types_becomes_text(tmp_path: Path) -> None:
    lines = (
        b'{"text": "a", "url": 7, "timestamp": {"y": 1.50, "\xc3\xa9": null}, "source": ["b"]}\n'
        b'{"text": "b", "url": true, "timestamp": 1e400, "source": 123456789012345678901234567890}\n'
        b'{"text": "c", "url": "x\\ud800y", "timestamp": -0.0, "source": "\\udfff"}\n'
        b'{"text": "d", "url": NaN, "timestamp": 1E2, "source": {"a": "\\ud800"}}\n'
    )
    assert documents(put(tmp_path, ".jsonl", lines)) == [
        ("a", "7", '{"y": 1.5, "é": null}', '["b"]'),
        ("b", "true", "Infinity", "123456789012345678901234567890"),
        ("c", "x?y", "-0.0", "?"),
        ("d", "NaN", "100.0", '{"a": "?"}'),
    ]


def test_metadata_of_parquet_becomes_text(tmp_path: Path) -> None:
    latin = pa.array([b"good", b"\xe9", None], pa.binary())
    columns: Row = {
        "text": ["a", "b", "c"],
        "int": [1, None, 3],
        "float": [0.5, None, math.inf],
        "list": [[1, 2], [], None],
        "struct": [{"a": "é"}, None, {"a": None}],
        "bytes": latin,
        "invalid": latin.view(pa.string()),
        "time": pa.array([1, None, 1_500_000_000_000_000_001], pa.timestamp("ns", "UTC")),
        "category": pa.array(["x", None, "x"]).dictionary_encode(),
    }
    options = ReadOptions(metadata_fields=(*list(columns)[:0:-1], "none", "int", "text"))
    found = documents(put_parquet(tmp_path, columns), options)
    by_name = dict(zip(["text", *options.metadata_fields], map(list, zip(*found, strict=True)), strict=False))
    assert by_name == {
        "text": ["a", "b", "c"],
        "int": ["1", None, "3"],
        "float": ["0.5", None, "Infinity"],
        "list": ["[1, 2]", "[]", None],
        "struct": ['{"a": "é"}', None, '{"a": null}'],
        "bytes": ["good", "\ufffd", None],
        "invalid": ["good", "\ufffd", None],
        "time": ["1970-01-01 00:00:00.000000001Z", None, "2017-07-14 02:40:00.000000001Z"],
        "category": ["x", None, "x"],
        "none": [None] * 3,
    }


def test_other_fields_may_be_asked_for(tmp_path: Path) -> None:
    rows = [{"a": "text", "b.c": "one", "é \0": 2}]
    for fields in (("b.c", "é"), (), ("b.c", "b.c", "a", "é")):
        options = ReadOptions(text_field="a", metadata_fields=fields)
        values: Row = {"a": "text", "b.c": "one", "é": None}
        expected: list[Document] = [("text", *(values[name] for name in fields))]
        assert documents(put(tmp_path, ".jsonl", lines_of(rows)), options) == expected
    with pytest.raises(InputError, match=r"text_field and metadata_fields .*must not contain"):
        list(PartReader(put(tmp_path, ".jsonl", b""), ReadOptions(text_field='a"')))


def test_remote_files(tmp_path: Path) -> None:
    data = lines_of(ROWS)
    table = io.BytesIO()
    pq.write_table(pa.table({"text": [row["text"] for row in ROWS]}), table)
    system = fsspec.filesystem("memory")
    for ending, raw in [*((ending, compress(data)) for ending, compress in COMPRESS.items()), (".parquet", table.getvalue())]:
        system.pipe(f"/test_readers/a{ending}", raw)
        file = InputFile(f"memory://test_readers/a{ending}", len(raw))
        assert [document[0] for document in documents(file)] == [document[0] for document in DOCUMENTS]
        if ending == ".jsonl":
            texts = [text for part in range(7) for block in PartReader(file, SKIP, part, 7) for text in block.texts]
            assert texts == [row["text"] for row in ROWS]
    system.rm("/test_readers", recursive=True)


# --- rows that are dropped -----------------------------------------------------------------------------------------

CASES: list[tuple[bytes, str | None]] = [
    (b'{"text": "good"}', None),
    (b' {"text": "good"}\t', None),
    (b'{"text": "good", "n": {"text": 5}}', None),
    (b'{"text": "bad", "text": "good"}', None),
    (b'{"t\\u0065xt": "good"}', None),
    (b'{"text": "good"', "malformed JSON"),
    (b'"x": 1}', "malformed JSON"),
    (b'{"text": "good",', "malformed JSON"),
    (b'"text": "good"}', "malformed JSON"),
    (b'{"text": "good", "url": {"a": 1}', "malformed JSON"),
    (b"good", "malformed JSON"),
    (b"\0", "malformed JSON"),
    (b'{"text": "go\0od"}', "malformed JSON"),
    (b'{"text": "go\tod"}', "malformed JSON"),
    (b'{"text": "good"}\0', "malformed JSON"),
    (b'{"text": "good"} {"text": "good"}', "malformed JSON"),
    (b'{"text": "good"}\r{"text": "good"}', "malformed JSON"),
    (b'{"text": "good"}{"text": "good"}', "malformed JSON"),
    (b'{"text": "good",}', "malformed JSON"),
    (b"{'text': 'good'}", "malformed JSON"),
    (b"[" * 200_000, "malformed JSON"),
    (b'{"text": "good", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "malformed JSON"),
    (b'{"text": ' + b"9" * 5_000 + b"}", "malformed JSON"),
    (b'["text"]', "not an object"),
    (b'"text"', "not an object"),
    (b"null", "not an object"),
    (b"1e5", "not an object"),
    (b"NaN", "not an object"),
    (b"{}", "no text field"),
    (b'{"Text": "good", "body": "good"}', "no text field"),
    (b'{"text": null}', "text is not a string"),
    (b'{"text": ["good"]}', "text is not a string"),
    (b'{"text": {"text": "good"}}', "text is not a string"),
    (b'{"text": 3}', "text is not a string"),
    (b'{"text": 1e400}', "text is not a string"),
    (b'{"text": NaN}', "text is not a string"),
    (b'{"text": ""}', "empty text"),
    (b'{"text": " \\n\\t\\u00a0\\u3000"}', "empty text"),
    (b'{"text": "a \\ud83d b"}', "invalid unicode"),
    (b'{"text": "\\udc00\\ud800"}', "invalid unicode"),
    (b'{"text": "a \xed\xa0\x80 b"}', "invalid UTF-8"),
    (b'{"text": "go\xff\xfeod"}', "invalid UTF-8"),
    (b"\xff\xfe{\0", "invalid UTF-8"),
    (b'{"text": "\\ud83d\\ude00"}', None),
    (b'{"text": "good", "score": NaN}', None),
    (b'{"text": "good", "score": -Infinity, "x": "\\ud800"}', None),
    (b'{"text": "g\\u0000"}', None),
]
LINES = [line for line, _ in CASES]


def test_the_reference_gives_each_case_its_reason() -> None:
    for line, reason in CASES:
        row = reference_row(line, SKIP.max_document_bytes)
        assert (row if isinstance(row, str) else None) == reason, line


@pytest.mark.parametrize("ending", COMPRESS)
def test_each_bad_row_has_its_reason_and_its_place(tmp_path: Path, ending: str) -> None:
    data = b"".join(line + b"\n" for line in LINES)
    check_against_reference(put(tmp_path, ending, data), data)


@pytest.mark.parametrize(("line", "reason"), [(line, reason) for line, reason in CASES if reason])
def test_each_bad_row_alone_under_both_policies(tmp_path: Path, line: bytes, reason: str) -> None:
    good = b'{"text": "good"}\n'
    data = good + b"\n" + line + b"\n" + good
    for ending in (".jsonl", ".json.gz", ".jsonl.zst"):
        file = put(tmp_path, ending, data)
        (block,) = PartReader(file, SKIP)
        assert block.texts == ["good", "good"]
        assert block.rejects == [Reject(3, reason, line.decode(errors="replace")[:200])]  # type: ignore[arg-type]
        if reason == "empty text":
            (block,) = PartReader(file, FAIL)
            assert (block.texts, block.dropped) == (["good", "good"], Counter({"empty text": 1}))
        else:
            with pytest.raises(InputError, match=re.escape(f"{file.name}: line 3: {reason}: ")):
                list(PartReader(file, FAIL))


@settings(max_examples=150, deadline=None)
@given(
    chosen=st.lists(st.sampled_from([line for line in LINES if len(line) < 1_000]), max_size=40),
    block_bytes=st.sampled_from([1, 16, 17, 64, 300, 1 << 20]),
    data=st.data(),
)
def test_rows_in_are_documents_and_drops_out(
    tmp_path_factory: pytest.TempPathFactory, chosen: list[bytes], block_bytes: int, data: st.DataObject
) -> None:
    """Of any lines, in blocks of any size, in any wrapping."""
    ends = [data.draw(st.sampled_from([b"\n", b"\r\n", b"\n\n", b" \n", b"\n \r\n"])) for _ in chosen]
    whole = b"".join(line + end for line, end in zip(chosen, ends, strict=True))
    whole = whole if data.draw(st.booleans()) else whole.rstrip()
    file = put(tmp_path_factory.mktemp("rows"), data.draw(st.sampled_from(sorted(COMPRESS))), whole)
    limit = data.draw(st.sampled_from([SKIP.max_document_bytes, 15, 16, 17, 18, 70]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "BLOCK_BYTES", block_bytes)
        check_against_reference(file, whole, replace(SKIP, max_document_bytes=limit))


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(
        st.sampled_from(
            [b"{", b"}", b"\n", b"\r", b'"text"', b":", b'"x"', b",", b'{"text":"a"}', b'{"text":', b" ", b"[", b"]", b"1", b"\\", b'"']
        ),
        max_size=30,
    )
)
def test_what_a_line_is_does_not_depend_on_its_neighbours(tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]) -> None:
    """Objects over several lines and several in one must not make up for each other."""
    data = b"".join(pieces)
    check_against_reference(put(tmp_path_factory.getbasetemp(), ".jsonl", data), data)


@pytest.mark.parametrize(
    "halves", [(b'{"text":"c"', b',"url":"d"}'), (b'{"url":', b'{"a":1},"text":"c"}'), (b'{"url":{"a":1}', b',"text":"c"}')]
)
def test_two_objects_in_a_line_and_one_in_two(tmp_path: Path, halves: tuple[bytes, bytes]) -> None:
    data = b'{"text":"a"} {"text":"b"}\n' + b"\n".join(halves) + b'\n{"text":"e"}\n'
    file = put(tmp_path, ".jsonl", data)
    check_against_reference(file, data)
    assert dropped(file) == {"malformed JSON": 3}


def test_few_rejects_are_kept_and_all_are_counted(tmp_path: Path) -> None:
    lines = [b'{"text": 1, "n": "' + b"\xc3\xa9" * 500 + b'"}\n', b"nonsense\n"] * 50 + [b'{"text": ""}\n']
    blocks = list(PartReader(put(tmp_path, ".jsonl", b"".join(lines)), SKIP))
    assert sum((block.dropped for block in blocks), Counter()) == {"text is not a string": 50, "malformed JSON": 50, "empty text": 1}
    rejects = [reject for block in blocks for reject in block.rejects]
    assert [reject.line for reject in rejects] == [*range(1, 21), 101]
    assert len(rejects[0].excerpt) == 200


def test_empty_texts_are_kept_where_that_is_wanted(tmp_path: Path) -> None:
    texts = ["a", "", " \n", "b"]
    for file in (put(tmp_path, ".jsonl", lines_of([{"text": text} for text in texts])), put_parquet(tmp_path, {"text": texts})):
        assert list(read_texts(file, ReadOptions(keep_empty=True))) == texts
        for options in (SKIP, FAIL):
            assert list(read_texts(file, options)) == ["a", "b"]
            assert dropped(file, options) == {"empty text": 2}


@pytest.mark.parametrize("ending", COMPRESS)
def test_too_long_lines_are_dropped_and_reading_goes_on(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1_000)
    limit = 2_000
    for sizes in ([limit, limit + 1, 50, limit * 3, 30, 999, 1_000, 1_001], [limit * 5], [limit * 5, 30], [30, limit + 1], [40, limit]):
        lines = [b'{"text": "' + b"x" * (size - 12) + b'"}' for size in sizes]
        for data in (b"\n".join(lines), b"\n".join(lines) + b"\n", b"\n\n".join(lines) + b"\n\n"):
            file = put(tmp_path, ending, data)
            check_against_reference(file, data, replace(SKIP, max_document_bytes=limit))
            if max(sizes) > limit:
                with pytest.raises(InputError, match="too long"):
                    list(PartReader(file, replace(FAIL, max_document_bytes=limit)))


def test_bad_parquet_rows(tmp_path: Path) -> None:
    (block,) = PartReader(put_parquet(tmp_path, {"text": ["good", None, "", " \n", "good", "é" * 9]}), replace(SKIP, max_document_bytes=17))
    assert block.texts == ["good", "good"]
    assert block.rejects == [
        Reject(2, "text is not a string", "null"),
        Reject(3, "empty text", ""),
        Reject(4, "empty text", " \n"),
        Reject(6, "too long", "é" * 9),
    ]
    for column, kind in (([1, 2], "int64"), ([b"good", None], "binary"), ([{"text": "a"}, None], "struct<text: string>")):
        file = put_parquet(tmp_path, {"text": column})
        (block,) = PartReader(file, SKIP)
        assert (block.texts, block.dropped) == ([], {"text is not a string": 2})
        assert block.rejects[0] == Reject(1, "text is not a string", f"a column of type {kind}")
        with pytest.raises(InputError, match=re.escape(f"{file.name}: row 1: text is not a string")):
            list(PartReader(file, FAIL))


def test_parquet_text_that_is_no_unicode(tmp_path: Path) -> None:
    texts = pa.array([b"good", b"\xff\xfe", b"good", b"\xed\xa0\x80", None, b"\xc3\xa9"] * 500, pa.binary()).view(pa.string())
    for column in (texts, texts.dictionary_encode()):
        file = put_parquet(tmp_path, {"text": column, "url": ["u"] * 3_000})
        blocks = list(PartReader(file, SKIP))
        assert [document[:2] for block in blocks for document in documents_of(block)] == [("good", "u"), ("good", "u"), ("é", "u")] * 500
        assert dropped(file) == {"invalid UTF-8": 1_000, "text is not a string": 500}
        assert blocks[0].rejects[0] == Reject(2, "invalid UTF-8", "\ufffd\ufffd")


# --- parts ---------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    lines=st.lists(
        st.sampled_from([b"", b"\r", b'{"text": "a"}', b'{"text": "bcd"}\r', b'{"text": "' + b"e" * 60 + b'"}', b"bad", b"\xef\xbb\xbf"]),
        max_size=12,
    ),
    parts=st.integers(1, 40),
    block_bytes=st.sampled_from([1, 20, 1 << 20]),
    ends=st.booleans(),
)
def test_parts_are_the_file(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], parts: int, block_bytes: int, ends: bool) -> None:
    data = b"\n".join(lines) + b"\n" * ends
    file = put(tmp_path_factory.getbasetemp(), ".jsonl", data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "BLOCK_BYTES", block_bytes)
        check_against_reference(file, data, parts=parts)
        readers_of_parts = [PartReader(file, SKIP, part, parts) for part in range(parts)]
        for reader in readers_of_parts:
            list(reader)
    starts = [0, *(at + 1 for at, byte in enumerate(data) if byte == 10 and at + 1 < len(data))] if data else []
    bounds = [len(data) * part // parts for part in range(parts + 1)]
    for reader, first, stop in zip(readers_of_parts, bounds[:-1], bounds[1:], strict=True):
        own = [start for start in starts if first <= start < stop]
        after = min((start for start in starts if start >= stop), default=len(data))
        assert reader.lines == len(own)
        assert reader.digest == blake3(data[own[0] : after] if own else b"").hexdigest()


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 30), group=st.integers(1, 10), parts=st.integers(1, 12))
def test_parts_of_parquet(tmp_path_factory: pytest.TempPathFactory, rows: int, group: int, parts: int) -> None:
    texts = [f"document {number}" for number in range(rows)]
    file = put_parquet(tmp_path_factory.getbasetemp(), {"text": pa.array(texts, pa.string())}, row_group_size=group)
    groups = -(-rows // group)
    for part in range(parts):
        reader = PartReader(file, SKIP, part, parts)
        own = texts[groups * part // parts * group : groups * (part + 1) // parts * group]
        assert [text for block in reader for text in block.texts] == own
        assert (reader.lines, reader.digest) == (len(own), None)


def test_how_many_parts() -> None:
    counts = {0: 1, 1: 1, 100: 1, 101: 2, 1_000: 10}
    for size, count in counts.items():
        assert [parts_of(InputFile(f"a{ending}", size), 100) for ending in (".json", ".jsonl", ".parquet")] == [count] * 3
        assert [parts_of(InputFile(f"a{ending}", size), 100) for ending in COMPRESSED] == [1] * 4


def test_errors_name_the_line_in_the_file_and_not_in_the_part(tmp_path: Path) -> None:
    for bad in range(30):
        lines = [b'{"text": "good"}', b""] * 15
        lines[bad] = b"oops"
        file = put(tmp_path, ".jsonl", b"\n".join(lines))
        messages = []
        for part in range(6):
            try:
                list(PartReader(file, FAIL, part, 6))
            except InputError as error:
                messages.append(str(error))
        assert messages == [
            f"{file.name}: line {bad + 1}: malformed JSON: 'oops'. Mend or remove the line, or set corpus.on_bad_input to skip"
        ]
    file = put_parquet(tmp_path, {"text": ["a"] * 7 + [None] + ["b"] * 4}, row_group_size=2)
    with pytest.raises(InputError, match="row 8: text is not a string: 'null'"):
        list(PartReader(file, FAIL, 1, 2))


# --- damaged files -------------------------------------------------------------------------------------------------


def test_every_cut_of_a_parquet_file_is_damage(tmp_path: Path) -> None:
    file = put_parquet(tmp_path, {"text": [f"document {number}" for number in range(50)]})
    whole = Path(file.name).read_bytes()
    for length in range(len(whole)):
        texts, damage = damage_of(put_raw(tmp_path, ".parquet", whole[:length]))
        assert texts == []
        assert "not a Parquet file" in damage


def test_damage_inside_a_parquet_file_shows_as_damage_only(tmp_path: Path) -> None:
    """Parquet has no checksums by default, so not all damage shows; what shows is damage and nothing else."""
    texts = [f"document {number} " * 9 for number in range(4_000)]
    file = put_parquet(tmp_path, {"text": texts}, compression="zstd", use_dictionary=False, row_group_size=1_000)
    whole = Path(file.name).read_bytes()
    kept = []
    for at in range(4, len(whole), len(whole) // 150):
        file = put_raw(tmp_path, ".parquet", whole[:at] + bytes(byte ^ 0x5A for byte in whole[at : at + 8]) + whole[at + 8 :])
        reader = PartReader(file, SKIP)
        found = [text for block in reader for text in block.texts]
        if reader.damage:
            assert damage_of(file)[0] == found
            kept.append(len(found))
    assert len(kept) > 20
    assert len(set(kept)) > 3  # rows before the damage are kept


def test_parquet_that_gives_fewer_rows_than_it_says_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(pq.ParquetFile):  # type: ignore[misc]
        def iter_batches(self, *arguments: Any, **options: Any) -> Any:
            return list(super().iter_batches(*arguments, **options))[:-1]

    monkeypatch.setattr(pq, "ParquetFile", Short)
    file = put_parquet(tmp_path, {"text": [f"document {number}" for number in range(200)]})
    texts, damage = damage_of(file)
    assert len(texts) == DICTIONARY_ROWS
    assert damage.endswith("row group 0 gave 128 rows; expected 200")


def test_a_parquet_file_without_the_column_says_what_it_has(tmp_path: Path) -> None:
    file = put_parquet(tmp_path, {"content": ["a"], "url": ["b"]})
    found = "damaged after 0 documents, 0 lines: no column 'text'; found content, url. See corpus.text_field"
    with pytest.raises(InputError, match=re.escape(f"{file.name}: {found}")):
        list(PartReader(file, FAIL))
    assert damage_of(file) == ([], found)  # one such file among many must not end the run
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, file.name)
    _, damage = damage_of(InputFile(file.name, Path(file.name).stat().st_size))
    assert "2 column 'text'" in damage


@pytest.mark.parametrize("ending", [*COMPRESS, ".parquet"])
def test_a_file_that_went_away_is_an_error(tmp_path: Path, ending: str) -> None:
    file = InputFile(str(tmp_path / f"gone{ending}"), 100)
    with pytest.raises(InputError, match=re.escape(f"{file.name}: cannot be opened")):
        list(PartReader(file, SKIP))


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("difference", [-1, 1])
def test_a_file_that_changed_is_an_error(tmp_path: Path, ending: str, difference: int) -> None:
    file = put(tmp_path, ending, lines_of(ROWS))
    with pytest.raises(InputError, match=r"it changed meanwhile"):
        list(PartReader(InputFile(file.name, file.bytes + difference), SKIP))


@pytest.mark.parametrize("ending", [*COMPRESS, ".parquet"])
def test_a_failing_disk_is_an_error_and_no_damage(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = random.Random(4)
    texts = [source.randbytes(1_000).hex() for _ in range(3_000)]
    file = put_parquet(tmp_path, {"text": texts}) if ending == ".parquet" else put(tmp_path, ending, lines_of([{"text": t} for t in texts]))

    class Failing(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if 1_000_000 < self.tell() < file.bytes - 100_000:
                raise OSError(5, "Input/output error")
            return super().read(-1 if size is None else size)

        def readinto(self, view: Any, /) -> int:
            if 1_000_000 < self.tell() < file.bytes - 100_000:
                raise OSError(5, "Input/output error")
            return super().readinto(view)

    monkeypatch.setattr(inputs, "open_raw", lambda file: Failing(file.name))
    with pytest.raises(InputError, match=re.escape(f"{file.name}: cannot be read: EIO")):
        list(PartReader(file, SKIP))


def test_reading_may_stop_early_and_start_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 100)
    for ending in COMPRESS:
        reader = PartReader(put(tmp_path, ending, lines_of(ROWS) + b"bad\n"), SKIP)
        next(iter(reader))
        assert reader.digest is None
        for _ in range(2):
            assert [text for block in reader for text in block.texts] == [row["text"] for row in ROWS]
            assert (reader.lines, reader.damage) == (len(ROWS) + 1, None)


# --- memory --------------------------------------------------------------------------------------------------------

MEASURE = """
import json, resource, sys, time
from mates.preprocess.readers import InputFile, PartReader, ReadOptions
import pyarrow.parquet
import os
name, options = sys.argv[1], json.loads(sys.argv[2])
reader = PartReader(InputFile(name, os.path.getsize(name)), ReadOptions(**options))
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
documents, dropped = 0, {}
for block in reader:
    documents += len(block.texts)
    for reason, count in block.dropped.items():
        dropped[reason] = dropped.get(reason, 0) + count
after, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time() - start
print(json.dumps([documents, dropped, reader.damage, (after - before) / 1024, seconds]))
"""


def measure(path: Path, **options: object) -> tuple[int, dict[str, int], str | None, float, float]:
    """Documents, drops, damage, MiB of memory and CPU seconds of reading a file in a process of its own."""
    command = [sys.executable, "-P", "-c", MEASURE, str(path), json.dumps(options)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)
    return found[0], found[1], found[2], found[3], found[4]


def write_stream(path: Path, chunks: list[tuple[bytes, int]]) -> None:
    """Write repeated chunks compressed, without holding them."""
    opener: Any = partial(gzip.open, compresslevel=1) if path.name.endswith("gz") else zstandard.open
    with opener(path, "wb") as handle:
        for chunk, times in chunks:
            for _ in range(times):
                handle.write(chunk)


MIB = b"a" * (1 << 20)


@pytest.mark.parametrize("ending", [".json.gz", ".jsonl.zst"])
def test_a_line_of_100_megabytes_is_passed_over_in_bounded_memory(tmp_path: Path, ending: str) -> None:
    good = b'{"text": "good"}\n'
    path = tmp_path / f"a{ending}"
    write_stream(path, [(good, 1), (b'{"text": "', 1), (MIB, 100), (b'"}\n', 1), (good, 2)])
    documents, dropped, damage, memory, _ = measure(path, max_expansion=100_000)
    assert (documents, dropped, damage) == (3, {"too long": 1}, None)
    assert memory < 80, f"{memory} MiB"  # 32 of the line, 4 more at a time, and a copy when that grows
    *_, memory, _ = measure(path, max_expansion=100_000, max_document_bytes=1 << 20)
    assert memory < 30, f"{memory} MiB"


def test_repeated_texts_in_parquet_take_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = pa.DictionaryArray.from_arrays([0] * 1_000, ["x" * 900_000])
    pq.write_table(pa.table({"text": texts}), path)
    assert path.stat().st_size < 3_000_000
    documents, dropped, damage, memory, _ = measure(path)
    assert (documents, dropped, damage) == (1_000, {}, None)
    assert memory < 400, f"{memory} MiB"


def test_metadata_that_cannot_be_held_costs_no_text(tmp_path: Path) -> None:
    """Dates beyond Python's, nanoseconds inside structs, bytes that are no UTF-8 inside lists."""
    path = tmp_path / "odd.parquet"
    count = 5
    nanoseconds = pa.array([1] * count, pa.int64()).cast(pa.timestamp("ns"))
    columns = {
        "text": [f"text {row}" for row in range(count)],
        "url": pa.StructArray.from_arrays([nanoseconds], names=["at"]),
        "timestamp": pa.array([[2**60]] * count, pa.list_(pa.int64())).cast(pa.list_(pa.timestamp("us"))),
        "source": pa.array([b"\xff", b"good", None, b"", b"\xfe"], pa.binary_view()),
    }
    pq.write_table(pa.table(columns), path)
    reader = PartReader(InputFile(str(path), path.stat().st_size), ReadOptions())
    blocks = list(reader)
    assert reader.damage is None
    assert [text for block in blocks for text in block.texts] == columns["text"]
    assert [value for block in blocks for value in block.metadata[2]] == ["\ufffd", "good", None, "", "\ufffd"]

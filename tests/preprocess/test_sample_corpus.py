"""The sample corpus: its schema, its determinism, and the separation of reference task and corpus."""

from __future__ import annotations

import collections
import gzip
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mates.preprocess import sample_corpus
from mates.preprocess.artifact import ArtifactError, ArtifactMismatchError, Manifest, verify
from mates.preprocess.sample_corpus import NgramIndex, write_sample_corpus
from mates.preprocess.sample_corpus_text import (
    CLASSES,
    STOP_WORDS,
    Piece,
    Source,
    cut,
    extract,
    is_prose,
    keyed_hash,
    pack,
    passages,
    sentences,
    split_prose,
)

MAX_TEXT_BYTES = 3_000_000
Line = dict[str, str]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    directory = tmp_path_factory.mktemp("sample")
    return directory, write_sample_corpus(directory, max_text_bytes=MAX_TEXT_BYTES)


@pytest.fixture(scope="module")
def documents(corpus: tuple[Path, Manifest]) -> list[Line]:
    names = sorted(name for name in corpus[1].files if name.startswith("shard-"))
    assert names == [f"shard-{number:05d}-of-00004.json.gz" for number in range(4)]
    return [json.loads(line) for name in names for line in gzip.decompress((corpus[0] / name).read_bytes()).splitlines()]


@pytest.fixture(scope="module")
def items(corpus: tuple[Path, Manifest]) -> dict[str, list[Line]]:
    return {
        split: [json.loads(line) for line in (corpus[0] / f"reference-{split}.jsonl").read_bytes().splitlines()]
        for split in ("train", "test")
    }


def source(url: str) -> str:
    return url.partition("#")[0]


def grams(texts: Iterable[str]) -> set[tuple[str, ...]]:
    """13-grams by the definition, with no code in common with the program."""
    found: set[tuple[str, ...]] = set()
    for text in texts:
        words = "".join(character if character.isalnum() else " " for character in text.lower()).split()
        found.update(tuple(words[start : start + 13]) for start in range(len(words) - 12))
    return found


# --- the artifact --------------------------------------------------------------------------------------------------


def test_lines_have_the_c4_schema(documents: list[Line]) -> None:
    assert len(documents) > 500
    for line in documents:
        assert list(line) == ["text", "timestamp", "url"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", line["timestamp"])
        assert 200 <= len(line["text"]) <= 20_000
        assert re.match(r"python://\d+\.\d+/lib/\w|pypi://[\w.-]+/[\w.+!-]+/\w", line["url"]), line["url"]


def test_urls_are_unique_and_hold_no_path_of_this_machine(
    documents: list[Line], items: dict[str, list[Line]], corpus: tuple[Path, Manifest]
) -> None:
    assert len({line["url"] for line in documents}) == len(documents)
    for url in [line["url"] for line in [*documents, *items["train"], *items["test"]]]:
        assert sys.prefix not in url
        assert sys.base_prefix not in url
        assert "site-packages" not in url
        assert not url.startswith("pypi://mates/")
    assert sys.prefix not in (corpus[0] / "manifest.json").read_text("utf-8")


def test_no_document_occurs_twice(documents: list[Line]) -> None:
    counts = collections.Counter(" ".join(line["text"].split()) for line in documents)
    assert max(counts.values()) == 1


def test_info_counts_what_is_in_the_files(documents: list[Line], items: dict[str, list[Line]], corpus: tuple[Path, Manifest]) -> None:
    info = corpus[1].info
    sizes = [len(line["text"].encode()) for line in documents]
    assert (info["documents"], info["text_bytes"]) == (len(documents), sum(sizes))
    assert 0.8 * MAX_TEXT_BYTES < sum(sizes) <= MAX_TEXT_BYTES
    assert info["passages"] == {split: len(items[split]) for split in items}
    assert info["reference_items"] == len(items["train"]) + len(items["test"])
    assert sorted(info["classes"]) == sorted(CLASSES)
    assert all(figures["documents"] > 0 and figures["bytes"] > 0 for figures in info["classes"].values())
    assert sum(figures["bytes"] for figures in info["classes"].values()) == info["text_bytes"]
    assert info["dropped"]["held out for the reference task"] > 0
    assert verify(corpus[0], "sample-corpus").fingerprint == corpus[1].fingerprint


def test_shards_are_in_mixed_order(documents: list[Line]) -> None:
    # Neighbours would be of one file nearly always if the order were that of the files.
    neighbours = sum(source(a["url"]) == source(b["url"]) for a, b in itertools.pairwise(documents))
    assert neighbours < 0.1 * len(documents)


_ELSEWHERE = """
import os, sys
os.cpu_count = lambda: 1
os.umask(0o077)
from pathlib import Path
from mates.preprocess.sample_corpus import write_sample_corpus
print(write_sample_corpus(Path(sys.argv[1]), max_text_bytes=int(sys.argv[2])).fingerprint)
"""


def test_bytes_do_not_depend_on_workers_hash_seed_locale_umask_or_folder(corpus: tuple[Path, Manifest], tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONHASHSEED": "4711", "LC_ALL": "C", "PYTHONUTF8": "0", "TZ": "Asia/Tokyo"}
    done = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, str(tmp_path / "out"), str(MAX_TEXT_BYTES)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == corpus[1].fingerprint
    again = verify(tmp_path / "out", "sample-corpus")
    assert again.files == corpus[1].files
    assert again.info == corpus[1].info


def test_a_complete_corpus_is_left_alone(corpus: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    directory, manifest = corpus
    monkeypatch.setattr(sample_corpus, "_read_documents", lambda *arguments: pytest.fail("work was done again"))
    times = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert write_sample_corpus(directory, max_text_bytes=MAX_TEXT_BYTES).fingerprint == manifest.fingerprint
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == times


def test_other_settings_are_refused(corpus: tuple[Path, Manifest]) -> None:
    with pytest.raises(ArtifactMismatchError, match="seed: 0, now asked 1"):
        write_sample_corpus(corpus[0], seed=1, max_text_bytes=MAX_TEXT_BYTES)


@pytest.mark.parametrize("arguments", [{"shards": 0}, {"max_text_bytes": 0}])
def test_bad_arguments_are_refused(tmp_path: Path, arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        write_sample_corpus(tmp_path, **arguments)  # type: ignore[arg-type]


def test_too_little_text_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "README.md"
    path.write_text("Words of a short document, which are not enough. " * 20, "utf-8")
    monkeypatch.setattr(sample_corpus, "_sources", lambda *_: [Source("pypi://a/1/README.md", "document", str(path))])
    with pytest.raises(ArtifactError, match=r"979 bytes of text found .*, 10,000,000 needed"):
        write_sample_corpus(tmp_path / "out")
    lines: list[str] = []
    with pytest.raises(ArtifactError, match=r"no document is left .* max_text_bytes=500"):
        write_sample_corpus(tmp_path / "out", max_text_bytes=500)
    manifest = write_sample_corpus(tmp_path / "out", shards=1, max_text_bytes=10_000, progress=lines.append)
    assert manifest.info["documents"] == 1
    assert lines[0].startswith("sample-corpus: 1 files of Python")


# --- the reference task --------------------------------------------------------------------------------------------


def test_reference_items_end_with_a_word_to_predict(items: dict[str, list[Line]]) -> None:
    lines = items["train"] + items["test"]
    assert min(len(items["train"]), len(items["test"])) >= 20
    recurring = 0
    for line in lines:
        words = line["text"].split()
        assert 30 <= len(words) <= 70
        assert re.fullmatch(r"[A-Za-z]{3,}", words[-1]), line["text"]
        assert words[-1].lower() not in STOP_WORDS
        assert re.search(r"[.!?]['\")’”]* [\"'(“‘]?[A-Z]", line["text"]), "a single sentence"
        recurring += words[-1].lower() in re.findall(r"[a-z]+", " ".join(words[:-1]).lower())
    assert recurring > 0.6 * len(lines)
    assert len({line["text"] for line in lines}) == len(lines)


def test_reference_lines_name_their_split(items: dict[str, list[Line]]) -> None:
    for split, lines in items.items():
        assert all(list(line) == ["text", "url", "split"] and line["split"] == split for line in lines)


def test_splits_share_no_file_and_no_document_with_the_corpus(documents: list[Line], items: dict[str, list[Line]]) -> None:
    train, test = ({line["url"] for line in items[split]} for split in ("train", "test"))
    assert not {source(url) for url in train} & {source(url) for url in test}
    assert not (train | test) & {line["url"] for line in documents}


def test_no_13_gram_is_shared(documents: list[Line], items: dict[str, list[Line]]) -> None:
    train = grams(line["text"] for line in items["train"])
    test = grams(line["text"] for line in items["test"])
    assert train
    assert test
    assert not train & test
    assert not (train | test) & grams(line["text"] for line in documents)


# --- its parts -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(["a", "B", "é_", "1"]), max_size=40).map(" ".join), max_size=4),
    st.lists(st.lists(st.sampled_from(["a", "b", "É", "1", "c"]), max_size=40).map("\n".join), max_size=4),
)
def test_ngram_index_agrees_with_sets(indexed: list[str], texts: list[str]) -> None:
    known = grams(indexed)
    assert NgramIndex(indexed).hits(texts) == [bool(known & grams([text])) for text in texts]


def test_ngram_index_does_not_join_texts() -> None:
    words = [f"word{number}" for number in range(14)]
    index = NgramIndex([" ".join(words[:13])])
    assert index.hits([" ".join(words[:7]), " ".join(words[7:])]) == [False, False]
    assert index.hits(["x " + "_".join(words).upper()]) == [True]
    assert index.hits([]) == []


def test_prose_is_told_from_tables_and_code() -> None:
    prose = "The garden lay behind the house, and nobody had been in it since the spring of that year."
    assert is_prose(prose)
    assert not is_prose("Args:\n    value: The value that is to be set on the object when it is made by the caller.")
    assert not is_prose("- The garden lay behind the house, and nobody had been in it since the spring.")
    assert not is_prose("for (i = 0; i < n; i++) { total += values[i] * weights[i]; } /* and so on to the end */.")
    summary, table = "Sum of two.", "Parameters\n----------\nx : int\n    The first of the two."
    assert split_prose(f"{summary}\n\n{prose} {prose}\n\n{table}") == (f"{prose} {prose}", f"{summary}\n\n{table}")


def test_sentences_keep_abbreviations_and_lose_markup() -> None:
    text = "Use ``sorted`` here, e.g. The *best*\none. Then\nstop. (See Fig. 3 of Smith et al. Again.) Done"
    assert sentences(text) == [
        "Use sorted here, e.g. The best one.",
        "Then stop.",
        "(See Fig. 3 of Smith et al. Again.)",
        "Done",
    ]


def test_passages_are_whole_sentences_with_a_recurring_last_word() -> None:
    first = "The keeper of the lighthouse had seen many ships go down in the winter storms on this coast."
    second = "She wrote down the name of each of them in a book that nobody but her was allowed to open."
    third = "In the last summer of her life she burned the book."
    found = passages(f"{first}\n{second}\n\n{third}")
    assert [(passage.text, passage.recurs) for passage in found] == [(f"{first} {second} {third}"[:-1], True)]
    assert passages(f"{first}\n\n\n{third}") == [], "blocks are not joined"
    assert passages(f"{first} It was then that she began to do it with them.") == [], "ends in a stop word"
    assert passages(f"{first} {first} {third} x_1 = 5.") == passages(f"{first} {first} {third}\n\nx_1 = 5.")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="ab \n", max_size=300).map(lambda text: text * 40), max_size=6))
def test_packing_loses_no_letter(blocks: list[str]) -> None:
    texts = pack(blocks)
    assert all(len(text) <= 20_000 for text in texts)
    assert "".join("".join(texts).split()) == "".join("".join(blocks).split())
    assert all(len(part) <= 50 for block in blocks for part in cut(block, 50))


def _extract(path: Path, content: bytes, seed: int = 0) -> dict[str, Piece] | str:
    path.write_bytes(content)
    found = extract(Source(f"pypi://a/1/{path.name}", "python", str(path)), seed)
    return found.dropped or {piece.fragment: piece for piece in found.pieces}


def _seed_with_code(name: str, with_code: bool) -> int:
    return next(seed for seed in range(100) if (keyed_hash(seed, "code", f"pypi://a/1/{name}") % 6 == 0) == with_code)


MODULE = b'''# Copyright of somebody, whose licence this is and who is not to be held to anything here.
# All rights are reserved by them and their heirs.
"""A module about gardens, which are the places where plants are grown by people who like them a lot.

They have been known since the very first of the cities that we know of, and some of them are still there.
"""
class Garden:
    """A garden.

    Args:
        size: square metres.
    """
    def water(self, amount):
        "Litres of water."
        # This is done in the morning, because in the heat of the day
        # most of the water would be gone before it gets to the roots.
        return amount * 2
'''


def test_a_module_gives_docstrings_by_class_and_comments_or_code(tmp_path: Path) -> None:
    found = _extract(tmp_path / "garden.py", MODULE, _seed_with_code("garden.py", False))
    assert isinstance(found, dict)
    assert sorted(found) == ["comments", "docstrings/api", "docstrings/prose"]
    assert found["docstrings/prose"].blocks[0].startswith("A module about gardens")
    assert found["docstrings/api"].blocks == [
        "Garden\nA garden.\n\nArgs:\n    size: square metres.",
        "Garden.water(self, amount)\nLitres of water.",
    ]
    assert [block.split("\n")[0] for block in found["comments"].blocks] == ["This is done in the morning, because in the heat of the day"]
    found = _extract(tmp_path / "garden.py", MODULE, _seed_with_code("garden.py", True))
    assert isinstance(found, dict)
    code = found["code"].blocks[0]
    assert code.startswith("class Garden:")
    assert "return amount * 2" in code
    assert "Litres" not in code
    assert "comments" not in found


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    assert _extract(tmp_path / "a.py", '"""Größe."""'.encode("latin-1")) == "file not UTF-8"
    assert _extract(tmp_path / "b.py", b'"""Open.') == "file not parsable"
    assert _extract(tmp_path / "c.py", b'"""' + b"x" * 5_000_000) == "file too large"
    assert extract(Source("pypi://a/1/d.py", "python", str(tmp_path / "d.py")), 0).dropped == "file unreadable"

"""The preprocess step against a brute-force encoding of each document, and what becomes of an interrupted one."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import zstandard

from mates.preprocess import artifact, readers
from mates.preprocess.artifact import ArtifactError, ArtifactMismatchError, Manifest
from mates.preprocess.corpus import SPLITS, CorpusSettings, SplitShares, make_corpora, texts_of
from mates.preprocess.features import NGRAM_BUCKETS, Feature, ngram_buckets
from mates.preprocess.indexed import open_indexed
from mates.preprocess.inputs import InputError, find_inputs
from mates.preprocess.metadata import document_rows
from mates.preprocess.readers import ReadOptions
from mates.preprocess.tokenizer import SpecialTokenText, make_tokenizer

SHARES = SplitShares(pool=0.2, holdout=0.1, seed=5)
BAD_LINES = [b"{", b"[1]", b'{"body": "x"}', b'{"text": 1}', b'{"text": " "}', b'{"text": "\\ud800"}', b"not json"]
BAD_REASONS = {
    "malformed JSON": 2,
    "not an object": 1,
    "no text field": 1,
    "text is not a string": 1,
    "empty text": 1,
    "invalid unicode": 1,
}
Row = dict[str, Any]


@pytest.fixture(scope="module")
def rows(texts: list[str]) -> list[Row]:
    """1,300 documents, so more than two batches: every text at least twice, and literal end-of-document tokens."""
    source = random.Random(11)
    chosen = [*texts, *texts, *source.choices(texts, k=90), *(f"a<|endoftext|>{number}" for number in range(10))]
    source.shuffle(chosen)
    return [
        {
            "text": text,
            "url": f"https://example.org/{number}",
            "timestamp": None if number % 3 else "2020",
            "source": "s\ud800",
        }
        for number, text in enumerate(chosen)
    ]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> list[Path]:
    """The rows in three forms, with bad lines spread over the first two files."""
    directory = tmp_path_factory.mktemp("inputs")
    lines = [json.dumps(row).encode() for row in rows]
    first, second, third = lines[:700], lines[700:720], rows[720:]
    for position, line in enumerate(BAD_LINES):
        first.insert(position * 97, line)
        second.insert(position, line)
    paths = [directory / "c.json.gz", directory / "a.jsonl.zst", directory / "b.parquet"]
    paths[0].write_bytes(gzip.compress(b"\n".join(first)))
    paths[1].write_bytes(zstandard.ZstdCompressor().compress(b"\r\n".join(second) + b"\r\n"))
    columns: Row = {name: [row[name] for row in third] for name in ("text", "url", "timestamp")}
    columns["source"] = ["s?"] * len(third)
    pq.write_table(pa.table(columns), paths[2])
    return paths


def make(
    directory: Path,
    files: list[Path],
    bpe_dir: Path,
    *,
    shares: SplitShares = SHARES,
    features: tuple[Feature, ...] = (),
    special: SpecialTokenText = "text",
    reading: Row | None = None,
    **changes: Any,
) -> dict[str, Manifest]:
    settings = CorpusSettings(shares=shares, features=features, special_token_text=special, reading=ReadOptions(**reading or {}))
    given: Row = {"inputs": find_inputs([str(path) for path in files]), "settings": settings, "tokenizer_dir": bpe_dir}
    return make_corpora(directory, **(given | changes))


def contents(directory: Path) -> dict[str, bytes]:
    """All that is not a lock."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    }


def metadata(directory: Path) -> list[Row]:
    """Rows of all Parquet files of a corpus, in document order."""
    return [row for path in sorted((directory / "documents").iterdir()) for row in pq.read_table(path).to_pylist()]


def times(directory: Path) -> dict[str, int]:
    return {str(path.relative_to(directory)): path.stat().st_mtime_ns for path in directory.rglob("*")}


DATA_FILES = {
    f"{split}/{name}" for split in SPLITS for name in ("tokens.bin", "tokens.idx", *(f"documents/{part:05d}.parquet" for part in range(3)))
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory, inputs: list[Path], bpe_dir: Path) -> tuple[Path, dict[str, Manifest]]:
    directory = tmp_path_factory.mktemp("corpora")
    return directory, make(directory, inputs, bpe_dir)


# --- contents ------------------------------------------------------------------------------------------------------


def test_tokens_and_metadata_are_those_of_each_document_in_order(
    corpora: tuple[Path, dict[str, Manifest]], rows: list[Row], bpe_dir: Path
) -> None:
    directory, manifests = corpora
    library = tokenizers.Tokenizer.from_file(str(bpe_dir / "tokenizer.json"))
    end = library.token_to_id("<|endoftext|>")
    library.encode_special_tokens = True
    for split in SPLITS:
        own = [row for row in rows if SHARES.split_of(row["text"]) == split]
        expected = [[*library.encode(row["text"]).ids, end] for row in own]
        found = open_indexed(directory / split / "tokens")
        assert [found.document(number).tolist() for number in range(found.documents)] == expected
        assert found.tokens.tolist() == list(itertools.chain(*expected))
        assert np.count_nonzero(found.tokens == end) == len(own)
        assert found.tokens.dtype == np.uint16

        assert metadata(directory / split) == [
            {"url": row["url"], "timestamp": row["timestamp"], "source": "s?", "tokens": len(ids) - 1}
            for row, ids in zip(own, expected, strict=True)
        ]
        assert manifests[split].info["documents"] == len(own) > 50
        assert manifests[split].info["tokens"] == manifests[split].cost.tokens == len(found.tokens)
        assert artifact.verify(directory / split, "corpus") == manifests[split]


def test_rows_by_document_number(corpora: tuple[Path, dict[str, Manifest]], rows: list[Row]) -> None:
    directory = corpora[0] / "train"
    own = [row["url"] for row in rows if SHARES.split_of(row["text"]) == "train"]
    source = random.Random(3)
    for count in (0, 1, 7, 200):
        numbers = [source.randrange(len(own)) for _ in range(count)]
        table = document_rows(directory, numbers, ["url"])
        assert table.column_names == ["url"]
        assert table["url"].to_pylist() == [own[number] for number in numbers]
    assert document_rows(directory, [0, len(own) - 1]).column_names == ["url", "timestamp", "source", "tokens"]
    for number in (-1, len(own)):
        with pytest.raises(IndexError, match=f"of {len(own)}"):
            document_rows(directory, [number])
    with pytest.raises(TypeError, match="expected integers"):
        document_rows(directory, [1.5])  # type: ignore[list-item]
    with pytest.raises(KeyError, match="no column page; found url"):
        document_rows(directory, [1], ["page"])


def test_a_corpus_of_text_alone_has_rows_too(tmp_path: Path, bpe_dir: Path) -> None:
    path = tmp_path / "plain.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(5)))
    make(tmp_path / "corpora", [path], bpe_dir, shares=SplitShares(pool=0, holdout=0, seed=0), reading={"metadata_fields": ()})
    table = document_rows(tmp_path / "corpora/train", range(5))
    lengths = open_indexed(tmp_path / "corpora/train/tokens").lengths
    assert table.to_pydict() == {"tokens": (lengths - 1).tolist()}


def test_rows_with_much_metadata_are_written_as_they_come(tmp_path: Path, bpe_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by bytes, not by documents: more row groups, the same rows."""
    from mates.preprocess import parts

    monkeypatch.setattr(parts, "HELD_BYTES", 1_000)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 2_000)
    path = tmp_path / "plain.jsonl"
    rows = [{"text": f"document {number}", "url": f"{number}" * 200} for number in range(50)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    make(tmp_path / "corpora", [path], bpe_dir, shares=SplitShares(pool=0, holdout=0, seed=0))
    assert [row["url"] for row in metadata(tmp_path / "corpora/train")] == [row["url"] for row in rows]
    assert pq.read_metadata(tmp_path / "corpora/train/documents/00000.parquet").num_row_groups > 5


def test_every_document_is_accounted_for(corpora: tuple[Path, dict[str, Manifest]], rows: list[Row], inputs: list[Path]) -> None:
    _, manifests = corpora
    ledgers = manifests["train"].info["input_files"]
    assert all(manifest.info["input_files"] == ledgers for manifest in manifests.values())
    assert [ledger["path"] for ledger in ledgers] == [str(path) for path in inputs]
    counts = (700, 20, len(rows) - 720)
    start = 0
    for ledger, path, good, dropped in zip(ledgers, inputs, counts, (BAD_REASONS, BAD_REASONS, {}), strict=True):
        own = Counter(SHARES.split_of(row["text"]) for row in rows[start : start + good])
        start += good
        assert ledger["written"] == own
        assert ledger["dropped"] == dropped
        assert ledger["documents"] == good + sum(dropped.values())
        digest = None if path.suffix == ".parquet" else artifact.digest_of(path)  # of Parquet only some columns are read
        assert (ledger["bytes"], ledger["blake3"]) == (path.stat().st_size, digest)
    for split in SPLITS:
        assert manifests[split].info["documents"] == sum(ledger["written"].get(split, 0) for ledger in ledgers)
    assert sum(manifest.info["documents"] for manifest in manifests.values()) == len(rows)


def test_no_document_is_in_two_corpora(corpora: tuple[Path, dict[str, Manifest]], rows: list[Row], bpe_dir: Path) -> None:
    directory, _ = corpora
    library = tokenizers.Tokenizer.from_file(str(bpe_dir / "tokenizer.json"))
    found = {}
    for split in SPLITS:
        indexed = open_indexed(directory / split / "tokens")
        documents = [indexed.document(number).tolist() for number in range(indexed.documents)]
        found[split] = Counter(library.decode(document) for document in documents)
    for one, other in itertools.combinations(SPLITS, 2):
        assert not found[one].keys() & found[other].keys()
    assert found["train"] + found["pool"] + found["holdout"] == Counter(row["text"] for row in rows)  # no copy was lost either


def test_the_tokenizer_is_trained_on_train_documents_alone(inputs: list[Path], rows: list[Row]) -> None:
    assert list(texts_of(find_inputs([str(path) for path in inputs]), ReadOptions(), SHARES)) == [
        row["text"] for row in rows if SHARES.split_of(row["text"]) == "train"
    ]


def test_contents_do_not_depend_on_how_documents_lie_in_files(
    tmp_path: Path, corpora: tuple[Path, dict[str, Manifest]], rows: list[Row], bpe_dir: Path
) -> None:
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    make(tmp_path / "corpora", [path], bpe_dir)
    found, expected = contents(tmp_path / "corpora"), contents(corpora[0])
    for split, name in itertools.product(SPLITS, ("tokens.bin", "tokens.idx")):
        assert found[f"{split}/{name}"] == expected[f"{split}/{name}"]


# --- the split -----------------------------------------------------------------------------------------------------


def test_shares_are_kept() -> None:
    """20,000 texts: counts within four standard deviations of a binomial, and seeds agree as often as chance has it."""
    n = 20_000
    texts = [f"document number {number}" for number in range(n)]

    def check(count: int, share: float) -> None:
        assert abs(count - n * share) < 4 * math.sqrt(n * share * (1 - share))

    splits = {}
    for seed in (0, 1, 2**32 - 1):
        shares = SplitShares(pool=0.05, holdout=0.02, seed=seed)
        splits[seed] = [shares.split_of(text) for text in texts]
        counts = Counter(splits[seed])
        check(counts["pool"], 0.05)
        check(counts["holdout"], 0.02)
        check(counts["train"], 0.93)
        assert [shares.split_of(text) for text in texts[:50]] == splits[seed][:50]
    for one, other in itertools.combinations(splits.values(), 2):
        check(sum(a == b for a, b in zip(one, other, strict=True)), 0.05**2 + 0.02**2 + 0.93**2)


def test_a_larger_share_keeps_what_a_smaller_one_had() -> None:
    texts = [f"document number {number}" for number in range(2_000)]
    small, large = (SplitShares(pool=pool, holdout=0.05, seed=3) for pool in (0.1, 0.3))
    assert {text for text in texts if small.split_of(text) == "pool"} < {text for text in texts if large.split_of(text) == "pool"}


def test_the_split_as_a_literal() -> None:
    """Corpora of other versions of the program must be divided alike."""
    shares = SplitShares(pool=0.3, holdout=0.3, seed=1)
    assert "".join(shares.split_of(f"text {number}é")[0] for number in range(24)) == "phhtthtphhpptttppttthttt"


# --- again, otherwise, interrupted ---------------------------------------------------------------------------------


def test_complete_corpora_are_not_touched(tmp_path: Path, inputs: list[Path], bpe_dir: Path) -> None:
    made = make(tmp_path, inputs, bpe_dir)
    before = times(tmp_path)
    assert set(contents(tmp_path)) == DATA_FILES | {"rejects.jsonl"} | {f"{split}/manifest.json" for split in SPLITS}
    assert make(tmp_path, inputs, bpe_dir) == made
    assert times(tmp_path) == before


def test_other_settings_are_refused(tmp_path: Path, inputs: list[Path], bpe_dir: Path, texts: list[str]) -> None:
    make(tmp_path / "corpora", inputs, bpe_dir)
    other_tokenizer = tmp_path / "tokenizer"
    make_tokenizer(
        other_tokenizer,
        path=None,
        kind="bpe",
        vocab_size=400,
        train_bytes=9_999,
        end_of_document=None,
        texts=texts,
        inputs={},
    )
    before = times(tmp_path / "corpora")
    changes: list[tuple[Row, str]] = [
        ({"shares": SplitShares(pool=0.3, holdout=0.1, seed=5)}, "pool_share: 0.2, now asked 0.3"),
        ({"shares": SplitShares(pool=0.2, holdout=0.2, seed=5)}, "holdout_share: 0.1, now asked 0.2"),
        ({"shares": SplitShares(pool=0.2, holdout=0.1, seed=6)}, "split_seed: 5, now asked 6"),
        ({"reading": {"text_field": "body"}}, 'text_field: "text", now asked "body"'),
        ({"features": ("length",)}, "features: .*now asked .*length"),
        ({"inputs": find_inputs([str(path) for path in inputs[:2]])}, "inputs: "),
        ({"inputs": find_inputs([str(path) for path in inputs[::-1]])}, "inputs: "),
        ({"origin": "f00"}, "inputs: "),
        ({"tokenizer_dir": other_tokenizer}, "input tokenizer: "),
    ]
    for change, message in changes:
        with pytest.raises(ArtifactMismatchError, match=message):
            make(tmp_path / "corpora", inputs, bpe_dir, **change)
    assert times(tmp_path / "corpora") == before


@pytest.mark.parametrize("lost", [["train"], ["holdout"], ["train", "pool"], list(SPLITS)])
def test_an_interrupted_step_is_done_again_to_the_same_bytes(
    tmp_path: Path, corpora: tuple[Path, dict[str, Manifest]], inputs: list[Path], bpe_dir: Path, lost: list[str]
) -> None:
    make(tmp_path, inputs, bpe_dir)
    for split in lost:
        artifact.unmake(tmp_path / split)
        (tmp_path / split / "tokens.bin").write_bytes(b"half of it")
    made = make(tmp_path, inputs, bpe_dir)
    found, expected = contents(tmp_path), contents(corpora[0])
    assert {name: found[name] for name in DATA_FILES} == {name: expected[name] for name in DATA_FILES}
    for split in SPLITS:
        assert artifact.verify(tmp_path / split) == made[split]
        assert made[split].fingerprint == corpora[1][split].fingerprint
        assert made[split].info == corpora[1][split].info


def test_a_damaged_input_by_policy(tmp_path: Path, inputs: list[Path], bpe_dir: Path, rows: list[Row]) -> None:
    """`fail` names the file and leaves no corpus; `skip` keeps what comes before the damage, and all other files, and says so."""
    cut = tmp_path / "cut.json.gz"
    cut.write_bytes(inputs[0].read_bytes()[:-2_000])
    files = [cut, *inputs[1:]]
    with pytest.raises(InputError, match=r"cut\.json\.gz"):
        make(tmp_path / "failed", [inputs[2], cut], bpe_dir, reading={"on_bad_input": "fail"})
    with pytest.raises(ArtifactError, match="no complete corpus artifact"):
        artifact.load(tmp_path / "failed" / "train", "corpus")
    made = make(tmp_path / "skipped", files, bpe_dir)
    ledgers = made["train"].info["input_files"]
    assert [bool(ledger["damage"]) for ledger in ledgers] == [True, False, False]
    assert ledgers[0]["blake3"] is None
    kept = sum(ledgers[0]["written"].values())
    assert 0 < kept < 700
    own = [row for row in [*rows[:kept], *rows[700:]] if SHARES.split_of(row["text"]) == "train"]
    assert [row["url"] for row in metadata(tmp_path / "skipped" / "train")] == [row["url"] for row in own]
    damaged = [row for row in rejects(tmp_path / "skipped") if row["reason"] == "damaged file"]
    assert [row["path"] for row in damaged] == [str(cut)]


def rejects(directory: Path) -> list[Row]:
    return [json.loads(line) for line in (directory / "rejects.jsonl").read_text().splitlines()]


def test_rejects_name_file_and_line(tmp_path: Path, corpora: tuple[Path, dict[str, Manifest]], inputs: list[Path], bpe_dir: Path) -> None:
    """Line numbers count from the file's start, also where a file is read in parts."""
    found = rejects(corpora[0])
    positions = [position * 97 + 1 for position in range(len(BAD_LINES))], [position + 1 for position in range(len(BAD_LINES))]
    assert [(row["path"], row["line"]) for row in found] == [
        (str(path), line) for path, lines in zip(inputs, positions, strict=False) for line in lines
    ]
    assert Counter(row["reason"] for row in found) == {reason: 2 * count for reason, count in BAD_REASONS.items()}
    assert found[0]["excerpt"] == "{"
    plain = tmp_path / "plain.jsonl"
    plain.write_bytes(gzip.decompress(inputs[0].read_bytes()))
    make(tmp_path / "parts", [plain], bpe_dir, part_bytes=plain.stat().st_size // 9)
    assert [row["line"] for row in rejects(tmp_path / "parts")] == positions[0]


def test_empty_documents_are_kept_when_asked(tmp_path: Path, bpe_dir: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": ""}\n{"text": "one"}\n{"text": ""}\n{"text": ""}\n{"text": "two"}\n')
    alone = SplitShares(pool=0, holdout=0, seed=0)
    made = make(tmp_path / "kept", [path], bpe_dir, shares=alone, reading={"keep_empty": True})
    assert set(made) == {"train"}
    found = open_indexed(tmp_path / "kept/train/tokens")
    assert [len(found.document(number)) > 0 for number in range(found.documents)] == [False, True, False, False, True]
    assert found.boundaries.tolist() == [0, 0, 1, 1, 1, 2]  # as Megatron's builder writes documents of no sequences
    assert (made["train"].info["documents"], made["train"].info["sequences"]) == (5, 2)
    assert make(tmp_path / "dropped", [path], bpe_dir, shares=alone)["train"].info["input_files"][0]["dropped"] == {"empty text": 3}


def test_special_token_text_becomes_the_token_only_when_asked(tmp_path: Path, bpe_dir: Path) -> None:
    path = tmp_path / "special.jsonl"
    path.write_text('{"text": "a<|endoftext|>b"}\n')
    library = tokenizers.Tokenizer.from_file(str(bpe_dir / "tokenizer.json"))
    end = library.token_to_id("<|endoftext|>")
    for policy, count in (("text", 1), ("special", 2)):
        made = make(tmp_path / policy, [path], bpe_dir, shares=SplitShares(pool=0, holdout=0, seed=0), special=policy)  # type: ignore[arg-type]
        assert open_indexed(tmp_path / policy / "train/tokens").tokens.tolist().count(end) == count
        assert made["train"].settings["special_token_text"] == policy


def test_features(tmp_path: Path, inputs: list[Path], rows: list[Row], bpe_dir: Path) -> None:
    """Against counts in plain Python."""
    made = make(tmp_path, inputs, bpe_dir, features=("length", "hash", "ngrams"))
    for split in SPLITS:
        own = [row["text"] for row in rows if SHARES.split_of(row["text"]) == split]
        found, indexed = metadata(tmp_path / split), open_indexed(tmp_path / split / "tokens")
        totals = np.zeros(NGRAM_BUCKETS, np.int64)
        for number, (row, text) in enumerate(zip(found, own, strict=True)):
            ids = indexed.document(number)[:-1]
            assert (row["utf8_bytes"], row["tokens"]) == (len(text.encode()), len(ids))
            singles, pairs = ngram_buckets(ids)
            expected = Counter(singles.tolist()) + Counter(pairs.tolist())
            assert dict(zip(row["ngram_buckets"], row["ngram_counts"], strict=True)) == expected
            assert sum(row["ngram_counts"]) == 2 * len(ids) - 1
            for bucket, count in expected.items():
                totals[bucket] += count
        assert np.array_equal(np.load(tmp_path / split / "ngram_counts.npy"), totals)
        by_hash = {row["text_xxh3_128"]: text for row, text in zip(found, own, strict=True)}
        assert len(by_hash) == len(set(own)) < len(own)
        assert artifact.verify(tmp_path / split) == made[split]


@pytest.mark.parametrize(("split", "pool", "holdout"), [("pool", 1e-9, 0.2), ("holdout", 0.2, 1e-9), ("train", 0.5, 0.5)])
def test_an_empty_corpus_is_refused(tmp_path: Path, inputs: list[Path], bpe_dir: Path, split: str, pool: float, holdout: float) -> None:
    advice = "smaller corpus.pool_share" if split == "train" else f"a larger corpus.{split}_share"
    with pytest.raises(InputError, match=rf"no document for the {split} corpus: 1 files .* hold 27 documents.*{advice}"):
        make(tmp_path, [inputs[1]], bpe_dir, shares=SplitShares(pool=pool, holdout=holdout, seed=0))
    assert not list(tmp_path.rglob("manifest.json"))


def test_progress_reaches_the_bytes_of_all_files(tmp_path: Path, inputs: list[Path], bpe_dir: Path) -> None:
    told: list[tuple[int, str]] = []
    make(tmp_path, inputs, bpe_dir, progress=lambda done, text: told.append((done, text)))
    done = [number for number, _ in told]
    assert all(a <= b for a, b in itertools.pairwise(done))
    assert done[0] == 0
    assert done[-1] == sum(path.stat().st_size for path in inputs)
    assert any(f"{inputs[0].name}: 707 documents" in text for _, text in told)


# --- real text -----------------------------------------------------------------------------------------------------


def documents_of(path: Path) -> Iterator[str]:
    with path.open("rb") as handle, zstandard.ZstdDecompressor().stream_reader(handle) as stream:
        for line in stream.read().splitlines():
            yield json.loads(line)["text"]


def test_c4_with_the_gpt_neox_tokenizer(tmp_path: Path, c4_file: Path, neox_tokenizer: Path) -> None:
    tokenizer_dir = tmp_path / "tokenizer"
    make_tokenizer(
        tokenizer_dir,
        path=str(neox_tokenizer),
        kind="bpe",
        vocab_size=0,
        train_bytes=0,
        end_of_document=None,
        texts=[],
        inputs={},
    )
    shares = SplitShares(pool=0.05, holdout=0.02, seed=0)
    made = make(tmp_path / "corpora", [c4_file], tokenizer_dir, shares=shares)
    documents = list(documents_of(c4_file))
    assert sum(manifest.info["documents"] for manifest in made.values()) == len(documents) == 3_686
    assert made["train"].info["input_files"][0]["dropped"] == {}
    # SOURCES.md counts 1,411,955 tokens with this tokenizer; each document has one more here
    assert sum(manifest.info["tokens"] for manifest in made.values()) == 1_411_955 + 3_686

    library = tokenizers.Tokenizer.from_file(str(neox_tokenizer / "tokenizer.json"))
    for split in SPLITS:
        own = [text for text in documents if shares.split_of(text) == split]
        indexed = open_indexed(tmp_path / "corpora" / split / "tokens")
        assert len(own) == indexed.documents
        for number in random.Random(0).sample(range(len(own)), {"train": 150, "pool": 40, "holdout": 10}[split]):
            assert indexed.document(number).tolist() == [*library.encode(own[number]).ids, 0]

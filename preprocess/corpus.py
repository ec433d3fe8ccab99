"""The preprocess step: documents in, three indexed corpora out (train, pool and holdout), no document in two of them."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mates.preprocess import artifact
from mates.preprocess.artifact import Cost, Manifest
from mates.preprocess.indexed import IndexedWriter, token_dtype
from mates.preprocess.readers import Document, Dropped, InputError, read_documents
from mates.preprocess.tokenizer import Tokenizer, open_tokenizer

SPLITS = ("train", "pool", "holdout")
TOKENS_NAME = "tokens"  # the prefix of .bin and .idx inside a corpus folder
BATCH_DOCUMENTS = 512
METADATA_ROWS = 65_536
METADATA_SCHEMA = pa.schema([("url", pa.string()), ("timestamp", pa.string()), ("source", pa.string())])


@dataclass(frozen=True, kw_only=True)
class SplitShares:
    """Which share of documents goes to the pool and the holdout corpus; the rest is trained on."""

    pool: float
    holdout: float
    seed: int

    def split_of(self, text: str) -> str:
        """The corpus of a document, from a hash of its text keyed by the seed: equal texts go to the same one."""
        key = self.seed.to_bytes(8, "little")
        digest = hashlib.blake2b(text.encode(), digest_size=8, key=key, person=b"mates-split").digest()
        position = int.from_bytes(digest, "little") / 2**64
        if position < self.pool:
            return "pool"
        return "holdout" if position < self.pool + self.holdout else "train"


@dataclass(kw_only=True)
class FileLedger:
    """What became of one input file's documents."""

    path: str
    bytes: int
    sha256: str
    documents: int = 0
    written: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> dict[str, Any]:
        """For the manifest; checks that no document is unaccounted for."""
        assert self.documents == self.written.total() + self.dropped.total(), "the ledger must balance"
        return {
            "path": self.path,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "documents": self.documents,
            "written": dict(self.written),
            "dropped": dict(self.dropped),
        }


class _SplitWriter:
    """One corpus being written: tokens and, beside them, where each document came from."""

    def __init__(self, directory: Path, tokenizer: Tokenizer, stack: ExitStack) -> None:
        self.tokens = stack.enter_context(IndexedWriter(directory / TOKENS_NAME, token_dtype(tokenizer.vocab_size)))
        self._metadata_handle = stack.enter_context(artifact.atomic_file(directory / "documents.parquet"))
        self._rows: list[dict[str, str | None]] = []
        self._metadata = stack.enter_context(pq.ParquetWriter(self._metadata_handle, METADATA_SCHEMA))

    def write(self, documents: list[Document], ids: list[np.ndarray[Any, np.dtype[np.int64]]]) -> None:
        lengths = np.array([len(item) for item in ids], np.int64)
        self.tokens.write(np.concatenate(ids), lengths)
        self._rows.extend({name: getattr(document, name) for name in METADATA_SCHEMA.names} for document in documents)
        if len(self._rows) >= METADATA_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the rows held back: a row group a batch would be mostly headers."""
        self._metadata.write_table(pa.Table.from_pylist(self._rows, schema=METADATA_SCHEMA))
        self._rows.clear()


def make_corpora(
    directory: Path,
    *,
    inputs: list[Path],
    text_field: str,
    shares: SplitShares,
    tokenizer_dir: Path,
    origin: str | None = None,
    progress: Callable[[int, str], None] = lambda done_bytes, text: None,
) -> dict[str, Manifest]:
    """Tokenize documents into ``directory``/train, /pool and /holdout.

    Args:
        directory: where the three corpora go.
        inputs: files, read in order.
        text_field: field or column of the text.
        shares: which documents go where.
        tokenizer_dir: a tokenizer artifact.
        origin: fingerprint of what wrote the inputs, where that is known (the sample corpus); files are otherwise recognised by
            path and size, and their SHA-256 is recorded.
        progress: told the bytes of finished inputs and a line of text.

    Returns:
        The three manifests by split; at once where all three are complete and fit.

    Raises:
        InputError: a damaged input, or one of the three corpora would be empty.
        artifact.ArtifactMismatchError: corpora of other inputs or settings stand there.
    """
    tokenizer, tokenizer_manifest = open_tokenizer(tokenizer_dir)
    settings = {
        "inputs": origin or [{"path": str(path), "bytes": path.stat().st_size} for path in inputs],
        "text_field": text_field,
        "pool_share": shares.pool,
        "holdout_share": shares.holdout,
        "split_seed": shares.seed,
    }
    parents = {"tokenizer": tokenizer_manifest.fingerprint}
    done = {
        split: artifact.find_complete(directory / split, kind="corpus", settings=settings | {"split": split}, inputs=parents)
        for split in SPLITS
    }
    complete = {split: manifest for split, manifest in done.items() if manifest}
    if len(complete) == len(SPLITS):
        return complete
    start = time.perf_counter()
    for split in complete:
        artifact.unmake(directory / split)
    with ExitStack() as stack:
        writers = {split: _SplitWriter(directory / split, tokenizer, stack) for split in SPLITS}
        ledgers = _write_all(inputs, text_field, shares, tokenizer, writers, progress)
        for writer in writers.values():
            writer.flush()
        tokens = {split: writer.tokens.tokens for split, writer in writers.items()}
        documents = {split: writer.tokens.documents for split, writer in writers.items()}
        _refuse_empty(documents, inputs, ledgers)
    seconds = time.perf_counter() - start
    info = {
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "end_of_document": tokenizer.end_of_document},
        "special_token_text": "encoded as text",
        "dtype": str(token_dtype(tokenizer.vocab_size)),
        "input_files": [ledger.as_json() for ledger in ledgers],
    }
    return {
        split: artifact.commit(
            directory / split,
            kind="corpus",
            settings=settings | {"split": split},
            inputs=parents,
            info=info | {"documents": documents[split], "tokens": tokens[split]},
            identity=[f"{TOKENS_NAME}.bin", f"{TOKENS_NAME}.idx"],
            # one pass makes all three; its time is divided by tokens so that sums over artifacts are right
            cost=Cost(seconds=seconds * tokens[split] / max(1, sum(tokens.values())), tokens=tokens[split]),
        )
        for split in SPLITS
    }


def _write_all(
    inputs: list[Path],
    text_field: str,
    shares: SplitShares,
    tokenizer: Tokenizer,
    writers: dict[str, _SplitWriter],
    progress: Callable[[int, str], None],
) -> list[FileLedger]:
    ledgers, done_bytes = [], 0
    for path in inputs:
        ledger = FileLedger(path=str(path), bytes=path.stat().st_size, sha256=artifact.sha256_file(path))
        ledgers.append(ledger)
        for batch in _batches(read_documents(path, text_field), BATCH_DOCUMENTS):
            _write_batch(batch, shares, tokenizer, writers, ledger)
            progress(done_bytes, f"{path.name}: {ledger.documents:,} documents")
        done_bytes += ledger.bytes
        progress(done_bytes, f"{path.name}: {ledger.documents:,} documents, {ledger.dropped.total():,} dropped")
    return ledgers


def _write_batch(
    batch: list[Document | Dropped],
    shares: SplitShares,
    tokenizer: Tokenizer,
    writers: dict[str, _SplitWriter],
    ledger: FileLedger,
) -> None:
    documents = [row for row in batch if isinstance(row, Document)]
    ledger.documents += len(batch)
    ledger.dropped.update(row.reason for row in batch if isinstance(row, Dropped))
    ends = np.array([tokenizer.end_of_document])
    encoded = [np.concatenate([ids, ends]) for ids in tokenizer.encode_batch([document.text for document in documents])]
    split_of = [shares.split_of(document.text) for document in documents]
    for split, writer in writers.items():
        chosen = [number for number, name in enumerate(split_of) if name == split]
        if chosen:
            writer.write([documents[number] for number in chosen], [encoded[number] for number in chosen])
            ledger.written[split] += len(chosen)


def _batches(rows: Iterable[Document | Dropped], size: int) -> Iterator[list[Document | Dropped]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def _refuse_empty(documents: dict[str, int], inputs: list[Path], ledgers: list[FileLedger]) -> None:
    for split, count in documents.items():
        if count == 0:
            found = sum(ledger.documents for ledger in ledgers)
            dropped: Counter[str] = sum((ledger.dropped for ledger in ledgers), Counter())
            share = f"a larger corpus.{split}_share" if split != "train" else "smaller corpus.pool_share and corpus.holdout_share"
            raise InputError(
                f"no document for the {split} corpus: {len(inputs)} files from {inputs[0]} on hold {found} documents, "
                f"dropped {dict(dropped)}. Give more documents, or {share}"
            )


def texts_of(inputs: list[Path], text_field: str, shares: SplitShares) -> Iterator[str]:
    """Texts of the train split's documents, in order: what a tokenizer is trained on."""
    for path in inputs:
        for row in read_documents(path, text_field):
            if isinstance(row, Document) and shares.split_of(row.text) == "train":
                yield row.text

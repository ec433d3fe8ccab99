"""One part of one input file, tokenized: the unit that is done, recorded and done again.

A part's documents go to files of its own in the folder of unfinished work (for each split ``tokens.bin`` and the documents' lengths,
and a Parquet file of what is known of each document). Its record, a JSON file written last, says that they are whole. What a part
holds depends on the input and the settings alone, never on which process wrote it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from blake3 import blake3

from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, FileRecord
from mates.preprocess.encode import CheckedEngine, Engine
from mates.preprocess.features import NGRAM_BUCKETS, TOKENS_COLUMN, Feature, feature_columns, feature_schema
from mates.preprocess.indexed import token_dtype
from mates.preprocess.inputs import InputFile
from mates.preprocess.readers import Block, PartReader, ReadOptions
from mates.preprocess.scorer import Scorer, ScorerBlock
from mates.preprocess.workers import Stop, StoppedError

SPLITS = ("train", "pool", "holdout")
ROW_GROUP = 65_536  # documents
HELD_BYTES = 32 << 20  # of rows that wait to be written
HASH_SPACE = 2.0**64
HASHED_CHARACTERS = 256
LENGTH_KEY = 0x9E3779B97F4A7C15  # any odd number: lengths next to each other get keys far apart

Ids = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, kw_only=True)
class SplitShares:
    """Which share of documents goes to the pool and the holdout corpus; the rest is trained on."""

    pool: float
    holdout: float
    seed: int

    @property
    def splits(self) -> tuple[str, ...]:
        """The corpora that get documents at all."""
        return tuple(split for split, share in zip(SPLITS, (1.0, self.pool, self.holdout), strict=True) if share > 0)

    def splits_of(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """The number in ``SPLITS`` of the corpus of each text.

        It hangs on a hash, XXH3-64 of the first 256 characters keyed by the seed and the text's length, so equal texts go to the same
        corpus; hashing them from end to end would cost as much as reading them.
        """
        if len(self.splits) == 1:
            return np.zeros(len(texts), np.int64)
        digest, seed = xxhash.xxh3_64_intdigest, self.seed
        hashes = [digest(text[:HASHED_CHARACTERS].encode(), (seed + LENGTH_KEY * len(text)) % 2**64) for text in texts]
        position = np.array(hashes, np.uint64).astype(np.float64) / HASH_SPACE
        return np.where(position < self.pool, 1, np.where(position < self.pool + self.holdout, 2, 0))

    def split_of(self, text: str) -> str:
        """The corpus of one document."""
        return SPLITS[int(self.splits_of([text])[0])]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Part ``index`` of ``of`` of an input file; ``number`` counts the parts of all files."""

    number: int
    file: InputFile
    index: int
    of: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitRecord:
    """What a part gave to one corpus; ``digest`` is of its tokens' bytes, ``metadata`` of its Parquet file, ``scorer`` of the encoder's
    tokens, where these are made, and ``counts_digest`` of how many of them begin in each token."""

    documents: int
    sequences: int
    tokens: int
    digest: str
    metadata_bytes: int
    metadata_digest: str
    scorer_sequences: int = 0
    scorer_tokens: int = 0
    scorer_digest: str | None = None
    counts_digest: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PartRecord:
    """What became of a part. ``joined`` says that its files have been moved into the corpora."""

    number: int
    file: str
    engine: str
    documents: int
    lines: int
    dropped: Mapping[str, int]
    rejects: Sequence[Mapping[str, Any]]
    damage: str | None
    input_digest: str | None
    splits: Mapping[str, SplitRecord]
    seconds: float
    joined: bool = False


@dataclass(frozen=True, kw_only=True)
class PartSettings:
    """What a part's contents depend on, besides the tokenizer."""

    shares: SplitShares
    reading: ReadOptions
    features: tuple[Feature, ...]


class PartFiles:
    """Names in the folder of unfinished work."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder = folder
        self._stem = f"{number:06d}"
        self.record = folder / f"{self._stem}.json"

    def tokens(self, split: str) -> Path:
        """Token ids, end-of-document ids among them."""
        return self._folder / f"{self._stem}-{split}.bin"

    def lengths(self, split: str) -> Path:
        """Tokens of each document, int32."""
        return self._folder / f"{self._stem}-{split}.lengths"

    def scorer_tokens(self, split: str) -> Path:
        """Token ids of the encoder."""
        return self._folder / f"{self._stem}-{split}.scorer.bin"

    def scorer_lengths(self, split: str) -> Path:
        """Those of each document, int32."""
        return self._folder / f"{self._stem}-{split}.scorer.lengths"

    def scorer_counts(self, split: str) -> Path:
        """Those that begin in each token, uint8."""
        return self._folder / f"{self._stem}-{split}.scorer.counts"

    def metadata(self, split: str) -> Path:
        """One row a document."""
        return self._folder / f"{self._stem}-{split}.parquet"

    def ngrams(self, split: str) -> Path:
        """Total hashed n-gram counts of the part's documents."""
        return self._folder / f"{self._stem}-{split}.ngrams.npy"


def write_record(files: PartFiles, record: PartRecord) -> None:
    """Make a part count as done."""
    artifact.write_json(files.record, asdict(record))


def read_record(files: PartFiles, part: Part, engine: str | None) -> PartRecord | None:
    """The record of a part that is done, or None: not done yet, or by another engine than the one asked for (None: any).

    Raises:
        ArtifactError: the record or a file it speaks of is damaged.
    """
    if not files.record.is_file():
        return None
    raw = artifact.read_json(files.record)
    try:
        record = PartRecord(**raw | {"splits": {name: SplitRecord(**value) for name, value in raw["splits"].items()}})
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{files.record}: not a record of this version ({error!r}); remove {files.record.parent}") from error
    if record.number != part.number or record.file != part.file.name or engine not in (None, record.engine):
        return None
    return record


def is_whole(files: PartFiles, record: PartRecord, itemsize: int, scorer_itemsize: int | None = None) -> bool:
    """Whether the files that a part's record speaks of hold what was written, which a crash of the machine may have undone.

    Args:
        files: where they are. record: of a part that is not joined.
        itemsize: bytes of a token. scorer_itemsize: of an encoder token, where these are made.
    """
    for split, part in record.splits.items():
        expected = {
            files.metadata(split): FileRecord(bytes=part.metadata_bytes, blake3=part.metadata_digest),
            files.tokens(split): FileRecord(bytes=part.tokens * itemsize, blake3=part.digest),
        }
        sums = {files.lengths(split): part.tokens}
        if scorer_itemsize is not None:
            if part.scorer_digest is None or part.counts_digest is None:
                return False
            expected[files.scorer_tokens(split)] = FileRecord(bytes=part.scorer_tokens * scorer_itemsize, blake3=part.scorer_digest)
            expected[files.scorer_counts(split)] = FileRecord(bytes=part.tokens, blake3=part.counts_digest)
            sums[files.scorer_lengths(split)] = part.scorer_tokens
        if not all(artifact.is_as_recorded(path, found) for path, found in expected.items()):
            return False
        for path, total in sums.items():
            if not path.is_file():
                return False
            lengths = np.fromfile(path, np.int32)
            if len(lengths) != part.documents or int(lengths.sum()) != total:
                return False
    return True


class _TokenWriter:
    """A part's tokens of one kind, and their lengths."""

    def __init__(self, tokens: Path, lengths: Path, dtype: np.dtype[Any], stack: ExitStack) -> None:
        # most often these are joined and removed before the disk would have them; is_whole finds what a crash took
        self._tokens = stack.enter_context(artifact.atomic_file(tokens, durable=False))
        self._lengths = stack.enter_context(artifact.atomic_file(lengths, durable=False))
        self._dtype = dtype
        self.digest = blake3()
        self.sequences = self.tokens = 0

    def write(self, ids: npt.NDArray[np.uint32], lengths: npt.NDArray[np.int32]) -> None:
        stored = _as_stored(ids, self._dtype)
        self.digest.update(stored.view(np.uint8).data)
        self._tokens.write(stored.data)
        self._lengths.write(lengths.data)
        self.sequences += int(np.count_nonzero(lengths))
        self.tokens += len(ids)


class _ScorerWriter(_TokenWriter):
    """A part's encoder tokens."""

    def __init__(self, files: PartFiles, split: str, dtype: np.dtype[Any], stack: ExitStack) -> None:
        super().__init__(files.scorer_tokens(split), files.scorer_lengths(split), dtype, stack)
        self._counts = stack.enter_context(artifact.atomic_file(files.scorer_counts(split), durable=False))
        self.counts_digest = blake3()

    def write_block(self, block: ScorerBlock) -> None:
        self.write(block.ids, block.lengths)
        self.counts_digest.update(block.counts.data)
        self._counts.write(block.counts.data)


class _SplitWriter:
    """A part's files of one split."""

    def __init__(
        self, files: PartFiles, split: str, dtype: np.dtype[Any], schema: pa.Schema, scorer: np.dtype[Any] | None, stack: ExitStack
    ) -> None:
        self._tokens = _TokenWriter(files.tokens(split), files.lengths(split), dtype, stack)
        self._scorer = _ScorerWriter(files, split, scorer, stack) if scorer is not None else None
        self._metadata_path = files.metadata(split)
        self._metadata_handle = stack.enter_context(artifact.atomic_file(self._metadata_path))
        # addresses and dates seldom come twice: a dictionary of them would only take time
        writer = pq.ParquetWriter(self._metadata_handle, schema, compression="zstd", use_dictionary=False, write_statistics=False)
        self._metadata = stack.enter_context(writer)
        self._schema, self._held, self._held_bytes = schema, 0, 0
        self._batches: list[pa.RecordBatch] = []
        self._documents = 0

    def write(
        self, ids: npt.NDArray[np.uint32], lengths: npt.NDArray[np.int32], columns: list[pa.Array], scorer: ScorerBlock | None
    ) -> None:
        self._tokens.write(ids, lengths)
        if self._scorer is not None:
            assert scorer is not None
            self._scorer.write_block(scorer)
        batch = pa.record_batch(columns, schema=self._schema)
        self._batches.append(batch)
        self._held += len(lengths)
        self._held_bytes += batch.nbytes
        self._documents += len(lengths)
        if self._held >= ROW_GROUP or self._held_bytes >= HELD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the rows held back: a row group a batch would be mostly headers."""
        if self._batches:
            self._metadata.write_table(pa.Table.from_batches(self._batches, schema=self._schema), row_group_size=ROW_GROUP)
            self._batches.clear()
            self._held = self._held_bytes = 0

    def record(self) -> SplitRecord:
        """To be called when the files are closed."""
        record = SplitRecord(
            documents=self._documents,
            sequences=self._tokens.sequences,
            tokens=self._tokens.tokens,
            digest=self._tokens.digest.hexdigest(),
            metadata_bytes=self._metadata_path.stat().st_size,
            metadata_digest=artifact.digest_of(self._metadata_path),
        )
        if self._scorer is None:
            return record
        return replace(
            record,
            scorer_sequences=self._scorer.sequences,
            scorer_tokens=self._scorer.tokens,
            scorer_digest=self._scorer.digest.hexdigest(),
            counts_digest=self._scorer.counts_digest.hexdigest(),
        )


def _as_stored(ids: npt.NDArray[np.uint32], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Ids in the dtype that they are stored in.

    Raises:
        ValueError: an id that the dtype cannot hold; it would wrap silently.
    """
    if len(ids) and int(ids.max()) > np.iinfo(dtype).max:
        raise ValueError(f"token id {int(ids.max())} does not fit {dtype}")
    return ids.astype(dtype)


def _without_ends(ids: npt.NDArray[np.uint32], offsets: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """Take the last id from each document that has any."""
    lengths = np.diff(offsets)
    kept = np.ones(len(ids), bool)
    kept[offsets[1:][lengths > 0] - 1] = False
    return ids[kept], np.append(0, np.cumsum(lengths - (lengths > 0)))


class PartWriter:
    """Tokenizes parts into the folder of unfinished work; one object a process."""

    def __init__(
        self, folder: Path, settings: PartSettings, engine: Engine, *, vocab_size: int, stop: Stop, scorer: Scorer | None = None
    ) -> None:
        self._folder, self._settings, self._engine, self._stop, self._scorer = folder, settings, engine, stop, scorer
        self._encoded = 0  # documents of the part
        self._dtype = token_dtype(vocab_size)
        metadata = [pa.field(name, pa.string()) for name in settings.reading.metadata_fields]
        self._schema = pa.schema([*metadata, pa.field(TOKENS_COLUMN, pa.int32()), *feature_schema(settings.features)])

    def __call__(self, part: Part, progress: Callable[[int], None] = lambda documents: None) -> PartRecord:
        """Write a part's files and its record.

        Raises:
            InputError: bad input, where it is not to be skipped. encode.EngineDifferenceError: the fast tokenizer is wrong.
            artifact.DiskFullError: no space. StoppedError: asked to stop.
        """
        start = time.perf_counter()
        self._encoded = 0
        files = PartFiles(self._folder, part.number)
        reader = PartReader(part.file, self._settings.reading, part.index, part.of)
        documents, dropped, rejects = 0, Counter[str](), []
        splits = self._settings.shares.splits
        ngrams = {split: np.zeros(NGRAM_BUCKETS, np.int64) for split in splits if "ngrams" in self._settings.features}
        with ExitStack() as stack:
            scorer = self._scorer.dtype if self._scorer else None
            writers = {split: _SplitWriter(files, split, self._dtype, self._schema, scorer, stack) for split in splits}
            for block in reader:
                if self._stop.is_set():
                    raise StoppedError
                self._write_block(block, writers, ngrams)
                documents += len(block.texts) + block.dropped.total()
                dropped.update(block.dropped)
                rejects += [{"line": item.line, "reason": item.reason, "excerpt": item.excerpt} for item in block.rejects]
                progress(documents)
            for writer in writers.values():
                writer.flush()
        for split, totals in ngrams.items():
            artifact.write_array(files.ngrams(split), totals)
        record = PartRecord(
            number=part.number,
            file=part.file.name,
            engine=self._engine.name,
            documents=documents,
            lines=reader.lines,
            dropped=dict(dropped),
            rejects=rejects,
            damage=reader.damage,
            input_digest=reader.digest,
            splits={split: writer.record() for split, writer in writers.items()},
            seconds=time.perf_counter() - start,
        )
        write_record(files, record)
        return record

    def _write_block(self, block: Block, writers: dict[str, _SplitWriter], ngrams: dict[str, npt.NDArray[np.int64]]) -> None:
        split_of = self._settings.shares.splits_of(block.texts)
        for number, split in enumerate(SPLITS):
            chosen = np.flatnonzero(split_of == number).tolist()
            if not chosen:
                continue
            whole = len(chosen) == len(block.texts)
            texts = block.texts if whole else [block.texts[row] for row in chosen]
            ids, offsets = self._encode(texts)
            columns = [pa.array(column if whole else [column[row] for row in chosen], pa.string()) for column in block.metadata]
            lengths = np.diff(offsets).astype(np.int32)
            columns.append(pa.array(lengths - (lengths > 0)))
            if self._settings.features:
                more, counts = feature_columns(self._settings.features, [text.encode() for text in texts], *_without_ends(ids, offsets))
                columns += more
                if counts is not None:
                    np.add.at(ngrams[split], counts.buckets, counts.counts)
            writers[split].write(ids, lengths, columns, self._scorer(texts, ids, offsets) if self._scorer else None)

    def _encode(self, texts: list[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        first, self._encoded = self._encoded, self._encoded + len(texts)
        if isinstance(self._engine, CheckedEngine):
            return self._engine.encode(texts, ends=True, first=first)
        return self._engine.encode(texts, ends=True)

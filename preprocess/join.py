"""Parts become corpora: every part's tokens and lengths are written at the places that the sizes of the parts before it give.

Parts are placed in any order and by any process. A part that is placed gives its disk space back at once, so joining needs the space
of the parts in work and no more. Where the file system can share blocks (XFS, Btrfs, NFS 4.2), no token is read again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, FileRecord
from mates.preprocess.indexed import IndexLayout
from mates.preprocess.parts import PartFiles, PartRecord, write_record
from mates.preprocess.scorer import COUNTS_NAME, STARTS_NAME, STRIDE, starts_of

TOKENS_NAME = "tokens"  # the prefix of .bin and .idx inside a corpus folder
METADATA_FOLDER = "documents"
COPY_BYTES = 1 << 24
NO_COPY_RANGE = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a part's documents begin in a corpus."""

    document: int
    sequence: int
    token: int
    scorer_sequence: int = 0
    scorer_token: int = 0


@dataclass(frozen=True, kw_only=True)
class JoinedTokens:
    """A pair of .bin and .idx that parts are placed in; ``prefix`` is its final name without the endings."""

    prefix: Path
    layout: IndexLayout
    tokens: int

    @property
    def bin(self) -> Path:
        """The token file's final name."""
        return self.prefix.with_name(f"{self.prefix.name}.bin")

    @property
    def idx(self) -> Path:
        """The index' final name."""
        return self.prefix.with_name(f"{self.prefix.name}.idx")

    @property
    def sizes(self) -> dict[Path, int]:
        """Bytes of both files."""
        return {self.bin: self.tokens * self.layout.dtype.itemsize, self.idx: self.layout.size}


@dataclass(frozen=True, kw_only=True)
class JoinedCorpus:
    """One corpus that parts are placed in: sizes are known, files have temporary names until all parts are in."""

    directory: Path
    main: JoinedTokens
    """The language model's tokens."""
    scorer: JoinedTokens | None
    """The encoder's, where they are made."""
    job: str
    """Names the work that the files belong to: that of other settings in the same folder must not be taken for it."""

    @property
    def counts(self) -> Path:
        """Final name of the file that says how many encoder tokens begin in each token."""
        return self.directory / COUNTS_NAME

    @property
    def starts(self) -> Path:
        """Final name of the file that says how many encoder tokens are before every 4,096th token."""
        return self.directory / STARTS_NAME

    @property
    def sizes(self) -> dict[Path, int]:
        """Bytes of all files by final name, the index last."""
        if self.scorer is None:
            return self.main.sizes
        return self.scorer.sizes | {self.counts: self.main.tokens, self.starts: 8 * -(-self.main.tokens // STRIDE)} | self.main.sizes

    def unfinished(self, path: Path) -> Path:
        """The name that a file has while parts are being placed."""
        return path.with_name(f".{path.name}.{self.job}.joining")

    def prepare(self) -> None:
        """Make the files at their full sizes."""
        (self.directory / METADATA_FOLDER).mkdir(parents=True, exist_ok=True)
        for path, size in self.sizes.items():
            with self.unfinished(path).open("wb") as handle:
                handle.truncate(size)

    def seal(self) -> dict[str, FileRecord]:
        """All parts are in: write the headers of indices. Returns the records of all files that are not made of sections, by name."""
        records = {}
        for tokens in [self.main, self.scorer] if self.scorer else [self.main]:
            path = self.unfinished(tokens.idx)
            with path.open("r+b") as handle:
                handle.write(tokens.layout.header())
                handle.flush()
                os.fsync(handle.fileno())
            records[tokens.idx.name] = FileRecord(bytes=path.stat().st_size, blake3=artifact.digest_of(path))
        if self.scorer:
            path = self.unfinished(self.starts)
            records[self.starts.name] = FileRecord(bytes=path.stat().st_size, blake3=artifact.digest_of(path))
        return records

    def holds(self, sealed: Mapping[str, FileRecord] | None) -> bool:
        """Whether the files that an earlier attempt placed parts in are still there.

        Args:
            sealed: records of the files by name, where the attempt came to giving them their names; under those, another's files
                may stand by now, so these are read and compared.
        """
        for path, size in self.sizes.items():
            if self.unfinished(path).is_file():
                if self.unfinished(path).stat().st_size != size:
                    return False
            elif sealed is None or not artifact.is_as_recorded(path, sealed[path.name]):
                return False
        return True

    def name(self, metadata: Mapping[str, tuple[Path, FileRecord]]) -> None:
        """Give the files their names, the index last.

        Args:
            metadata: by name in the corpus folder, where each Parquet file was written, and its record.

        Raises:
            ArtifactError: one is missing, or is not what was written.
        """
        for path in sorted((self.directory / METADATA_FOLDER).iterdir()):
            if f"{METADATA_FOLDER}/{path.name}" not in metadata:  # of an earlier corpus in this folder
                path.unlink()
        for name, (written, record) in metadata.items():
            if written.exists():
                written.replace(self.directory / name)
            elif not artifact.is_as_recorded(self.directory / name, record):
                raise ArtifactError(f"{self.directory / name}: not what was written; remove {written.parent} and run the step again")
        artifact.fsync_directory(self.directory / METADATA_FOLDER)
        for path in self.sizes:
            if self.unfinished(path).exists():
                self.unfinished(path).replace(path)
        artifact.fsync_directory(self.directory)


def places(records: Sequence[PartRecord], split: str) -> list[Place]:
    """Where each part begins in a corpus, in order of parts; one more entry gives the totals."""
    result = [Place(document=0, sequence=0, token=0)]
    for record in records:
        at, part = result[-1], record.splits[split]
        result.append(
            Place(
                document=at.document + part.documents,
                sequence=at.sequence + part.sequences,
                token=at.token + part.tokens,
                scorer_sequence=at.scorer_sequence + part.scorer_sequences,
                scorer_token=at.scorer_token + part.scorer_tokens,
            )
        )
    return result


def metadata_name(number: int, parts: int) -> str:
    """Path of a part's Parquet file in a corpus folder; names sort in document order."""
    return f"{METADATA_FOLDER}/{number:0{max(5, len(str(parts - 1)))}d}.parquet"


@dataclass(frozen=True, kw_only=True)
class Placement:
    """All that placing one part needs."""

    record: PartRecord
    at: Mapping[str, Place]


def place_part(folder: Path, corpora: Mapping[str, JoinedCorpus], placement: Placement) -> None:
    """Copy a part into the corpora, make that durable, note it, and remove the part's own files."""
    record = placement.record
    files = PartFiles(folder, record.number)
    for split, corpus in corpora.items():
        if record.splits[split].documents:
            _place(files, split, corpus, placement)
    write_record(files, replace(record, joined=True))
    remove_part(files, record)


def _place(files: PartFiles, split: str, corpus: JoinedCorpus, placement: Placement) -> None:
    at, part = placement.at[split], placement.record.splits[split]
    pairs = [(corpus.main, files.tokens(split), files.lengths(split), at.sequence, at.token, part.tokens)]
    if corpus.scorer:
        own = (files.scorer_tokens(split), files.scorer_lengths(split), at.scorer_sequence, at.scorer_token, part.scorer_tokens)
        pairs.append((corpus.scorer, *own))
    for tokens, source, lengths_file, first_sequence, first_token, count in pairs:
        itemsize = tokens.layout.dtype.itemsize
        lengths = np.fromfile(lengths_file, np.int32)
        if len(lengths) != part.documents:
            raise _wrong(lengths_file, files)
        _place_file(files, source, corpus.unfinished(tokens.bin), first_token * itemsize, count * itemsize)
        with _opened(corpus.unfinished(tokens.idx)) as target:
            pieces = tokens.layout.pieces(lengths, first_document=at.document, first_sequence=first_sequence, first_token=first_token)
            for offset, data in pieces:
                target.seek(offset)
                target.write(data)
            target.flush()
            os.fsync(target.fileno())
    if corpus.scorer and part.tokens:
        counts_file = files.scorer_counts(split)
        _place_file(files, counts_file, corpus.unfinished(corpus.counts), at.token, part.tokens)
        counts = np.memmap(counts_file, np.uint8, "r")
        first, starts = starts_of(counts, first_token=at.token, first_scorer_token=at.scorer_token)
        with _opened(corpus.unfinished(corpus.starts)) as target:
            target.seek(8 * first)
            target.write(starts.tobytes())
            target.flush()
            os.fsync(target.fileno())


def _opened(path: Path) -> IO[bytes]:
    """A file whose parts several processes write, maybe on several machines. For writing only: of a file that can also be read, NFS
    writes whole pages, and with them what this machine last knew of a neighbour's bytes."""
    return os.fdopen(os.open(path, os.O_WRONLY), "wb")


def _wrong(path: Path, files: PartFiles) -> ArtifactError:
    return ArtifactError(f"{path}: not what {files.record} says; remove {files.record} and run the step again")


def _place_file(files: PartFiles, source_file: Path, target_file: Path, offset: int, size: int) -> None:
    if source_file.stat().st_size != size:
        raise _wrong(source_file, files)
    with _opened(target_file) as target, source_file.open("rb") as source:
        copy_into(source, target, offset, size)
        os.fsync(target.fileno())


def remove_part(files: PartFiles, record: PartRecord) -> None:
    """Remove the files of a part that were copied."""
    for split in record.splits:
        for name in (files.tokens, files.lengths, files.scorer_tokens, files.scorer_lengths, files.scorer_counts):
            name(split).unlink(missing_ok=True)


def copy_into(source: Any, target: Any, offset: int, size: int) -> None:
    """Copy ``size`` bytes from the start of ``source`` to ``offset`` in ``target``, by the file system itself where it can."""
    done = 0
    try:
        while done < size:
            copied = os.copy_file_range(source.fileno(), target.fileno(), size - done, done, offset + done)
            if copied == 0:
                break
            done += copied
    except OSError as error:
        if error.errno not in NO_COPY_RANGE:
            raise
    source.seek(done)
    target.seek(offset + done)
    while done < size:
        data = source.read(min(COPY_BYTES, size - done))
        if not data:
            raise ArtifactError(f"{source.name}: ended {size - done} bytes early; run the step again")
        target.write(data)
        done += len(data)
    target.flush()

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


@dataclass(frozen=True, kw_only=True)
class JoinedCorpus:
    """One corpus that parts are placed in: sizes are known, files have temporary names until all parts are in."""

    directory: Path
    layout: IndexLayout
    tokens: int

    @property
    def bin(self) -> Path:
        """The token file's final name."""
        return self.directory / f"{TOKENS_NAME}.bin"

    @property
    def idx(self) -> Path:
        """The index' final name."""
        return self.directory / f"{TOKENS_NAME}.idx"

    @property
    def bin_bytes(self) -> int:
        """Size of the token file."""
        return self.tokens * self.layout.dtype.itemsize

    def unfinished(self, path: Path) -> Path:
        """The name that a file has while parts are being placed."""
        return path.with_name(f".{path.name}.joining")

    def prepare(self) -> None:
        """Make the files at their full sizes."""
        (self.directory / METADATA_FOLDER).mkdir(parents=True, exist_ok=True)
        for path, size in ((self.bin, self.bin_bytes), (self.idx, self.layout.size)):
            with self.unfinished(path).open("wb") as handle:
                handle.truncate(size)

    def holds(self, *, all_joined: bool) -> bool:
        """Whether the files that an earlier attempt placed parts in are still there: under their temporary names, or, where every
        part was in, perhaps under the final ones."""
        for path, size in ((self.bin, self.bin_bytes), (self.idx, self.layout.size)):
            names = (self.unfinished(path), path) if all_joined else (self.unfinished(path),)
            there = next((name for name in names if name.is_file()), None)
            if there is None or there.stat().st_size != size:
                return False
        return True

    def finish(self, metadata: Mapping[str, FileRecord]) -> None:
        """All parts are in: write the index' header and give the files their names. The index comes last."""
        for path in sorted((self.directory / METADATA_FOLDER).iterdir()):
            if f"{METADATA_FOLDER}/{path.name}" not in metadata:  # of an earlier corpus in this folder
                path.unlink()
        unfinished = self.unfinished(self.idx)
        if unfinished.exists():
            with unfinished.open("r+b") as handle:
                handle.write(self.layout.header())
                handle.flush()
                os.fsync(handle.fileno())
        for path in (self.bin, self.idx):
            if self.unfinished(path).exists():
                self.unfinished(path).replace(path)
        artifact.fsync_directory(self.directory)
        sizes = {self.bin: self.bin_bytes, self.idx: self.layout.size}
        for path, size in (sizes | {self.directory / name: record.bytes for name, record in metadata.items()}).items():
            if not path.is_file() or path.stat().st_size != size:
                raise ArtifactError(f"{path}: missing or not of {size} bytes after joining; remove {self.directory} and run the step again")


def places(records: Sequence[PartRecord], split: str) -> list[Place]:
    """Where each part begins in a corpus, in order of parts; one more entry gives the totals."""
    document = sequence = token = 0
    result = []
    for record in records:
        result.append(Place(document=document, sequence=sequence, token=token))
        document += record.splits[split].documents
        sequence += record.splits[split].sequences
        token += record.splits[split].tokens
    return [*result, Place(document=document, sequence=sequence, token=token)]


def metadata_name(number: int, parts: int) -> str:
    """Path of a part's Parquet file in a corpus folder; names sort in document order."""
    return f"{METADATA_FOLDER}/{number:0{max(5, len(str(parts - 1)))}d}.parquet"


@dataclass(frozen=True, kw_only=True)
class Placement:
    """All that placing one part needs."""

    record: PartRecord
    parts: int
    at: Mapping[str, Place]


class Joiner:
    """Places parts; one object a process."""

    def __init__(self, folder: Path, corpora: Mapping[str, JoinedCorpus], lock: IO[bytes] | None = None) -> None:
        self._folder, self._corpora = folder, corpora
        self._lock = lock  # held while this object lives

    def __call__(self, placement: Placement) -> PartRecord:
        """Copy a part into the corpora, make that durable, note it, and remove the part's own files."""
        record = placement.record
        files = PartFiles(self._folder, record.number)
        for split, corpus in self._corpora.items():
            if record.splits[split].documents:
                self._place(files, split, corpus, placement)
        joined = replace(record, joined=True)
        write_record(files, joined)
        remove_part(files, record)
        return joined

    def _place(self, files: PartFiles, split: str, corpus: JoinedCorpus, placement: Placement) -> None:
        at, part = placement.at[split], placement.record.splits[split]
        itemsize = corpus.layout.dtype.itemsize
        lengths = np.fromfile(files.lengths(split), np.int32)
        if len(lengths) != part.documents or files.tokens(split).stat().st_size != part.tokens * itemsize:
            raise ArtifactError(f"{files.tokens(split)}: not what {files.record} says; remove {files.record} and run the step again")
        with corpus.unfinished(corpus.bin).open("r+b") as target, files.tokens(split).open("rb") as source:
            copy_into(source, target, at.token * itemsize, part.tokens * itemsize)
            os.fsync(target.fileno())
        with corpus.unfinished(corpus.idx).open("r+b") as target:
            pieces = corpus.layout.pieces(lengths, first_document=at.document, first_sequence=at.sequence, first_token=at.token)
            for offset, data in pieces:
                target.seek(offset)
                target.write(data)
            target.flush()
            os.fsync(target.fileno())
        final = corpus.directory / metadata_name(placement.record.number, placement.parts)
        if files.metadata(split).exists():  # gone where an earlier attempt was killed right after this
            files.metadata(split).replace(final)
            artifact.fsync_directory(final.parent)


def remove_part(files: PartFiles, record: PartRecord) -> None:
    """Remove the files of a part, its record and n-gram counts excepted."""
    for split in record.splits:
        for path in (files.tokens(split), files.lengths(split), files.metadata(split)):
            path.unlink(missing_ok=True)


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

"""What is known of documents besides their tokens: the Parquet files of a corpus, by document number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mates.preprocess import artifact
from mates.preprocess.join import METADATA_FOLDER


def document_rows(directory: Path, numbers: Sequence[int], columns: Sequence[str] | None = None) -> pa.Table:
    """Rows of documents of a corpus, in the order asked for: url, timestamp, source and the features it was made with.

    The rows of all files together, in order of their names, are the documents in order; only files that hold one asked for are read.

    Args:
        directory: a corpus artifact.
        numbers: document numbers, from 0.
        columns: the columns wanted; all by default.

    Raises:
        ArtifactError: no corpus. IndexError: a number outside the corpus. TypeError, KeyError: numbers or columns that are none.
    """
    manifest = artifact.load(directory, "corpus")
    files = sorted(name for name in manifest.files if name.startswith(f"{METADATA_FOLDER}/"))
    counts = [pq.read_metadata(directory / name).num_rows for name in files]
    ends = np.cumsum(counts)
    wanted = np.asarray(numbers)
    if len(wanted) and wanted.dtype.kind not in "iu":
        raise TypeError(f"document numbers of dtype {wanted.dtype}; expected integers")
    wanted = wanted.astype(np.int64)
    known = pq.read_schema(directory / files[0]).names
    if unknown := [name for name in columns or () if name not in known]:
        raise KeyError(f"{directory}: no column {', '.join(unknown)}; found {', '.join(known)}")
    if len(wanted) and not (int(wanted.min()) >= 0 and int(wanted.max()) < int(ends[-1])):
        raise IndexError(f"{directory}: documents {wanted.min()} to {wanted.max()} of {ends[-1]}")
    file_of = np.searchsorted(ends, wanted, side="right")
    pieces, order = [], []
    for file in np.unique(file_of):
        places = np.flatnonzero(file_of == file)
        table = pq.read_table(directory / files[file], columns=None if columns is None else list(columns))
        pieces.append(table.take(pa.array(wanted[places] - (ends[file] - counts[file]))))
        order.append(places)
    if not pieces:
        schema = pq.read_schema(directory / files[0])
        return schema.empty_table() if columns is None else schema.empty_table().select(list(columns))
    return pa.concat_tables(pieces).take(pa.array(np.argsort(np.concatenate(order))))

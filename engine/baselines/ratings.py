"""A user's own numbers for the train samples: datamodel scores (DsDm), ratings (QuRating), or what else was computed elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mates.preprocess.artifact import ArtifactError

COLUMNS = ("sample_id", "score")
BLOCK = 1 << 22  # numbers looked through at a time

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Ratings:
    """Numbers of samples, as they are in a file."""

    path: Path
    values: npt.NDArray[np.floating[Any]]
    """[m], a memory map where the file is a ``.npy``."""
    ids: Ids | None
    """[m], the samples that they are of, ascending; None where they are of all samples in order."""
    samples: int
    """Of the train corpus."""

    def scores(self, ids: Ids) -> Floats:
        """Numbers of samples: [n] ids → [n] float64. ArtifactError where the file has none for one of them."""
        if self.ids is None:
            return np.asarray(self.values[ids], np.float64)
        places = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        missing = ids[self.ids[places] != ids]
        if len(missing):
            raise ArtifactError(
                f"{self.path}: no score for sample {missing[0]} nor for {len(missing) - 1} others of the {len(ids)} asked for, "
                f"but {len(self.ids)} of the {self.samples} train samples; add the missing ones"
            )
        return np.asarray(self.values[places], np.float64)


def read_ratings(path: Path, samples: int) -> Ratings:
    """Open a file of scores: ``.npy`` with a float for each train sample, or Parquet with columns ``sample_id`` and ``score``.

    Args:
        path: of the file. samples: of the train corpus.

    Raises:
        ArtifactError: no such file, or one that holds something else, or a score that is not finite.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; expected a .npy or .parquet file of scores")
    readers = {".npy": _read_npy, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise ArtifactError(f"{path}: the name ends in {path.suffix!r}, expected .npy or .parquet; rename or convert it")
    return readers[path.suffix](path, samples)


def _read_npy(path: Path, samples: int) -> Ratings:
    wanted = f"expected {samples} floats, one for each train sample in order; save them by numpy.save"
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ArtifactError(f"{path}: not a readable .npy file of numbers ({error}), {wanted}") from error
    if not isinstance(values, np.ndarray):
        raise ArtifactError(f"{path}: an archive of several arrays, {wanted}")
    if values.dtype.kind != "f" or values.shape != (samples,):
        raise ArtifactError(f"{path}: {values.dtype} of shape {values.shape}, {wanted}")
    _refuse_unfinite(path, values)
    return Ratings(path, values, None, samples)


def _read_parquet(path: Path, samples: int) -> Ratings:
    wanted = "expected the columns sample_id (integers) and score (floats)"
    try:
        schema = pq.read_schema(path)
        missing = [name for name in COLUMNS if name not in schema.names]
        if missing:
            raise ArtifactError(f"{path}: no column {' or '.join(missing)} among {', '.join(schema.names)}, {wanted}; rename or add them")
        table = pq.read_table(path, columns=list(COLUMNS), memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise ArtifactError(f"{path}: not a readable Parquet file ({error}), {wanted}; write it again") from error
    types = [table.schema.field(name).type for name in COLUMNS]
    if not (pa.types.is_integer(types[0]) and pa.types.is_floating(types[1])):
        raise ArtifactError(f"{path}: sample_id is {types[0]} and score is {types[1]}, {wanted}; convert them")
    if not len(table):
        raise ArtifactError(f"{path}: no rows, {wanted} of the train samples; write it again")
    for name in COLUMNS:
        if table[name].null_count:
            row = int(np.flatnonzero(table[name].is_null().to_numpy())[0])
            raise ArtifactError(f"{path}: no {name} in row {row} (of {table[name].null_count} such rows), {wanted}; leave such rows out")
    raw, values = table["sample_id"].to_numpy(), table["score"].to_numpy()
    outside = np.flatnonzero((raw < 0) | (raw >= samples))
    if len(outside):
        raise ArtifactError(
            f"{path}: sample_id {raw[outside[0]]} in row {outside[0]} (of {len(outside)} such rows), expected 0 to {samples - 1}; "
            "sample ids are those of the train corpus of this run"
        )
    _refuse_unfinite(path, values)
    order = np.argsort(raw, kind="stable")
    ids = raw[order].astype(np.int64)
    again = np.flatnonzero(ids[1:] == ids[:-1])
    if len(again):
        rows = order[again[0] : again[0] + 2]
        raise ArtifactError(f"{path}: sample_id {ids[again[0]]} in rows {rows[0]} and {rows[1]}, expected each once; leave one out")
    return Ratings(path, values[order], ids, samples)


def _refuse_unfinite(path: Path, values: npt.NDArray[np.floating[Any]]) -> None:
    for start in range(0, len(values), BLOCK):
        bad = np.flatnonzero(~np.isfinite(values[start : start + BLOCK]))
        if len(bad):
            row = start + int(bad[0])
            raise ArtifactError(
                f"{path}: score {values[row]} in row {row}, expected finite numbers; leave the sample out or give it a number"
            )

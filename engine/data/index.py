"""The selection index: which samples a stage trains on, in training order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, Manifest

INDEX_FILE = "index.npy"


@dataclass(frozen=True)
class SelectionIndex:
    """``ids`` [n] int64, sample ids of the train corpus in training order."""

    manifest: Manifest
    ids: npt.NDArray[np.int64]


def write_ids(directory: Path, pieces: Iterable[npt.NDArray[np.int64]], count: int) -> None:
    """Write the file of an index' ids, in training order, from pieces that hold ``count`` together."""
    with artifact.atomic_file(directory / INDEX_FILE) as handle:
        np.lib.format.write_array_header_1_0(handle, {"descr": "<i8", "fortran_order": False, "shape": (count,)})
        written = 0
        for piece in pieces:
            handle.write(np.ascontiguousarray(piece, "<i8").data)
            written += len(piece)
        assert written == count, f"{written} ids, {count} were announced"


def read_index(directory: Path, corpus_fingerprint: str) -> SelectionIndex:
    """Open an index for a corpus.

    Raises:
        ArtifactError: damaged, of another dtype, or made for another corpus.
    """
    manifest = artifact.load(directory, "selection index")
    made_for = manifest.inputs["corpus"]
    if made_for != corpus_fingerprint:
        raise ArtifactError(
            f"{directory}: selected from corpus {made_for[:12]}, but the train corpus is {corpus_fingerprint[:12]}; "
            "restore that corpus, or remove the folder and run `mates select` again"
        )
    return SelectionIndex(manifest, load_array(directory / INDEX_FILE, np.dtype(np.int64), ndim=1))


def load_array(path: Path, dtype: np.dtype[Any], ndim: int) -> npt.NDArray[Any]:
    """Map a ``.npy`` file, never unpickling. ArtifactError for another dtype or number of axes, or a file that is no ``.npy``."""
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ArtifactError(f"{path}: not a readable .npy file ({error})") from error
    if not isinstance(values, np.ndarray):
        raise ArtifactError(f"{path}: not a readable .npy file (an archive of several)")
    if values.dtype != dtype or values.ndim != ndim:
        raise ArtifactError(f"{path}: {values.dtype} with {values.ndim} axes, expected {dtype} with {ndim}")
    return np.asarray(values) if values.size == 0 else values

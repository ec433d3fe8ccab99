"""Samples: fixed-length windows of a corpus' token stream, read straight from the memory map."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, Manifest
from mates.preprocess.corpus import TOKENS_NAME
from mates.preprocess.indexed import Indexed, open_indexed


def sample_count(tokens: int, length: int) -> int:
    """Samples of ``length`` tokens in a stream of ``tokens``: floor((tokens − 1) / length), the last token being only a label."""
    return max(0, (tokens - 1) // length)


@dataclass(frozen=True)
class Corpus:
    """A corpus cut into samples: sample i is tokens [i·L, i·L + L + 1) of the stream."""

    directory: Path
    manifest: Manifest
    indexed: Indexed
    length: int
    """L, the tokens of a sample."""

    @property
    def samples(self) -> int:
        """Number of samples."""
        return sample_count(len(self.indexed.tokens), self.length)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the corpus artifact."""
        return self.manifest.fingerprint

    def windows(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens and next tokens of samples: [n] ids → [n, L + 1] int64. IndexError for an id outside the corpus."""
        return self.stored(ids).astype(np.int64)

    def stored(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.integer[Any]]:
        """The same in the dtype of the file, copied once and no more."""
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= self.samples):
            raise IndexError(f"{self.directory}: sample ids {int(ids.min())} to {int(ids.max())} of {self.samples}")
        tokens = np.asarray(self.indexed.tokens)
        # samples overlap by a token; as rows of such a view they are gathered without a step of Python for each
        rows = np.lib.stride_tricks.as_strided(
            tokens, (self.samples, self.length + 1), (self.length * tokens.itemsize, tokens.itemsize), writeable=False
        )
        return rows[ids]

    def document_of(self, sample: int) -> int:
        """Number of the document that a sample's first token belongs to. IndexError for an id outside the corpus."""
        if not 0 <= sample < self.samples:
            raise IndexError(f"{self.directory}: sample id {sample} of {self.samples}")
        offset = sample * self.length * self.indexed.tokens.dtype.itemsize
        sequence = int(np.searchsorted(self.indexed.pointers, offset, side="right")) - 1
        return int(np.searchsorted(self.indexed.boundaries, sequence, side="right")) - 1

    def info(self, name: str) -> Any:
        """A figure of the manifest."""
        return self.manifest.info[name]


def open_corpus(directory: Path, length: int, *, verify: bool = False) -> Corpus:
    """Open a corpus artifact, cut into samples of ``length`` tokens.

    Raises:
        ArtifactError: no corpus, a damaged one, or one too short for a single sample.
    """
    manifest = artifact.verify(directory, "corpus") if verify else artifact.load(directory, "corpus")
    corpus = Corpus(directory, manifest, open_indexed(directory / TOKENS_NAME), length)
    if corpus.indexed.tokens.dtype.kind not in "iu":  # DeepSpeed's uint32 has Megatron's code for float32
        raise ArtifactError(f"{directory}: tokens of dtype {corpus.indexed.tokens.dtype}, expected integers")
    if corpus.samples == 0:
        raise ArtifactError(f"{directory}: {len(corpus.indexed.tokens)} tokens, too few for one sample of {length} + 1")
    return corpus

"""Samples: fixed-length windows of a corpus' token stream, read straight from the memory map."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mates.engine.data.union import part_directories
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, Manifest
from mates.preprocess.corpus import TOKENS_NAME
from mates.preprocess.indexed import Indexed, open_indexed
from mates.preprocess.scorer import ScorerTokens, open_scorer_tokens


def sample_count(tokens: int, length: int) -> int:
    """Samples of ``length`` tokens in a stream of ``tokens``: floor((tokens − 1) / length), the last token being only a label."""
    return max(0, (tokens - 1) // length)


@dataclass(frozen=True)
class Corpus:
    """A corpus cut into samples: sample i is tokens [i·L, i·L + L + 1) of the stream.

    Where it is a union, samples are numbered through its parts in order, and none reaches over the end of a part.
    """

    directory: Path
    manifest: Manifest
    parts: tuple[tuple[Path, Indexed], ...]
    """Folder and tokens of each part; one where it is no union."""
    length: int
    """L, the tokens of a sample."""

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """[parts + 1], the first sample of each part, and the number of all."""
        return np.cumsum([0, *(sample_count(len(indexed.tokens), self.length) for _, indexed in self.parts)])

    @property
    def samples(self) -> int:
        """Number of samples."""
        return int(self.starts[-1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the tokens in the files."""
        return self.parts[0][1].tokens.dtype

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the corpus artifact."""
        return self.manifest.fingerprint

    def windows(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens and next tokens of samples: [n] ids → [n, L + 1] int64. IndexError for an id outside the corpus."""
        return self.stored(ids).astype(np.int64)

    def stored(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.integer[Any]]:
        """The same in the dtype of the file, copied once and no more."""
        self._check(ids)
        if len(self._rows) == 1:
            return self._rows[0][ids]
        result = np.empty((len(ids), self.length + 1), self.dtype)
        for part, own, numbers in self._by_part(ids):
            result[own] = self._rows[part][numbers]
        return result

    def _by_part(self, ids: npt.NDArray[np.int64]) -> Iterator[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """For each part that some ids lie in its number, where these ids stand [m], and the samples' numbers in it [m]."""
        part_of = np.searchsorted(self.starts, ids, side="right") - 1
        for part in np.unique(part_of).tolist():
            own = np.flatnonzero(part_of == part)
            yield part, own, ids[own] - self.starts[part]

    @cached_property
    def _rows(self) -> list[npt.NDArray[np.integer[Any]]]:
        """Samples of each part as rows of a view, which overlap by a token: gathered without a step of Python for each."""
        rows = []
        for part, (_, indexed) in enumerate(self.parts):
            tokens, samples = np.asarray(indexed.tokens), int(self.starts[part + 1] - self.starts[part])
            strides = (self.length * tokens.itemsize, tokens.itemsize)
            rows.append(np.lib.stride_tricks.as_strided(tokens, (samples, self.length + 1), strides, writeable=False))
        return rows

    @property
    def has_scorer_tokens(self) -> bool:
        """Whether each part holds an encoder's tokens (``corpus.scorer_tokenizer``)."""
        return all("scorer" in manifest.info for manifest in self._part_manifests)

    @cached_property
    def scorer_hash(self) -> str:
        """:func:`mates.preprocess.tokenizer.encoding_hash` of the tokenizer that made the encoder's tokens.

        Raises:
            ArtifactError: a part has no such tokens, or another tokenizer's than the first one's.
        """
        found = []
        for (directory, _), manifest in zip(self.parts, self._part_manifests, strict=True):
            if "scorer" not in manifest.info:
                raise ArtifactError(f"{directory}: no encoder tokens; make this corpus with corpus.scorer_tokenizer")
            found.append(manifest.info["scorer"])
            if found[-1]["hash"] != found[0]["hash"]:
                raise ArtifactError(
                    f"{directory}: encoder tokens of {found[-1]['tokenizer']} ({found[-1]['hash'][:16]}…), in {self.parts[0][0]} of "
                    f"{found[0]['tokenizer']} ({found[0]['hash'][:16]}…); make both with one corpus.scorer_tokenizer"
                )
        return str(found[0]["hash"])

    def scorer_tokens(self, ids: npt.NDArray[np.int64], limit: int) -> list[npt.NDArray[np.integer[Any]]]:
        """For each sample of ``ids`` the encoder tokens that begin in the text of its tokens [i·L, i·L + L), at most ``limit`` of them.

        They are views of the file, without special tokens. IndexError for an id outside the corpus; ArtifactError as :attr:`scorer_hash`.
        """
        self._check(ids)
        result: list[npt.NDArray[np.integer[Any]]] = [np.zeros(0, np.int32)] * len(ids)
        for part, own, numbers in self._by_part(ids):
            windows = self._scorers[part].windows(numbers * self.length, self.length, limit)
            for place, window in zip(own.tolist(), windows, strict=True):
                result[place] = window
        return result

    @cached_property
    def _part_manifests(self) -> list[Manifest]:
        return [artifact.load(directory, "corpus") for directory, _ in self.parts]

    @cached_property
    def _scorers(self) -> list[ScorerTokens]:
        assert self.scorer_hash
        return [open_scorer_tokens(directory, len(indexed.tokens)) for directory, indexed in self.parts]

    def _check(self, ids: npt.NDArray[np.int64]) -> None:
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= self.samples):
            raise IndexError(f"{self.directory}: sample ids {int(ids.min())} to {int(ids.max())} of {self.samples}")

    def document_of(self, sample: int) -> tuple[Path, int]:
        """The part, by its folder, and the number in it of the document that a sample's first token belongs to.

        IndexError for an id outside the corpus.
        """
        if not 0 <= sample < self.samples:
            raise IndexError(f"{self.directory}: sample id {sample} of {self.samples}")
        parts, documents = self.documents_of(np.array([sample]))
        return self.parts[parts[0]][0], int(documents[0])

    def documents_of(self, ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The same for samples [n] of the corpus: parts [n], by number, and documents [n]."""
        parts, documents = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64)
        for part, own, numbers in self._by_part(ids):
            indexed = self.parts[part][1]
            offsets = numbers * self.length * indexed.tokens.dtype.itemsize
            sequences = np.searchsorted(indexed.pointers, offsets, side="right") - 1
            parts[own] = part
            documents[own] = np.searchsorted(indexed.boundaries, sequences, side="right") - 1
        return parts, documents

    def documents_of_targets(self, ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """For each token that samples [n] predict the document that it belongs to: parts [n], by number, and documents [n, L]."""
        self._check(ids)
        parts, documents = np.empty(len(ids), np.int64), np.empty((len(ids), self.length), np.int64)
        for part, own, numbers in self._by_part(ids):
            indexed = self.parts[part][1]
            places = (numbers * self.length)[:, None] + np.arange(1, self.length + 1)
            sequences = np.searchsorted(indexed.pointers, places * indexed.tokens.dtype.itemsize, side="right") - 1
            parts[own] = part
            documents[own] = np.searchsorted(indexed.boundaries, sequences, side="right") - 1
        return parts, documents

    def info(self, name: str) -> Any:
        """A figure of the manifest."""
        return self.manifest.info[name]


def open_corpus(directory: Path, length: int, *, verify: bool = False) -> Corpus:
    """Open a corpus artifact, cut into samples of ``length`` tokens.

    Raises:
        ArtifactError: no corpus, a damaged one, or one too short for a single sample.
    """
    manifest = artifact.verify(directory, "corpus") if verify else artifact.load(directory, "corpus")
    folders = part_directories(directory, manifest)
    if verify and folders != [directory]:
        for folder in folders:
            artifact.verify(folder, "corpus")
    corpus = Corpus(directory, manifest, tuple((folder, open_indexed(folder / TOKENS_NAME)) for folder in folders), length)
    if corpus.dtype.kind not in "iu":  # DeepSpeed's uint32 has Megatron's code for float32
        raise ArtifactError(f"{directory}: tokens of dtype {corpus.dtype}, expected integers")
    if corpus.samples == 0:
        tokens = sum(len(indexed.tokens) for _, indexed in corpus.parts)
        raise ArtifactError(f"{directory}: {tokens} tokens, too few for one sample of {length} + 1")
    return corpus

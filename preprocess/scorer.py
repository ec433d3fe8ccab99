"""The influence model's tokens of every document, made in the pass that makes the language model's, and where they lie among these.

An encoder has a tokenizer of its own. For N tokens of the stream a corpus can hold, beside ``tokens.bin`` and ``tokens.idx``::

    scorer.bin, scorer.idx  encoder tokens without special ones, one document for each document (:mod:`.indexed`)
    scorer_counts.bin       uint8 [N], encoder tokens that begin in each of the language model's tokens
    scorer_starts.bin       int64 [ceil(N / 4096)], little-endian: encoder tokens before token 4096·j of the stream

so that the encoder tokens of a window of any length are found by one look-up and a sum of some thousand bytes.

An encoder token begins in the first token of its document that ends behind the first byte of its first character, and in the last one
where none does. So tokens of no width, the later pieces of a character and the end of a document have none, and those of text that no
token covers are the next one's. A document without tokens has no encoder tokens either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mates.preprocess.artifact import ArtifactError
from mates.preprocess.encode import Ids, Offsets
from mates.preprocess.indexed import Tokens, open_indexed, token_dtype
from mates.preprocess.spans import LibraryStarts, TextBytes, TokenEnds, WordStarts
from mates.preprocess.tokenizer import Tokenizer, encoder_files_hash, encoding_hash, load_encoder_tokenizer

if TYPE_CHECKING:
    import tokenizers

SCORER_NAME = "scorer"  # the prefix of .bin and .idx inside a corpus folder
COUNTS_NAME = "scorer_counts.bin"
STARTS_NAME = "scorer_starts.bin"
STRIDE = 4096  # tokens from one start to the next
MOST = np.iinfo(np.uint8).max  # encoder tokens that begin in a token
BATCH_CHARACTERS = 1 << 19  # whose tokens are in memory at a time

Counts = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class ScorerTokenizer:
    """An encoder's tokenizer in a form that passes between processes."""

    origin: str
    """Where it came from."""
    files: str
    """BLAKE3 of its files."""
    state: str = field(repr=False)
    """The tokenizer as the library writes it."""

    def open(self) -> tokenizers.Tokenizer:
        """The tokenizer; special tokens in text are ordinary text."""
        import tokenizers

        library = tokenizers.Tokenizer.from_str(self.state)
        library.encode_special_tokens = True
        return library

    @cached_property
    def info(self) -> dict[str, Any]:
        """For manifests. ``hash`` is :func:`.tokenizer.encoding_hash`."""
        library = self.open()
        size = max(library.get_vocab(with_added_tokens=True).values()) + 1
        return {"tokenizer": self.origin, "hash": encoding_hash(library), "vocab_size": size, "dtype": str(token_dtype(size))}

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored ids."""
        return token_dtype(self.info["vocab_size"])


def read_scorer_tokenizer(path: Path) -> ScorerTokenizer:
    """Read a folder or file of an encoder's tokenizer. TokenizerError names ``corpus.scorer_tokenizer``."""
    library = load_encoder_tokenizer(path)
    return ScorerTokenizer(origin=str(path), files=encoder_files_hash(path), state=library.to_str())


# --- making --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ScorerBlock:
    """Encoder tokens of D documents that have N tokens."""

    ids: Ids
    """[M], of all documents one after the other."""
    lengths: npt.NDArray[np.int32]
    """[D], those of each document."""
    counts: Counts
    """[N], those that begin in each token; their sum is M."""


class Scorer:
    """Makes the encoder's tokens of texts that the language model's tokenizer has encoded; ``engine`` names what encoded them."""

    def __init__(self, encoder: ScorerTokenizer, tokenizer: Tokenizer, engine: str) -> None:
        self.dtype = encoder.dtype
        library = encoder.open()
        self._encode = WordStarts(library) if WordStarts.serves(library) else LibraryStarts(library)
        self._ends = TokenEnds(tokenizer, engine)

    def __call__(self, texts: Sequence[str], ids: Ids, offsets: Offsets) -> ScorerBlock:
        """Encode texts; arguments and errors are those of :class:`TokenEnds`. Nothing is cut."""
        blocks = [
            self._align(texts[first:last], ids[offsets[first] : offsets[last]], offsets[first : last + 1] - offsets[first])
            for first, last in _batches(texts)
        ]
        return ScorerBlock(
            ids=np.concatenate([block.ids for block in blocks]),
            lengths=np.concatenate([block.lengths for block in blocks]),
            counts=np.concatenate([block.counts for block in blocks]),
        )

    def _align(self, texts: Sequence[str], ids: Ids, offsets: Offsets) -> ScorerBlock:
        places, has = TextBytes(texts), np.diff(offsets) > 0
        found, starts, lengths = self._encode([text if kept else "" for text, kept in zip(texts, has.tolist(), strict=True)])
        of_text = np.repeat(np.arange(len(texts)), lengths)
        begins = np.maximum.accumulate(places.of(of_text, starts))  # where a normalizer turned characters round, each begins once
        ends = self._ends(texts, ids, offsets, places)
        last = offsets[1:] - 2  # before the end-of-document token
        owners = np.minimum(np.searchsorted(ends, begins, side="right"), last[of_text])
        counts = np.bincount(owners, minlength=len(ids))
        if len(counts) and counts.max() > MOST:
            kept = _spread(counts, offsets)
            found = found[_firsts(lengths, kept)]
            lengths = kept
        return ScorerBlock(ids=found, lengths=lengths.astype(np.int32), counts=counts.astype(np.uint8))


def _batches(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Runs of texts, by their first and the end: of so many characters, or a single text."""
    first = size = 0
    for number, text in enumerate(texts):
        if size and size + len(text) > BATCH_CHARACTERS:
            yield first, number
            first, size = number, 0
        size += len(text)
    yield first, len(texts)


def _spread(counts: npt.NDArray[np.int64], offsets: Offsets) -> npt.NDArray[np.int64]:
    """Give what a count cannot hold to the tokens behind it, so that the order stays; what the document's last ones have no room for is
    left out. It happens where a token stands for any unknown word, or a normalizer drops text.

    ``counts`` [N] is changed; returns the sum of each document's.
    """
    totals = np.zeros(len(offsets) - 1, np.int64)
    for number, (first, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        own = counts[first : max(first, end - 1)]
        if len(own) and own.max() > MOST:
            room = MOST * np.arange(len(own) + 1)
            upto = np.minimum.accumulate(np.append(0, np.cumsum(own)) - room) + room
            own[:] = np.diff(upto)
        totals[number] = own.sum()
    return totals


def _firsts(lengths: npt.NDArray[np.int64], kept: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which of the entries of documents of these lengths are among the first ``kept`` of theirs."""
    place = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return place < np.repeat(kept, lengths)


def starts_of(counts: Counts, *, first_token: int, first_scorer_token: int) -> tuple[int, npt.NDArray[np.int64]]:
    """What a run of tokens adds to the starts: the number of its first one, and these.

    Args:
        counts: [n], of the run. first_token: tokens of the stream before it. first_scorer_token: encoder tokens before it.
    """
    first = -first_token % STRIDE
    places = np.arange(first, len(counts), STRIDE)
    if len(places) == 0:
        return 0, places
    edges = places if first == 0 else np.append(0, places)
    sums = np.cumsum(np.add.reduceat(counts, edges, dtype=np.int64))
    return (first_token + first) // STRIDE, first_scorer_token + np.append(0, sums)[: len(edges)][-len(places) :]


# --- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ScorerTokens:
    """A corpus' encoder tokens, memory-mapped."""

    tokens: Tokens
    """[M]"""
    counts: Counts
    """[N], those that begin in each of the language model's tokens."""
    starts: npt.NDArray[np.int64]
    """[ceil(N / 4096)], those before token 4096·j."""

    def windows(self, firsts: npt.NDArray[np.int64], length: int, limit: int) -> list[Tokens]:
        """Encoder tokens that begin in tokens [f, f + length) of the stream for each f of ``firsts``, at most ``limit``: views."""
        tokens, counts, starts = np.asarray(self.tokens), np.asarray(self.counts), np.asarray(self.starts)
        total, windows = np.add.reduce, []
        for first in firsts.tolist():
            block = first // STRIDE
            start = int(starts[block]) + int(total(counts[block * STRIDE : first], dtype=np.uint32))
            count = int(total(counts[first : first + length], dtype=np.uint32))
            windows.append(tokens[start : start + min(count, limit)])
        return windows


def open_scorer_tokens(directory: Path, tokens: int) -> ScorerTokens:
    """Map the encoder tokens of a corpus of ``tokens`` tokens.

    Raises:
        ArtifactError: a missing file, or one that does not belong to the others.
    """
    counts, starts = directory / COUNTS_NAME, directory / STARTS_NAME
    for path, size in ((counts, tokens), (starts, 8 * -(-tokens // STRIDE))):
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise ArtifactError(f"{path}: {found} bytes, expected {size} for {tokens} tokens; run `mates preprocess` anew")
    indexed = open_indexed(directory / SCORER_NAME)
    if tokens == 0:  # an empty file cannot be mapped
        return ScorerTokens(indexed.tokens, np.zeros(0, np.uint8), np.zeros(0, np.int64))
    return ScorerTokens(indexed.tokens, np.memmap(counts, np.uint8, "r"), np.memmap(starts, np.int64, "r"))

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

import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mates.preprocess.artifact import ArtifactError
from mates.preprocess.encode import EXCERPT_LENGTH, EngineDifferenceError, Ids, Offsets
from mates.preprocess.indexed import Tokens, open_indexed, token_dtype
from mates.preprocess.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerError,
    encoder_files_hash,
    encoding_hash,
    load_encoder_tokenizer,
    without_additions,
)

if TYPE_CHECKING:
    import tokenizers

SCORER_NAME = "scorer"  # the prefix of .bin and .idx inside a corpus folder
COUNTS_NAME = "scorer_counts.bin"
STARTS_NAME = "scorer_starts.bin"
STRIDE = 4096  # tokens from one start to the next
MOST = np.iinfo(np.uint8).max  # encoder tokens that begin in a token
BATCH_CHARACTERS = 1 << 20  # the library's results take a hundred times the memory of their text

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


# --- where tokens lie in text --------------------------------------------------------------------------------------


class _Bytes:
    """Places in D texts, one after the other, in bytes of UTF-8."""

    def __init__(self, texts: Sequence[str]) -> None:
        data = np.frombuffer("".join(texts).encode(), np.uint8)
        self._of_character = np.append(np.flatnonzero((data & 0xC0) != 0x80), len(data))
        self._first_character = np.cumsum([0, *map(len, texts)])
        self.bounds: Offsets = self._of_character[self._first_character]
        """[D + 1], where each text begins, and the end of the last."""

    def of(self, texts: npt.NDArray[np.int64] | int, characters: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where characters of texts begin, both given by number; one more than the last is the text's end."""
        return self._of_character[self._first_character[texts] + characters]


def token_widths(tokenizer: Tokenizer) -> npt.NDArray[np.int64] | None:
    """Bytes of text that each id stands for, [vocabulary], in byte-level BPE of text in NFC; None for another kind of tokenizer.

    An added token that takes the spaces around it has no width of its own: its entry is below any sum of others.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return None
    state = json.loads(tokenizer.library.to_str())
    if (state["decoder"] or {}).get("type") != "ByteLevel" or state["normalizer"] not in (None, {"type": "NFC"}):
        return None
    if '"add_prefix_space": true' in json.dumps(state["pre_tokenizer"]):
        return None
    widths = np.zeros(tokenizer.vocab_size, np.int64)
    for name, number in tokenizer.library.get_vocab(with_added_tokens=False).items():
        widths[number] = len(name)  # a letter for each byte
    for number, token in tokenizer.library.get_added_tokens_decoder().items():
        widths[number] = -(2**40) if token.lstrip or token.rstrip else len(token.content.encode())
    return widths


class TokenEnds:
    """Where the language model's tokens end in their texts.

    By the ids alone where these are byte-level BPE whose tokens are seen to add up to the text, else by the library's own offsets.

    Raises:
        TokenizerError: the library gives none.
    """

    def __init__(self, tokenizer: Tokenizer, engine: str) -> None:
        self._engine, self._widths = engine, token_widths(tokenizer)
        self._library: _HuggingFaceEnds | _SentencePieceEnds
        if isinstance(tokenizer, HuggingFaceTokenizer):
            self._library, self._composes = _HuggingFaceEnds(tokenizer), tokenizer.library.normalizer is not None
        else:
            assert isinstance(tokenizer, SentencePieceTokenizer)
            self._library, self._composes = _SentencePieceEnds(tokenizer), False

    def __call__(self, texts: Sequence[str], ids: Ids, offsets: Offsets, places: _Bytes) -> npt.NDArray[np.int64]:
        """The byte behind each token, [N], never falling; the end-of-document token's is the text's end.

        Args:
            texts: D of them. ids: [N], their tokens, each text's followed by the end-of-document id where it has any.
            offsets: [D + 1], where each text's begin. places: of the texts.

        Raises:
            EngineDifferenceError: the library gives other ids.
        """
        lengths = np.diff(offsets)
        ends, fit = np.zeros(len(ids), np.int64), lengths == 0
        if self._widths is not None:
            widths = self._widths[ids]
            widths[offsets[1:][lengths > 0] - 1] = 0
            np.cumsum(widths, out=ends)
            before = np.append(0, ends)[offsets]
            fit |= np.diff(before) == np.diff(places.bounds)
            if self._composes:
                fit &= np.array([text.isascii() or unicodedata.is_normalized("NFC", text) for text in texts], bool)
            ends += np.repeat(places.bounds[:-1] - before[:-1], lengths)
        for number in np.flatnonzero(~fit).tolist():
            own = slice(offsets[number], offsets[number + 1])
            found, text_ends = self._library(texts[number])
            expected = ids[own][:-1].tolist()
            if found != expected:
                raise EngineDifferenceError(self._engine, texts[number][:EXCERPT_LENGTH], expected[:4], found[:4])
            ends[own] = places.bounds[number + 1]
            at = places.of(number, text_ends) if self._library.unit == "characters" else places.bounds[number] + text_ends
            ends[own][:-1] = np.maximum.accumulate(at)
        return ends


class _HuggingFaceEnds:
    unit = "characters"

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self._library = without_additions(tokenizer.library)

    def __call__(self, text: str) -> tuple[list[int], npt.NDArray[np.int64]]:
        found = self._library.encode(text, add_special_tokens=False)
        return found.ids, np.fromiter(map(itemgetter(1), found.offsets), np.int64)


class _SentencePieceEnds:
    unit = "bytes"

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        self._library = tokenizer.library
        try:
            self("a")
        except Exception as error:  # without protobuf, or in a version that has no such result
            raise TokenizerError(
                f"corpus.scorer_tokenizer: the language model's tokenizer is a sentencepiece model, and this installation of sentencepiece "
                f"does not say where its tokens lie in a text ({error}); install protobuf and sentencepiece 0.2.3, or set null"
            ) from error

    def __call__(self, text: str) -> tuple[list[int], npt.NDArray[np.int64]]:
        pieces = self._library.encode(text, return_type="proto").pieces
        return [piece.id for piece in pieces], np.array([piece.end for piece in pieces], np.int64)


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
        self._library, self._ends = encoder.open(), TokenEnds(tokenizer, engine)

    def __call__(self, texts: Sequence[str], ids: Ids, offsets: Offsets) -> ScorerBlock:
        """Encode texts; arguments and errors are those of :class:`TokenEnds`. Nothing is cut."""
        places, has = _Bytes(texts), np.diff(offsets) > 0
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

    def _encode(self, texts: Sequence[str]) -> tuple[Ids, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Ids [M] of all texts, the character that each begins at in its text [M], and the number of each text's [D]."""
        ids, starts, lengths = [], [], []
        for batch in _batches(texts):
            found = self._library.encode_batch(batch, add_special_tokens=False)
            ids.append(np.fromiter(chain.from_iterable(item.ids for item in found), np.uint32))
            starts.append(np.fromiter(map(itemgetter(0), chain.from_iterable(item.offsets for item in found)), np.int64))
            lengths.append(np.array([len(item) for item in found], np.int64))
        return np.concatenate(ids), np.concatenate(starts), np.concatenate(lengths)


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        if size + len(text) > BATCH_CHARACTERS and batch:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    yield batch


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

"""Where tokens lie in their texts: where the language model's end, and where an encoder's begin."""

from __future__ import annotations

import json
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain, count, islice
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mates.preprocess.encode import EXCERPT_LENGTH, IDS_SHOWN, EngineDifferenceError, Ids, Offsets
from mates.preprocess.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, TokenizerError, without_additions

if TYPE_CHECKING:
    import tokenizers

KEPT_CHARACTERS = 1 << 21  # of words, which take some twenty times the memory
WORDS_TOGETHER = 1_000
LINES_TOGETHER = 64  # the library's results take a hundred times the memory of their text

Encoded = tuple[Ids, Offsets, Offsets]
"""Ids [M] of D texts one after the other, the character of its text that each begins at [M], and the number of each text's [D]."""


# --- the language model's tokens -----------------------------------------------------------------------------------


class TextBytes:
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

    def __call__(self, texts: Sequence[str], ids: Ids, offsets: Offsets, places: TextBytes) -> npt.NDArray[np.int64]:
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
            expected, text_ends = self._library(texts[number])
            found = ids[own][:-1].tolist()
            if found != expected:
                place = next((place for place, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), -1)
                shown = slice(place, place + IDS_SHOWN) if place >= 0 else slice(-IDS_SHOWN, None)
                raise EngineDifferenceError(self._engine, texts[number][:EXCERPT_LENGTH], found[shown], expected[shown])
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


# --- an encoder's tokens -------------------------------------------------------------------------------------------


class LibraryStarts:
    """Encodes texts by the library that owns the tokenizer's format."""

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        self._library = library

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """Ids and where they begin; no special tokens."""
        found = self._library.encode_batch(list(texts), add_special_tokens=False)
        lengths = np.fromiter(map(len, found), np.int64, len(found))
        ids = np.fromiter(chain.from_iterable(item.ids for item in found), np.uint32, lengths.sum())
        starts = np.fromiter(map(itemgetter(0), chain.from_iterable(item.offsets for item in found)), np.int64, len(ids))
        return ids, starts, lengths


class WordStarts:
    """The same for tokenizers of BERT's kind, to which a text is its words: what the library makes of a word is kept for the next time."""

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        self._library = LibraryStarts(library)
        self._forget()

    @staticmethod
    def serves(library: tokenizers.Tokenizer) -> bool:
        """Whether a space parts what is before it from what is behind it, for this tokenizer, whatever that is."""
        state = json.loads(library.to_str())
        kinds = [(state[name] or {}).get("type") for name in ("normalizer", "pre_tokenizer", "model")]
        return kinds == ["BertNormalizer", "BertPreTokenizer", "WordPiece"] and all(token["special"] for token in state["added_tokens"])

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """See :class:`LibraryStarts`."""
        rows = [text.replace("\n", " ").split(" ") for text in texts]
        words = list(chain.from_iterable(rows))
        if self._characters > KEPT_CHARACTERS:
            self._forget()
        numbers = np.fromiter(map(self._numbers.__getitem__, words), np.int64, len(words))
        self._learn()
        of_text = np.append(0, np.cumsum([len(row) for row in rows], dtype=np.int64))
        ends = np.append(0, np.cumsum(np.fromiter(map(len, words), np.int64, len(words)) + 1))
        begins = ends[:-1] - np.repeat(ends[of_text[:-1]], np.diff(of_text))
        counts = self._firsts[numbers + 1] - self._firsts[numbers]
        upto = np.append(0, np.cumsum(counts))
        places = np.arange(upto[-1]) + np.repeat(self._firsts[numbers] - upto[:-1], counts)
        return self._ids[places], self._starts[places] + np.repeat(begins, counts), np.diff(upto[of_text])

    def _forget(self) -> None:
        self._numbers: defaultdict[str, int] = defaultdict(count().__next__)  # a new word gets the next number
        self._characters = 0
        self._ids, self._starts, self._firsts = np.zeros(0, np.uint32), np.zeros(0, np.int64), np.zeros(1, np.int64)

    def _learn(self) -> None:
        """Encode the words that have got a number since the last time."""
        new = list(islice(reversed(self._numbers), len(self._numbers) + 1 - len(self._firsts)))[::-1]
        if not new:
            return
        ends = np.cumsum([len(word) + 1 for word in new])
        begins = np.append(0, ends[:-1])
        firsts = range(0, len(new), WORDS_TOGETHER)  # a text for each word would take longer than its tokens
        lines = [" ".join(new[first : first + WORDS_TOGETHER]) for first in firsts]
        encoded = [self._library(lines[first : first + LINES_TOGETHER]) for first in range(0, len(lines), LINES_TOGETHER)]
        ids, starts, lengths = (np.concatenate([part[item] for part in encoded]) for item in range(3))
        starts += np.repeat(begins[list(firsts)], lengths)
        owners = np.searchsorted(ends, starts, side="right")
        self._characters += int(ends[-1])
        self._firsts = np.append(self._firsts, self._firsts[-1] + np.cumsum(np.bincount(owners, minlength=len(new))))
        self._ids, self._starts = np.append(self._ids, ids), np.append(self._starts, starts - begins[owners])

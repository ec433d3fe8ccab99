"""Token ids of many texts at once: by a fast engine where it is seen to give the library's own ids, else by the library.

The library that owns a tokenizer's format is always right. A fast engine is used only after it gave the library's ids on the edge
texts (:func:`choose_engine`), and the library then goes on checking a sample of the documents (:class:`CheckedEngine`).
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from mates.preprocess.tokenizer import HuggingFaceTokenizer, Tokenizer

CHECK_ONE_IN = 4_096
CHECKED_CHARACTERS = 1 << 16  # of a longer text, its beginning is checked: the library needs 100 bytes of memory for each of text
EXCERPT_LENGTH = 60  # characters
IDS_SHOWN = 4  # on either side of the first difference

Ids = npt.NDArray[np.uint32]
Offsets = npt.NDArray[np.int64]


class EngineUnavailableError(RuntimeError):
    """A fast engine cannot serve this tokenizer. Nothing is wrong: the library is used."""


class EngineDifferenceError(RuntimeError):
    """A fast engine gave other ids than the library, or failed: what it encoded must be encoded again by the library."""

    def __init__(self, engine: str, excerpt: str, found: list[int] | str, expected: list[int]) -> None:
        super().__init__(engine, excerpt, found, expected)  # all of them, so that all survive the way between processes
        self.engine = engine
        self.excerpt = excerpt
        """The text, cut down to where the difference is."""
        self.found = found
        """Ids of the fast engine around the first difference, or what it failed with."""
        self.expected = expected
        """Ids of the library in the same places."""

    def __str__(self) -> str:
        found = self.found if isinstance(self.found, str) else f"ids {self.found}"
        return f"engine {self.engine}: text {self.excerpt!a}: found {found}, expected ids {self.expected}; use the library"


class Engine(Protocol):
    """Something that encodes texts."""

    name: str

    def encode(self, texts: Sequence[str], *, ends: bool = False) -> tuple[Ids, Offsets]:
        """Ids of texts.

        Args:
            texts: D of them.
            ends: put the end-of-document id after each text that has tokens, as Megatron does.

        Returns:
            Ids [N] of all texts one after the other, and offsets [D + 1] of where each begins.
        """


class LibraryEngine:
    """The library that owns the tokenizer's format: the reference."""

    name = "library"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str], *, ends: bool = False) -> tuple[Ids, Offsets]:
        """See :class:`Engine`."""
        rows = self._tokenizer.encode_batch(texts)
        if ends:
            rows = [np.append(row, self._tokenizer.end_of_document) if len(row) else row for row in rows]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        ids = np.concatenate(rows).astype(np.uint32) if rows else np.zeros(0, np.uint32)
        return ids, offsets


class FastokensEngine:
    """The fastokens library: byte-level BPE, tens of times faster than the tokenizers library.

    Raises:
        EngineUnavailableError: it is not installed, or does not know a component of this tokenizer.
    """

    name = "fastokens"

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not isinstance(tokenizer, HuggingFaceTokenizer):
            raise EngineUnavailableError("fastokens reads no sentencepiece models")
        os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")  # read when it is imported; the driver runs many processes instead
        try:
            import fastokens
        except ImportError as error:
            raise EngineUnavailableError(f"fastokens cannot be imported ({error})") from error
        try:
            with _panics_as_errors():
                # of the library's own state, not of the file: the end-of-document token may have been made special since
                self._tokenizer = fastokens.Tokenizer.from_json_str(_with_end(tokenizer))
        except Exception as error:
            raise EngineUnavailableError(f"fastokens cannot read this tokenizer ({error})") from error
        self._as_text = tokenizer.special_token_text == "text"

    def encode(self, texts: Sequence[str], *, ends: bool = False) -> tuple[Ids, Offsets]:
        """See :class:`Engine`."""
        with _panics_as_errors():
            raw = self._tokenizer.encode_batch_flat(list(texts), add_special_tokens=ends, split_special_tokens=self._as_text)
        ids, offsets = np.frombuffer(raw[0], "<u4"), np.frombuffer(raw[1], "<u8").astype(np.int64)
        return _without_lone_ends(ids, offsets) if ends else (ids, offsets)


def _with_end(tokenizer: HuggingFaceTokenizer) -> str:
    """The tokenizer as JSON, in which the only special token that is added is the end-of-document token behind a text."""
    state = json.loads(tokenizer.library.to_str())
    name = str(tokenizer.library.id_to_token(tokenizer.end_of_document))
    text, end = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": name, "type_id": 0}}
    state["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [text, end],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {name: {"id": name, "ids": [tokenizer.end_of_document], "tokens": [name]}},
    }
    return json.dumps(state)


def _without_lone_ends(ids: Ids, offsets: Offsets) -> tuple[Ids, Offsets]:
    """Take out the ends of texts that have no tokens."""
    lengths = np.diff(offsets)
    if not (lengths == 1).any():
        return ids, offsets
    kept = np.ones(len(ids), bool)
    kept[offsets[:-1][lengths == 1]] = False
    return ids[kept], np.append(0, np.cumsum(np.where(lengths == 1, 0, lengths)))


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """A panic of a Rust library is no Exception in Python."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


# --- checking against the library ----------------------------------------------------------------------------------


class CheckedEngine:
    """A fast engine, of which the library encodes a sample again.

    The sample is every text whose number is a multiple of :data:`CHECK_ONE_IN`; the caller counts them.
    """

    def __init__(self, fast: Engine, reference: Engine) -> None:
        self.name = fast.name
        self.checked = 0
        """Texts checked so far."""
        self._fast = fast
        self._reference = reference

    def encode(self, texts: Sequence[str], *, ends: bool = False, first: int = 0) -> tuple[Ids, Offsets]:
        """See :class:`Engine`.

        Args:
            texts: the texts.
            ends: see there.
            first: the first one's number.

        Raises:
            EngineDifferenceError: the library gives other ids for a text of the sample, or the fast engine failed.
        """
        ids, offsets = self._encode_fast(texts, ends)
        sample = range(-first % CHECK_ONE_IN, len(texts), CHECK_ONE_IN)
        short = [place for place in sample if len(texts[place]) <= CHECKED_CHARACTERS]
        self._compare([texts[place] for place in short], [ids[offsets[place] : offsets[place + 1]] for place in short], ends)
        if len(short) < len(sample):
            self.check([texts[place] for place in sample if len(texts[place]) > CHECKED_CHARACTERS])
        return ids, offsets

    def check(self, texts: Sequence[str]) -> None:
        """Compare the ids of all of these texts with the library's, of long ones those of their first 65,536 characters.

        Raises:
            EngineDifferenceError: as above.
        """
        texts = [text[:CHECKED_CHARACTERS] for text in texts]
        self._compare(texts, _rows(*self._encode_fast(texts, True)), True)

    def _encode_fast(self, texts: Sequence[str], ends: bool) -> tuple[Ids, Offsets]:
        try:
            ids, offsets = self._fast.encode(texts, ends=ends)
        except Exception as error:
            raise _failure(self._fast, self._reference, texts, error) from error
        ends = len(offsets) == len(texts) + 1 and offsets[0] == 0 and offsets[-1] == len(ids)
        if not ends or (np.diff(offsets) < 0).any():
            raise EngineDifferenceError(self.name, "", f"offsets that do not fit {len(texts)} texts of {len(ids)} ids", [])
        return ids, offsets

    def _compare(self, texts: Sequence[str], found: Sequence[Ids], ends: bool) -> None:
        expected = _rows(*self._reference.encode(texts, ends=ends))
        for text, mine, theirs in zip(texts, found, expected, strict=True):
            if not np.array_equal(mine, theirs):
                raise _difference(self._fast, self._reference, text, mine.tolist(), theirs.tolist())
        self.checked += len(texts)


def _rows(ids: Ids, offsets: Offsets) -> list[Ids]:
    return np.split(ids, offsets[1:-1]) if len(offsets) > 1 else []


def _failure(fast: Engine, reference: Engine, texts: Sequence[str], error: Exception) -> EngineDifferenceError:
    """The fast engine raised: which text it was."""
    for text in texts:
        if isinstance(_ids_or_error(fast, text), str):
            return _difference(fast, reference, text, str(error), [])
    return EngineDifferenceError(fast.name, "", f"a failure on {len(texts)} texts together, though on none alone ({error})", [])


def _difference(fast: Engine, reference: Engine, text: str, found: list[int] | str, expected: list[int]) -> EngineDifferenceError:
    """A short report: the text is halved as long as a half shows a difference, the ids are cut to the first difference."""

    def differs(part: str) -> bool:
        return _ids_or_error(fast, part) != _ids_or_error(reference, part)

    if differs(text):  # else it happens only among the other texts
        text = _shorten(text, differs)
        found, again = _ids_or_error(fast, text), _ids_or_error(reference, text)
        expected = [] if isinstance(again, str) else again
    if not isinstance(found, str):
        place = next((place for place, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), len(expected))
        around = slice(max(0, place - IDS_SHOWN), place + IDS_SHOWN)
        found, expected = found[around], expected[around]
    excerpt = text if len(text) <= EXCERPT_LENGTH else f"{text[:EXCERPT_LENGTH]}... ({len(text)} characters)"
    return EngineDifferenceError(fast.name, excerpt, found, expected[: 2 * IDS_SHOWN])


def _shorten(text: str, differs: Callable[[str], bool]) -> str:
    while len(text) > 1:
        half, quarter = len(text) // 2, len(text) // 4
        parts = [text[:half], text[half:], text[quarter : quarter + half]]
        part = next((part for part in parts if part and differs(part)), None)
        if part is None:
            return text
        text = part
    return text


def _ids_or_error(engine: Engine, text: str) -> list[int] | str:
    try:
        return [int(item) for item in engine.encode([text])[0]]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


# --- the choice ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which engine encodes a corpus."""

    engine: Literal["fastokens", "library"]
    why: str
    alarm: bool = False
    """The fast engine is wrong for this tokenizer, which somebody should hear of."""
    opened: CheckedEngine | LibraryEngine = field(repr=False, compare=False)
    """The engine itself, as :func:`open_engine` gives it."""


def choose_engine(tokenizer: Tokenizer, file: Path, make_fast: Callable[[Tokenizer], Engine] = FastokensEngine) -> Choice:
    """Try the fast engine on the edge texts.

    Args:
        tokenizer: as the corpus will use it, with its policy for special-token text.
        file: where it came from, for messages.
        make_fast: makes the fast engine.
    """
    library = LibraryEngine(tokenizer)
    try:
        checked = CheckedEngine(make_fast(tokenizer), library)
    except EngineUnavailableError as error:
        return Choice(engine="library", why=f"{file}: {error}", opened=library)
    texts = edge_texts(_added_tokens(tokenizer))
    try:
        checked.check(texts)
    except EngineDifferenceError as error:
        return Choice(engine="library", why=f"{file}: {error}", alarm=True, opened=library)
    why = f"{file}: {checked.name} gives the library's ids for each of {len(texts)} edge texts"
    return Choice(engine="fastokens", why=why, opened=checked)


def open_engine(tokenizer: Tokenizer, engine: str) -> CheckedEngine | LibraryEngine:
    """The engine that :class:`Choice` names; it is checked where it is not the library."""
    reference = LibraryEngine(tokenizer)
    return reference if engine == reference.name else CheckedEngine(FastokensEngine(tokenizer), reference)


def _added_tokens(tokenizer: Tokenizer) -> list[str]:
    """Texts of special tokens, then of other added tokens: all of the first 100 of either kind."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return []
    added = [token for _, token in sorted(tokenizer.library.get_added_tokens_decoder().items())]
    return [str(token.content) for special in (True, False) for token in [item for item in added if item.special is special][:100]]


# --- the edge texts ------------------------------------------------------------------------------------------------

SAMPLES_PER_CATEGORY = 24
PLANES = (0x0300, 0x1000, 0xFE00, 0x10000, 0x1F300, 0x20000, 0x2FA1D, 0x30000, 0x323AF, 0xE0020, 0xF0000, 0x10FFFD)
SPACES = " \t\n\v\f\r\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2003\u2009\u200a\u200b\u2028\u2029\u202f\u205f\u2060\u3000\ufeff\u180e"
CONTRACTIONS = ("s", "t", "re", "ve", "m", "ll", "d", "S", "T", "RE", "Re", "vE", "M", "LL", "lL", "D", "\u017f", "n", "x")
ZEROS = "0\u0660\u0966\u0e50\uff10\U0001d7ce"  # ASCII, Arabic, Devanagari, Thai, full width, mathematical bold
BLOCKS = ("a", "Z", "\xe9", "\u65e5", "\u0301", "\u0903", "1", "\xb2", "\u2167", ".", "'", "\u2019", "_", "$", "\U0001f600", " ", "\n")
SEQUENCES = (
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f44d\U0001f3fd \u2764\ufe0f \u2764\ufe0e",  # joined, toned, styled
    "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7\U0001f1ea 1\ufe0f\u20e3 \U0001f3f4\U000e0067\U000e0062\U000e007f",  # flags, a keycap
    "e\u0301 \xe9 e\u0301\u0323 e\u0323\u0301 \u1e69 s\u0323\u0307 s\u0307\u0323 \u0344 \u0340 \u0958 \u2adc",  # normal forms
    "\u212b \u2126 \u212a \ufb01 \u2460 \u33a7 \xbd \u1e9e \u0130 \u0131 \u01c4 \ufdfa \U0001d400",  # compatibility, casing
    "\u1112\u1161\u11ab \ud55c \u1100\u1161 \uac00\u11a8 \u1100\u1100\u1161\u11a8\u11a8 \u3131\u314f",  # Hangul
    "\u05d0\u200f\u05d1 \u202eabc\u202c \u2066x\u2069 \u0645\u0631\u062d\u0628\u0627 \u0915\u094d\u200d\u0937 \u0e01\u0e33",  # directions
    "Zal" + "".join(map(chr, range(0x300, 0x370))) + "go a" + "\u0327\u0301" * 40,  # marks in disorder
    "\0 a\0b \x01\x1b[0m\x7f \x80\x9f \xad \ufeffa\ufeff \ufffd \ufffe\uffff \ue000 \U0010ffff \U000f0000",  # control, private, none
    "http://www.example.com/a_b?c=%20&d=[e]#f x@y.org 3.14e-10 1,000,000 $5.00 50% #tag",
    "def f(x):\n    if x != 0:\n\t\treturn {'a': [1]}\n\n\n\n# end  \n",
)


def edge_texts(special_tokens: Sequence[str] = ()) -> list[str]:
    """Texts on which tokenizers of the same format are most likely to differ.

    Args:
        special_tokens: texts of a tokenizer's special and other added tokens.
    """
    alone = [chr(code) for code in range(0x300)] + _samples_of_categories() + [chr(code + step) for code in PLANES for step in (-1, 0, 1)]
    return [
        "",
        *alone,
        *(f"a{one}b {one}1{one}{one}.{one}\n{one}" for one in alone),
        *_spaces(),
        *_words(),
        *SEQUENCES,
        *(text for one in special_tokens for text in _around(one)),
        "".join(special_tokens),
        " ".join(special_tokens),
        *(one * 10_000 for one in "a \n"),
        *(one * 1_000 for one in ("1", ".", "\t", "\r\n", "\u0301", "\u65e5", "\U0001f600", "a\u0327", "ab ", "'s")),
    ]


def _samples_of_categories() -> list[str]:
    """Letters from the start, the end and between of each general category of Unicode, surrogates apart."""
    found: dict[str, list[str]] = {}
    for code in chain(range(0x3000), range(0x3000, 0x110000, 11)):  # all of them would take a second
        letter = chr(code)
        found.setdefault(unicodedata.category(letter), []).append(letter)
    del found["Cs"]
    return [
        letters[place * (len(letters) - 1) // (SAMPLES_PER_CATEGORY - 1)]
        for letters in found.values()
        for place in range(SAMPLES_PER_CATEGORY)
    ]


def _spaces() -> list[str]:
    runs = [one * count for one in SPACES for count in (1, 2, 3, 5)]
    pairs = [one + other for one in SPACES for other in " \n\r\t\xa0\u3000"]
    mixes = ["\r\n", "\n\r", "\r\r\n", "\n\n \n", " \n ", "\t \t", "  \n  \n", "\r\n\r\n ", *(" " * count for count in range(4, 40))]
    return [text for run in [*runs, *pairs, *mixes] for text in (run, f"a{run}b", f".{run}1{run}")]


def _words() -> list[str]:
    contractions = [
        f"{word}{mark}{end}{rest}" for mark in "'\u2019\u02bc`" for end in CONTRACTIONS for word in ("I", "1 ") for rest in ("", "a")
    ]
    digits = ["".join(chr(ord(zero) + (place + 1) % 10) for place in range(count)) for zero in ZEROS for count in range(1, 13)]
    pairs = [before + after for before in BLOCKS for after in BLOCKS]
    return [*contractions, *digits, *(f"a{run} {run}." for run in digits), *pairs, *(f"x{pair}{pair[0]} {pair}" for pair in pairs)]


def _around(token: str) -> list[str]:
    pieces = [token[:-1], token[1:], token + token, token.upper(), token.lower(), token.strip()]
    contexts = ["a{}b", " {} ", "  {}  ", "\n{}\n", "a {}", "{} a", "1{}.", "e{}\u0301", "<{}>", "{}{}", "\xe9{}\u3000"]
    return [token, *pieces, *(context.replace("{}", token, 1) for context in contexts)]

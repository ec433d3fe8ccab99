"""Fast engines against the libraries that own the formats, which are called here directly and plainly."""

from __future__ import annotations

import io
import json
import pickle
import random
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import sentencepiece
import tokenizers
import zstandard
from conftest import shared
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.implementations import BertWordPieceTokenizer, ByteLevelBPETokenizer

from mates.preprocess import encode
from mates.preprocess.encode import (
    CHECK_ONE_IN,
    CHECKED_CHARACTERS,
    CheckedEngine,
    Choice,
    Engine,
    EngineDifferenceError,
    EngineUnavailableError,
    FastokensEngine,
    Ids,
    LibraryEngine,
    Offsets,
    choose_engine,
    edge_texts,
    open_engine,
)
from mates.preprocess.tokenizer import HuggingFaceTokenizer, SpecialTokenText, Tokenizer, load_tokenizer

END = "<|endoftext|>"
POLICIES: tuple[SpecialTokenText, ...] = ("text", "special")
Library = Callable[[Sequence[str]], list[list[int]]]


def rows(encoded: tuple[Ids, Offsets]) -> list[list[int]]:
    ids, offsets = encoded
    assert [item.dtype.name for item in (ids, offsets)] == ["uint32", "int64"]
    assert (int(offsets[0]), int(offsets[-1])) == (0, len(ids))
    values = ids.tolist()
    return [values[start:end] for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]


def first_different(texts: Sequence[str], found: list[list[int]], expected: list[list[int]]) -> str | None:
    return next((ascii(text) for text, mine, theirs in zip(texts, found, expected, strict=True) if mine != theirs), None)


# --- the libraries, called directly --------------------------------------------------------------------------------


def hugging_face(library: tokenizers.Tokenizer, policy: SpecialTokenText = "text") -> Library:
    library.encode_special_tokens = policy == "text"
    return lambda texts: [item.ids for item in library.encode_batch_fast(list(texts), add_special_tokens=False)]


def read_gpt2(folder: Path) -> Any:
    made = ByteLevelBPETokenizer.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    made.add_special_tokens([END])
    return made._tokenizer


def read_bert(folder: Path) -> Any:
    return BertWordPieceTokenizer(models.WordPiece.read_file(str(folder / "vocab.txt")))._tokenizer


def library_of(name: str, folder: Path, policy: SpecialTokenText = "text") -> Library:
    if name == "gpt-neox":
        return hugging_face(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), policy)
    if name in ("gpt2", "bert-base-uncased"):
        return hugging_face(read_gpt2(folder) if name == "gpt2" else read_bert(folder), policy)
    (file,) = folder.glob("*.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    return lambda texts: [processor.encode(text) for text in texts]


# --- tokenizers trained here ---------------------------------------------------------------------------------------

LLAMA3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TRAINED = ("gpt2 kind", "prefix space", "neox kind", "llama 3 kind", "single digits", "added tokens")
REAL = ("gpt-neox", "gpt2")


def train(kind: str, texts: Sequence[str]) -> tokenizers.Tokenizer:
    bytes_of = pre_tokenizers.ByteLevel
    words: dict[str, pre_tokenizers.PreTokenizer] = {
        "prefix space": bytes_of(add_prefix_space=True),
        "llama 3 kind": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(tokenizers.Regex(LLAMA3_WORDS), "isolated"), bytes_of(add_prefix_space=False, use_regex=False)]
        ),
        "single digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_of(add_prefix_space=False)]),
    }
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = words.get(kind, bytes_of(add_prefix_space=False))
    library.decoder = decoders.ByteLevel()
    if kind in ("neox kind", "added tokens"):
        library.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=[END, "<pad>"], initial_alphabet=bytes_of.alphabet(), show_progress=False)
    library.train_from_iterator(texts, trainer)
    if kind == "neox kind":
        library.add_tokens([" " * count for count in range(24, 1, -1)])
    if kind == "added tokens":
        alone = tokenizers.AddedToken("ba", single_word=True)
        wide = tokenizers.AddedToken("qq", lstrip=True, rstrip=True)
        library.add_tokens(
            [alone, wide, tokenizers.AddedToken("\xe9t\xe9", normalized=True), tokenizers.AddedToken("  ", normalized=False)]
        )
    return library


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp("trained") for kind in TRAINED}
    for kind, folder in folders.items():
        train(kind, texts).save(str(folder / "tokenizer.json"))
    return folders


@pytest.fixture(scope="module", params=(*TRAINED, *REAL))
def served(request: pytest.FixtureRequest, trained: dict[str, Path]) -> tuple[str, Path]:
    """A tokenizer that fastokens serves: what kind it is and its folder."""
    name = str(request.param)
    return ("gpt-neox", trained[name]) if name in TRAINED else (name, shared(f"tokenizers/{name}"))


class Pair:
    """fastokens and the library, by policy."""

    def __init__(self, name: str, folder: Path) -> None:
        self.fast = {policy: FastokensEngine(load_tokenizer(folder, END, policy)) for policy in POLICIES}
        self.library = {policy: library_of(name, folder, policy) for policy in POLICIES}

    def check(self, texts: Sequence[str]) -> None:
        for policy in POLICIES:
            assert first_different(texts, rows(self.fast[policy].encode(texts)), self.library[policy](texts)) is None, policy


@pytest.fixture(scope="module")
def pair(served: tuple[str, Path]) -> Pair:
    return Pair(*served)


# --- the same ids --------------------------------------------------------------------------------------------------


def test_edge_texts_have_the_librarys_ids(pair: Pair) -> None:
    pair.check(edge_texts([END, "<pad>", "<|padding|>", "ba", "qq", "\xe9t\xe9", "    "]))


special_parts = [
    END,
    "<|endoftext",
    "<|padding|>",
    "<pad>",
    "qq",
    "ba",
    "\xe9t\xe9",
    "'s",
    "'S",
    "\u2019s",
    " ",
    "  ",
    "      ",
    "\n",
    "\r",
    "\t",
]
special_parts += [
    "\0",
    "a",
    "1",
    "12",
    "\xe9",
    "e\u0301",
    "\u0301",
    "\u0327",
    "\u1100",
    "\u1161",
    "\u11a8",
    "\u212b",
    "\U0001f600",
    "\u200d",
    ".",
]
any_text = st.text() | st.lists(st.sampled_from(special_parts), max_size=12).map("".join)


@given(texts=st.lists(any_text, max_size=6))
def test_any_text_has_the_librarys_ids(pair: Pair, texts: list[str]) -> None:
    pair.check(texts)


def test_documents_have_the_librarys_ids(pair: Pair, texts: list[str]) -> None:
    pair.check(texts)
    pair.check([])
    pair.check(["", texts[0], "", ""])


def test_real_documents_have_the_librarys_ids(pair: Pair, c4_file: Path) -> None:
    pair.check(real_texts(c4_file)[:100])


@pytest.mark.parametrize("policy", POLICIES)
def test_special_token_text_follows_the_policy(served: tuple[str, Path], policy: SpecialTokenText) -> None:
    tokenizer = load_tokenizer(served[1], END, policy)
    end = tokenizer.end_of_document
    for engine in (FastokensEngine(tokenizer), LibraryEngine(tokenizer)):
        found = rows(engine.encode([END, f"x{END}{END}y", f" {END} ", "<|endoftext", "|>"]))
        assert [ids.count(end) for ids in found] == ([0] * 5 if policy == "text" else [1, 2, 1, 0, 0])


@pytest.mark.parametrize("policy", POLICIES)
def test_ends_follow_texts_that_have_tokens(served: tuple[str, Path], texts: list[str], policy: SpecialTokenText) -> None:
    tokenizer = load_tokenizer(served[1], END, policy)
    some = ["", *texts[:20], END, f"a{END}", "", "\n", ""]
    expected = [row + [tokenizer.end_of_document] * bool(row) for row in rows(LibraryEngine(tokenizer).encode(some))]
    for engine in (FastokensEngine(tokenizer), LibraryEngine(tokenizer)):
        assert rows(engine.encode(some, ends=True)) == expected
        assert rows(engine.encode(["", ""], ends=True)) == [[], []]
        assert rows(engine.encode([], ends=True)) == []


def test_a_wrong_end_is_a_difference(tokenizer: Tokenizer) -> None:
    class OtherEnd(LibraryEngine):
        name = "other end"

        def encode(self, texts: Sequence[str], *, ends: bool = False) -> tuple[Ids, Offsets]:
            ids, offsets = super().encode(texts, ends=ends)
            ids[-1] += ends
            return ids, offsets

    choice = choose_engine(tokenizer, Path("here"), OtherEnd)
    assert choice.alarm
    assert "engine other end" in choice.why
    with pytest.raises(EngineDifferenceError, match="engine other end: text 'one two'"):
        CheckedEngine(OtherEnd(tokenizer), LibraryEngine(tokenizer)).encode(["one two"], ends=True)


def test_an_end_token_that_the_file_does_not_call_special(tmp_path: Path, trained: dict[str, Path]) -> None:
    raw = json.loads((trained["neox kind"] / "tokenizer.json").read_text())
    raw["added_tokens"][0]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    for policy in POLICIES:
        tokenizer = load_tokenizer(tmp_path, END, policy)
        choice = choose_engine(tokenizer, tmp_path)
        assert (choice.engine, choice.alarm) == ("fastokens", False)
        (found,) = rows(FastokensEngine(tokenizer).encode([f"a{END}"]))
        assert (tokenizer.end_of_document in found) == (policy == "special")
        assert tokenizer.decode([tokenizer.end_of_document]) == ""


def test_library_engine_joins_what_the_tokenizer_gives(trained: dict[str, Path], texts: list[str]) -> None:
    tokenizer = load_tokenizer(trained["gpt2 kind"], END)
    engine = LibraryEngine(tokenizer)
    some = ["", *texts[:20], "", ""]
    assert rows(engine.encode(some)) == [ids.tolist() for ids in tokenizer.encode_batch(some)]
    assert rows(engine.encode([])) == []


# --- the edge texts ------------------------------------------------------------------------------------------------


def test_edge_texts_hold_what_they_promise() -> None:
    texts = edge_texts([END, "  "])
    assert texts == edge_texts([END, "  "])
    assert {"", END, f"a{END}b", f" {END} ", "<|endoftext|", "\0", "\r\n", "I'LL", "I\u2019ll", "123456789012", "a" * 10_000} <= set(texts)
    assert {chr(code) for code in range(0x300)} <= set(texts)
    letters = set("".join(texts))
    assert {unicodedata.category(letter) for letter in letters} == {unicodedata.category(chr(code)) for code in range(0x110000)} - {"Cs"}
    assert {"\u200d", "\U0001f3fd", "\ufeff", "\uffff", "\U0010ffff", "\u202e", "\u11ab", "\u1e9e"} <= letters
    assert all(text.encode() or text == "" for text in texts)  # no surrogates


# --- the choice ----------------------------------------------------------------------------------------------------


def test_the_fast_engine_is_chosen_where_it_is_right(served: tuple[str, Path]) -> None:
    for policy in POLICIES:
        choice = choose_engine(load_tokenizer(served[1], END, policy), served[1])
        assert (choice.engine, choice.alarm) == ("fastokens", False)
        assert str(served[1]) in choice.why


def test_the_library_is_used_without_alarm_where_no_fast_engine_fits(trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.add_special_tokens(["</s>"])
    choice = choose_engine(HuggingFaceTokenizer(words), Path("words.json"))
    assert (choice.engine, choice.alarm) == ("library", False)
    assert "words.json: fastokens cannot read this tokenizer (model error: unsupported model type: WordLevel)" in choice.why
    monkeypatch.setitem(sys.modules, "fastokens", None)
    choice = choose_engine(load_tokenizer(trained["gpt2 kind"]), Path("here"))
    assert (choice.engine, choice.alarm) == ("library", False)
    assert "here: fastokens cannot be imported" in choice.why


@pytest.mark.parametrize("name", ["t5", "sentencepiece-test", "bert-base-uncased"])
def test_other_kinds_are_the_librarys(name: str) -> None:
    folder = shared(f"tokenizers/{name}")
    choice = choose_engine(load_tokenizer(folder), folder)
    assert (choice.engine, choice.alarm) == ("library", False)


def test_the_chosen_engine_is_opened(tokenizer: Tokenizer, texts: list[str]) -> None:
    fast, plain = (open_engine(tokenizer, name) for name in ("fastokens", "library"))
    assert (fast.name, plain.name) == ("fastokens", "library")
    assert rows(fast.encode(texts[:100])) == rows(plain.encode(texts[:100]))
    assert isinstance(fast, CheckedEngine)


# --- wrong engines -------------------------------------------------------------------------------------------------


class Wrong:
    """Changes the last id of every text that ``hit`` says."""

    name = "wrong"

    def __init__(self, tokenizer: Tokenizer, hit: Callable[[str], bool]) -> None:
        self.right = LibraryEngine(tokenizer)
        self.hit = hit

    def encode(self, texts: Sequence[str], *, ends: bool = False) -> tuple[Ids, Offsets]:
        ids, offsets = self.right.encode(texts, ends=ends)
        for text, end in zip(texts, offsets[1:], strict=True):
            if self.hit(text):
                self.spoil(ids, int(end))
        return ids, offsets

    def spoil(self, ids: Ids, end: int) -> None:
        ids[end - 1] += 1


class Raises(Wrong):
    def spoil(self, ids: Ids, end: int) -> None:
        raise ValueError("match limit reached")


class Misplaces(Wrong):
    def encode(self, texts: Sequence[str], *, ends: bool = False) -> tuple[Ids, Offsets]:
        ids, offsets = super().encode(texts, ends=ends)
        return ids, offsets[:-1]


class Recorder:
    """Remembers what the reference was asked."""

    name = "recorder"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.seen: list[str] = []

    def encode(self, texts: Sequence[str], *, ends: bool = False) -> tuple[Ids, Offsets]:
        self.seen += texts
        return self.engine.encode(texts, ends=ends)


@pytest.fixture(scope="module")
def tokenizer(trained: dict[str, Path]) -> Tokenizer:
    return load_tokenizer(trained["neox kind"], END)


def numbered(count: int) -> list[str]:
    return [f"document {number} of many" for number in range(count)]


@pytest.mark.parametrize("text", ["\u1680", "I\u2019LL", END, "\U0001f600.", " " * 24, "\u3000\u3000"])
def test_one_wrong_id_in_one_edge_text_gives_the_library_with_alarm(tokenizer: Tokenizer, text: str) -> None:
    assert edge_texts([END]).count(text) >= 1
    choice = choose_engine(tokenizer, Path("here"), lambda asked: Wrong(asked, lambda other: other == text))
    right = rows(LibraryEngine(tokenizer).encode([text]))[0][-8:]
    assert choice == Choice(engine="library", why=choice.why, alarm=True, opened=choice.opened)
    assert isinstance(choice.opened, LibraryEngine)
    assert choice.why.startswith(f"here: engine wrong: text {text!a}: found ids")
    assert f"{right[-1] + 1}], expected ids" in choice.why


def test_an_engine_that_fails_on_an_edge_text_gives_the_library_with_alarm(tokenizer: Tokenizer) -> None:
    choice = choose_engine(tokenizer, Path("here"), lambda asked: Raises(asked, lambda other: "\u1680" in other))
    assert choice.alarm
    assert "here: engine wrong: text '\\u1680': found ValueError: match limit reached, expected ids" in choice.why
    assert choose_engine(tokenizer, Path("here"), lambda asked: Misplaces(asked, lambda other: False)).alarm


def test_one_text_in_4096_is_checked_whatever_the_batches(tokenizer: Tokenizer) -> None:
    texts = numbered(20_000)
    expected = texts[::4_096]
    for size in (1_000, 7_777, 20_000):
        fast = Wrong(tokenizer, lambda text: False)
        reference = Recorder(LibraryEngine(tokenizer))
        engine = CheckedEngine(fast, reference)
        found = [row for start in range(0, len(texts), size) for row in rows(engine.encode(texts[start : start + size], first=start))]
        assert reference.seen == expected
        assert engine.checked == len(expected)
        assert (engine.name, len(found)) == ("wrong", len(texts))
    assert found == rows(LibraryEngine(tokenizer).encode(texts))


def test_of_a_long_text_the_beginning_is_checked(tokenizer: Tokenizer) -> None:
    """The library would need a hundred times its size in memory for the whole of it."""
    long = "word " * CHECKED_CHARACTERS
    for check in (CheckedEngine.check, CheckedEngine.encode):
        reference = Recorder(LibraryEngine(tokenizer))
        check(CheckedEngine(Wrong(tokenizer, lambda text: text == long), reference), [long])
        assert reference.seen == [long[:CHECKED_CHARACTERS]]
        with pytest.raises(EngineDifferenceError):
            check(CheckedEngine(Wrong(tokenizer, lambda text: len(text) == CHECKED_CHARACTERS), reference), [long])


def test_a_wrong_id_in_a_checked_text_is_an_error(tokenizer: Tokenizer) -> None:
    texts = numbered(20_000)
    chosen = texts[CHECK_ONE_IN]
    engine = CheckedEngine(Wrong(tokenizer, lambda text: text == chosen), LibraryEngine(tokenizer))
    with pytest.raises(
        EngineDifferenceError, match=f"engine wrong: text '{chosen}': found ids .*, expected ids .*; use the library"
    ) as caught:
        engine.encode(texts)
    right = rows(LibraryEngine(tokenizer).encode([chosen]))[0]
    error = caught.value
    assert (error.engine, error.excerpt) == ("wrong", chosen)
    assert (error.found, error.expected) == ([*right[-5:-1], right[-1] + 1], right[-5:])


def test_the_text_is_cut_down_to_the_difference(tokenizer: Tokenizer) -> None:
    long = "some words " * 2_000 + "the \u1680 culprit " + "and more " * 2_000
    with pytest.raises(EngineDifferenceError) as caught:
        CheckedEngine(Wrong(tokenizer, lambda text: "\u1680" in text), LibraryEngine(tokenizer)).check([long])
    assert caught.value.excerpt == "\u1680"
    with pytest.raises(EngineDifferenceError, match=r"\.\.\. \(\d+ characters\)") as caught:
        CheckedEngine(Wrong(tokenizer, lambda text: text == long), LibraryEngine(tokenizer)).check([long])
    assert len(str(caught.value)) < 400


def test_a_difference_that_does_not_come_back_is_told_all_the_same(tokenizer: Tokenizer) -> None:
    calls: list[str] = []

    def once(text: str) -> bool:
        calls.append(text)
        return len(calls) == 1

    with pytest.raises(EngineDifferenceError, match="engine wrong: text 'one two'"):
        CheckedEngine(Wrong(tokenizer, once), LibraryEngine(tokenizer)).check(["one two"])


def test_a_failing_engine_is_a_difference(tokenizer: Tokenizer) -> None:
    reference = LibraryEngine(tokenizer)
    with pytest.raises(EngineDifferenceError, match="text '7': found ValueError: match limit reached, expected ids"):
        CheckedEngine(Raises(tokenizer, lambda text: "7" in text), reference).encode(numbered(20))
    with pytest.raises(EngineDifferenceError, match="engine wrong: text '': found offsets that do not fit 20 texts"):
        CheckedEngine(Misplaces(tokenizer, lambda text: False), reference).encode(numbered(20))


def test_check_compares_every_text(tokenizer: Tokenizer) -> None:
    texts = numbered(50)
    engine = CheckedEngine(Wrong(tokenizer, lambda text: text == texts[-1]), LibraryEngine(tokenizer))
    engine.check([])
    engine.check(texts[:-1])
    assert engine.checked == 49
    with pytest.raises(EngineDifferenceError, match=texts[-1]):
        engine.check(texts)


def test_a_panic_of_the_fast_library_is_an_error() -> None:
    class PanicException(BaseException):
        pass

    with pytest.raises(RuntimeError, match="PanicException: index out of bounds"), encode._panics_as_errors():
        raise PanicException("index out of bounds")
    with pytest.raises(KeyboardInterrupt), encode._panics_as_errors():
        raise KeyboardInterrupt


def test_errors_pass_between_processes(tokenizer: Tokenizer) -> None:
    with pytest.raises(EngineDifferenceError) as caught:
        CheckedEngine(Wrong(tokenizer, lambda text: True), LibraryEngine(tokenizer)).check(["one"])
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.args) == (str(caught.value), caught.value.args)
    assert again.found == caught.value.found
    assert str(EngineDifferenceError(*json.loads(json.dumps(again.args)))) == str(again)
    with pytest.raises(EngineUnavailableError, match="no sentencepiece"):
        FastokensEngine(LibraryTokenizerOfAnotherKind())


class LibraryTokenizerOfAnotherKind:
    vocab_size = 1
    end_of_document = 0

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        raise NotImplementedError


# --- everything there is: slow -------------------------------------------------------------------------------------

ALL_FIVE = ("gpt-neox", "gpt2", "bert-base-uncased", "t5", "sentencepiece-test")
BATCH_BYTES = 4_000_000


def real_texts(file: Path) -> list[str]:
    with file.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as data:
        return [json.loads(line)["text"] for line in io.TextIOWrapper(data, encoding="utf-8")]


def batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if held > BATCH_BYTES:
            yield batch
            batch, held = [], 0
    yield batch


class Race:
    """What :func:`choose_engine` gives beside the library, with the seconds of processor time of both."""

    def __init__(self, name: str, policy: SpecialTokenText = "text", compare_one_in: int = 1) -> None:
        folder = shared(f"tokenizers/{name}")
        tokenizer = load_tokenizer(folder, special_token_text=policy)
        choice = choose_engine(tokenizer, folder)
        assert not choice.alarm, choice.why
        assert choice.engine == ("fastokens" if name in REAL else "library")
        self.engine: Engine = open_engine(tokenizer, choice.engine)
        self.library = library_of(name, folder, policy)
        self.compare_one_in = compare_one_in
        self.name = f"{name} ({policy})"
        self.texts = self.ids = 0
        self.bytes = {"engine": 0, "library": 0}
        self.seconds = {"engine": 0.0, "library": 0.0}

    def run(self, texts: Sequence[str]) -> None:
        for batch in batches(texts):
            start = time.process_time()
            encoded = self.engine.encode(batch)
            self.seconds["engine"] += time.process_time() - start
            found = rows(encoded)
            compared = [place for place, text in enumerate(batch) if crc32(text.encode()) % self.compare_one_in == 0]
            sample = [batch[place] for place in compared]
            start = time.process_time()
            expected = self.library(sample)
            self.seconds["library"] += time.process_time() - start
            assert first_different(sample, [found[place] for place in compared], expected) is None, self.name
            self.texts += len(batch)
            self.ids += len(encoded[0])
            self.bytes["engine"] += sum(len(text.encode()) for text in batch)
            self.bytes["library"] += sum(len(text.encode()) for text in sample)

    def tell(self, what: str) -> None:
        speeds = ", ".join(f"{key} {self.bytes[key] / 1e6 / seconds:.2f}" for key, seconds in self.seconds.items())
        print(f"{what}: {self.name}: {self.texts:,} texts, {self.ids:,} ids; bytes {self.bytes}; MB per CPU second: {speeds}", flush=True)


@pytest.mark.slow
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("name", ALL_FIVE)
def test_all_real_text_has_the_librarys_ids(name: str) -> None:
    race = Race(name, compare_one_in=1 if name in REAL else 8)  # where the engine is the library, a sample shows as much
    for file in sorted(shared("web").glob("*.jsonl.zst")):
        race.run(real_texts(file))
    race.tell("web")


def fuzz_texts(count: int, real: Sequence[str]) -> Iterator[str]:
    """Random code points of all planes, real text with changes, mixes of what tokenizers treat specially, special tokens."""
    source = random.Random(20_261_121)
    spaces = " \t\n\r\v\f\xa0\u2003\u3000\u200b\u2028\x85"
    mixed = [*spaces, *".,;:!?'\"()[]{}<>|/\\@#$%^&*-_=+`~\u2019\u201c\u2026", *"0123456789\u0663\u0967\uff15\xb2\u216b"]
    mixed += [
        *"aAzZ\xe9\xdf\u0130\u0436\u05d0\u0628\u0915\u0e01\u65e5\ud55c",
        "'s",
        "'LL",
        "\r\n",
        "e\u0301",
        "\u0327\u0301",
        "\u1100\u1161",
    ]
    special = [
        END,
        "<|padding|>",
        "[SEP]",
        "[CLS]",
        "[MASK]",
        "[unused1]",
        "</s>",
        "<s>",
        "<unk>",
        "<pad>",
        "<extra_id_0>",
        "<|end",
        "text|>",
    ]

    def letter() -> str:
        top = source.choice((0x80, 0x800, 0x3000, 0xD800, 0x10000, 0x20000, 0x110000))
        code = source.randrange(top)
        return chr(code) if not 0xD800 <= code < 0xE000 else "\ufffd"

    def snippet() -> str:
        text = source.choice(real)
        start = source.randrange(len(text))
        return text[start : start + source.randint(1, 80)]

    for number in range(count):
        kind = number % 4
        if kind == 0:
            yield "".join(letter() for _ in range(source.randint(0, 24)))
        elif kind == 1:
            letters = list(snippet())
            for _ in range(source.randint(1, 5)):
                place = source.randrange(len(letters) + 1)
                letters[place : place + source.randint(0, 2)] = [source.choice(mixed) if source.random() < 0.5 else letter()]
            yield "".join(letters)
        elif kind == 2:
            yield "".join(source.choice(mixed) * source.choice((1, 1, 1, 2, 3, 7)) for _ in range(source.randint(1, 20)))
        else:
            parts = [source.choice((source.choice(special), snippet()[:12], source.choice(mixed))) for _ in range(source.randint(1, 8))]
            yield "".join(parts)


@pytest.mark.slow
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("name", ALL_FIVE)
def test_300000_made_up_texts_have_the_librarys_ids(name: str, c4_file: Path) -> None:
    texts = list(fuzz_texts(300_000, real_texts(c4_file)[:500]))
    assert len(set(texts)) > 250_000
    for policy in POLICIES if name not in ("t5", "sentencepiece-test") else POLICIES[:1]:
        race = Race(name, policy)
        race.run(texts)
        race.tell("made up")


@pytest.mark.slow
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("name", REAL)
def test_every_code_point_has_the_librarys_ids(name: str) -> None:
    race = Race(name)
    letters = (chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    race.run([f"a{letter}b1{letter}2 {letter}{letter}. {letter}e\u0301'{letter}  {letter}" for letter in letters])
    race.tell("code points")

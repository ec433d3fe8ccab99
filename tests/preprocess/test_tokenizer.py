"""Tokenizers, taken and trained, against the libraries that they come from."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import zstandard
from conftest import shared
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.implementations import ByteLevelBPETokenizer

from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactMismatchError, Manifest
from mates.preprocess.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    SpecialTokenText,
    Tokenizer,
    TokenizerError,
    VocabularyDifference,
    encoding_hash,
    load_encoder_tokenizer,
    load_tokenizer,
    looks_like_path,
    make_tokenizer,
    open_tokenizer,
    vocabulary_difference,
)

END = "<|endoftext|>"


def make(
    directory: Path,
    texts: Iterable[str] = (),
    *,
    kind: str = "bpe",
    path: Path | str | None = None,
    vocab_size: int = 500,
    train_bytes: int = 1_000_000,
    end_of_document: str | None = None,
    special_token_text: SpecialTokenText = "text",
) -> Manifest:
    return make_tokenizer(
        directory,
        path=None if path is None else str(path),
        kind=kind,
        vocab_size=vocab_size,
        train_bytes=train_bytes,
        end_of_document=end_of_document,
        texts=texts,
        inputs={"documents": "made up"},
        special_token_text=special_token_text,
    )


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    (ids,) = tokenizer.encode_batch([text])
    return [int(item) for item in ids]


@pytest.fixture(scope="module")
def sentencepiece_dir(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer") / "sentencepiece"
    make(directory, texts, kind="sentencepiece", vocab_size=600)
    return directory


@pytest.fixture(scope="module")
def bpe(bpe_dir: Path) -> Tokenizer:
    return open_tokenizer(bpe_dir)[0]


@pytest.fixture(scope="module")
def pieces(sentencepiece_dir: Path) -> Tokenizer:
    return open_tokenizer(sentencepiece_dir)[0]


@pytest.fixture(scope="module")
def neox(neox_tokenizer: Path) -> Tokenizer:
    return load_tokenizer(neox_tokenizer)


# --- round trips ---------------------------------------------------------------------------------------------------

# Hypothesis' text is any Unicode but surrogates; the second kind is full of what tokenizers treat specially
special_parts = [
    "<|endoftext|>",
    "</s>",
    "<s>",
    "<unk>",
    "<0x41>",
    "<0x0A>",
    "\u2581",
    " ",
    "  ",
    "\n",
    "\r",
    "\t",
    "\0",
    "a",
    "Ġ",
    "é",
    "e\u0301",
]
any_text = st.text() | st.lists(st.sampled_from(special_parts), max_size=8).map("".join)


@given(text=any_text)
def test_bpe_gives_back_every_text(bpe: Tokenizer, text: str) -> None:
    assert bpe.decode(ids_of(bpe, text)) == text


@given(text=any_text)
def test_sentencepiece_gives_back_every_text_but_its_own_mark(pieces: Tokenizer, text: str) -> None:
    """Sentencepiece writes a space as U+2581 inside, so a U+2581 of the text comes back as a space: the one loss."""
    assert pieces.decode(ids_of(pieces, text)) == text.replace("\u2581", " ")


def test_documents_come_back(bpe: Tokenizer, pieces: Tokenizer, texts: list[str]) -> None:
    for tokenizer in (bpe, pieces):
        ids = tokenizer.encode_batch(texts)
        assert [tokenizer.decode([int(item) for item in row]) for row in ids] == texts
        assert sum(map(len, ids)) < sum(len(text.encode()) for text in texts) / 2  # it has learned something
        assert max(int(row.max()) for row in ids) < tokenizer.vocab_size
        assert tokenizer.encode_batch([]) == []
        assert [row.tolist() for row in tokenizer.encode_batch(["", texts[0], ""])] == [[], ids[0].tolist(), []]
        assert tokenizer.decode([]) == ""


def test_decode_leaves_the_end_of_document_out(bpe: Tokenizer, pieces: Tokenizer) -> None:
    for tokenizer in (bpe, pieces):
        ids = [*ids_of(tokenizer, "one two"), tokenizer.end_of_document, *ids_of(tokenizer, " three")]
        assert "one two" in tokenizer.decode(ids)
        assert tokenizer.decode([tokenizer.end_of_document]) == ""


# --- against the libraries -----------------------------------------------------------------------------------------


def test_ids_are_the_libraries_own(bpe: Tokenizer, bpe_dir: Path, pieces: Tokenizer, sentencepiece_dir: Path, texts: list[str]) -> None:
    library = tokenizers.Tokenizer.from_file(str(bpe_dir / "tokenizer.json"))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_dir / "tokenizer.model"))
    assert [ids.tolist() for ids in bpe.encode_batch(texts)] == [library.encode(text).ids for text in texts]
    assert [ids.tolist() for ids in pieces.encode_batch(texts)] == [processor.encode(text) for text in texts]
    assert (bpe.vocab_size, pieces.vocab_size) == (library.get_vocab_size(), processor.get_piece_size()) == (500, 600)
    assert bpe.end_of_document == library.token_to_id(END)
    assert pieces.end_of_document == processor.eos_id()


def test_no_special_tokens_are_added_and_settings_of_the_file_do_not_cut(tmp_path: Path, bpe_dir: Path, texts: list[str]) -> None:
    library = tokenizers.Tokenizer.from_file(str(bpe_dir / "tokenizer.json"))
    expected = [library.encode(text).ids for text in texts[:20]]
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END} $A {END}", pair=None, special_tokens=[(END, library.token_to_id(END))]
    )
    library.enable_truncation(5)
    library.enable_padding(length=64)
    library.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert [ids.tolist() for ids in loaded.encode_batch(texts[:20])] == expected


def test_vocabulary_counts_ids_with_gaps(tmp_path: Path, bpe_dir: Path) -> None:
    raw = json.loads((bpe_dir / "tokenizer.json").read_text())
    raw["model"]["vocab"]["far"] = 900
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert load_tokenizer(tmp_path).vocab_size == 901


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_transformers_reads_the_artifacts_folder(kind: str, request: pytest.FixtureRequest, texts: list[str]) -> None:
    from transformers import AutoTokenizer

    directory: Path = request.getfixturevalue(f"{kind}_dir")
    ours, manifest = open_tokenizer(directory)
    theirs = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    assert theirs.eos_token == manifest.info["end_of_document_text"] == {"bpe": END, "sentencepiece": "</s>"}[kind]
    assert theirs.eos_token_id == ours.end_of_document == manifest.info["end_of_document"]
    assert len(theirs) == ours.vocab_size == manifest.info["vocab_size"]
    for text in texts[:50]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids_of(ours, text)


@pytest.mark.parametrize("name", ["t5", "sentencepiece-test", "gpt2", "bert-base-uncased"])
def test_transformers_reads_artifacts_of_well_known_tokenizers(tmp_path: Path, name: str, c4_file: Path) -> None:
    from transformers import AutoTokenizer

    made = make(tmp_path, path=shared(f"tokenizers/{name}"))
    ours, _ = open_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert len(theirs) == ours.vocab_size == made.info["vocab_size"]
    assert theirs.eos_token_id == ours.end_of_document
    for text in [*real_texts(c4_file, 100), *odd_texts]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids_of(ours, text)


# --- text that looks like a special token --------------------------------------------------------------------------


@given(before=st.text(max_size=5), count=st.integers(1, 3), after=st.text(max_size=5))
def test_literal_special_tokens_are_ordinary_text(bpe: Tokenizer, pieces: Tokenizer, before: str, count: int, after: str) -> None:
    for tokenizer, names in ((bpe, [END]), (pieces, ["</s>", "<s>", "<unk>"])):
        for name in names:
            text = before + name * count + after
            ids = ids_of(tokenizer, text)
            assert tokenizer.end_of_document not in ids
            assert tokenizer.decode(ids) == (text if tokenizer is bpe else text.replace("\u2581", " "))


def test_a_token_that_the_file_does_not_call_special_is_ordinary_text_all_the_same(tmp_path: Path, bpe_dir: Path) -> None:
    raw = json.loads((bpe_dir / "tokenizer.json").read_text())
    raw["added_tokens"][0]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.encode_special_tokens = True
    assert 0 in library.encode(f"a{END}b").ids  # what would happen
    loaded = load_tokenizer(tmp_path)
    ids = ids_of(loaded, f"a{END}b")
    assert loaded.end_of_document == 0
    assert loaded.end_of_document not in ids
    assert loaded.decode([*ids, 0]) == f"a{END}b"


def test_literal_special_tokens_with_gpt_neox(neox: Tokenizer, neox_tokenizer: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(neox_tokenizer / "tokenizer.json"))
    special = {library.token_to_id(name) for name in (END, "<|padding|>")}
    assert (neox.end_of_document, neox.vocab_size, special) == (0, 50_277, {0, 1})
    for text in (END, f"a {END} b", f"{END}{END}\n", "<|padding|>", f"x<|padding|>{END}", f"   {END}   "):
        assert special & set(library.encode(text).ids)
        ids = ids_of(neox, text)
        assert not special & set(ids)
        assert neox.decode(ids) == text


@given(text=any_text)
def test_gpt_neox_gives_back_every_text_in_normal_form(neox: Tokenizer, text: str) -> None:
    """Unicode's normal form C, which this tokenizer's own normalizer makes."""
    assert neox.decode(ids_of(neox, text)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("policy", ["text", "special"])
def test_the_policy_for_special_token_text(bpe_dir: Path, neox_tokenizer: Path, policy: SpecialTokenText) -> None:
    for directory in (bpe_dir, neox_tokenizer):
        library = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        library.encode_special_tokens = policy == "text"
        tokenizer = load_tokenizer(directory, special_token_text=policy)
        for text in (END, f"a{END}b {END}", f"{END}{END}", "<|endoftext", "plain"):
            assert ids_of(tokenizer, text) == library.encode(text).ids
            assert ids_of(tokenizer, text).count(tokenizer.end_of_document) == (text.count(END) if policy == "special" else 0)
            assert tokenizer.decode(ids_of(tokenizer, text)) == (text.replace(END, "") if policy == "special" else text)
    assert isinstance(load_tokenizer(bpe_dir), HuggingFaceTokenizer)
    opened, _ = open_tokenizer(bpe_dir, special_token_text=policy)
    assert (opened.end_of_document in ids_of(opened, END)) == (policy == "special")


def test_under_special_the_end_of_documents_may_come_from_text(tmp_path: Path) -> None:
    word_level("</s>", special=False).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="the text '</s>' is encoded as this token"):
        make(tmp_path / "text", path=tmp_path / "tokenizer.json")
    make(tmp_path / "special", path=tmp_path / "tokenizer.json", special_token_text="special")
    tokenizer, _ = open_tokenizer(tmp_path / "special", special_token_text="special")
    assert ids_of(tokenizer, "a </s> b") == [0, 3, 1]
    assert tokenizer.decode([0, 3, 1]) == "a b"
    with pytest.raises(TokenizerError, match="the text '</s>' is encoded as this token"):
        open_tokenizer(tmp_path / "special")


def test_sentencepiece_knows_no_special_text(sentencepiece_dir: Path) -> None:
    for load in (
        lambda: load_tokenizer(sentencepiece_dir, None, "special"),
        lambda: open_tokenizer(sentencepiece_dir, special_token_text="special"),
    ):
        with pytest.raises(TokenizerError, match=r'corpus\.special_token_text: found "special", but .*tokenizer\.model .* set "text"'):
            load()


# --- vocabulary files ----------------------------------------------------------------------------------------------

odd_texts = [
    "",
    " ",
    "\0 a\r\n\tb",
    "e\u0301 \xe9 \xc9T\xc9",
    "\u65e5\u672c\u8a9e \U0001f468\u200d\U0001f469",
    "don't DON\u2019T",
    "12345 \xb2",
    "\ufffd\ufeff",
]


def real_texts(file: Path, count: int) -> list[str]:
    with file.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as data:
        return [json.loads(line)["text"] for line, _ in zip(io.TextIOWrapper(data, encoding="utf-8"), range(count), strict=False)]


def as_vocabulary_files(bpe_dir: Path, vocabulary: Path, merges: Path) -> None:
    model = json.loads((bpe_dir / "tokenizer.json").read_text())["model"]
    vocabulary.write_text(json.dumps(model["vocab"]))
    lines = [item if isinstance(item, str) else " ".join(item) for item in model["merges"]]
    merges.write_text("\n".join(["#version: 0.2", *lines, ""]))


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"), ("gpt2-vocab.json", "gpt2-merges.txt")])
def test_vocabulary_files_of_gpt2s_kind(tmp_path: Path, bpe_dir: Path, texts: list[str], names: tuple[str, str]) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    as_vocabulary_files(bpe_dir, mine / names[0], mine / names[1])
    library = tokenizers.Tokenizer.from_file(str(bpe_dir / "tokenizer.json"))
    library.encode_special_tokens = True
    for number, path in enumerate((mine, mine / names[0], mine / names[1])):
        loaded = load_tokenizer(path)
        assert [ids_of(loaded, text) for text in [*texts[:50], *odd_texts, END]] == [
            library.encode(text).ids for text in [*texts[:50], *odd_texts, END]
        ]
        assert (loaded.end_of_document, loaded.vocab_size) == (0, 500)
        assert loaded.decode([*ids_of(loaded, f"a {END}"), 0]) == f"a {END}"
        made = make(tmp_path / str(number), path=path)
        assert made.info["file"] == "tokenizer.json"
        opened, _ = open_tokenizer(tmp_path / str(number))
        assert [ids_of(opened, text) for text in texts[:50]] == [ids_of(loaded, text) for text in texts[:50]]
    before = times(tmp_path / "0")
    make(tmp_path / "0", path=mine)
    assert times(tmp_path / "0") == before
    (mine / names[1]).write_text((mine / names[1]).read_text() + "\n")
    with pytest.raises(ArtifactMismatchError, match=f"input {names[1]}"):
        make(tmp_path / "0", path=mine)


def test_gpt2_is_as_its_library_reads_it(c4_file: Path) -> None:
    folder = shared("tokenizers/gpt2")
    theirs = ByteLevelBPETokenizer.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    ours = load_tokenizer(folder)
    assert (ours.vocab_size, ours.end_of_document) == (50_257, 50_256)
    for text in [*real_texts(c4_file, 50), *odd_texts, END]:
        assert ids_of(ours, text) == theirs.encode(text).ids
        assert ours.decode(ids_of(ours, text)) == text
    assert ids_of(ours, "Hello world") == [15496, 995]  # as GPT-2's own encoder says
    assert 50_256 in ids_of(load_tokenizer(folder, special_token_text="special"), f"a{END}")


def test_bert_is_as_transformers_reads_it(tmp_path: Path, c4_file: Path) -> None:
    from transformers import BertTokenizerFast

    file = shared("tokenizers/bert-base-uncased/vocab.txt")
    shutil.copy(file, tmp_path)  # the reference is read of a folder: BertTokenizerFast(vocab_file=...) gives wrong ids
    texts = [*real_texts(c4_file, 100), *odd_texts, "Unaffable, na\xefve \u4e2d\u6587 ##ing"]
    for config in ({}, {"do_lower_case": False}, {"do_lower_case": True, "strip_accents": False}, {"tokenize_chinese_chars": False}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        theirs = BertTokenizerFast.from_pretrained(tmp_path, local_files_only=True)
        ours = load_tokenizer(tmp_path)
        assert [ids_of(ours, text) for text in texts] == [theirs(text, add_special_tokens=False)["input_ids"] for text in texts]
    ours = load_tokenizer(file)
    assert (ours.vocab_size, ours.end_of_document) == (30_522, 102)
    assert ids_of(ours, "Hello world") == [7592, 2088]
    assert not {100, 101, 102, 103} & set(ids_of(ours, "[CLS] a [SEP] [MASK] [UNK]"))
    special = load_tokenizer(file, special_token_text="special")
    assert ids_of(special, "[CLS] a [SEP]") == [101, 1037, 102]
    assert special.decode([101, 7592, 2088, 102]) == "hello world"


PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused1]", "a", "##b", "ab", "\xe9", "e"]


@pytest.mark.parametrize(
    ("extra", "config", "text", "expected"),
    [
        ([], None, "A aB \xc9", ["a", "ab", "e"]),  # no upper case in the vocabulary: lower-cased, accents stripped
        (["A"], None, "A aB \xe9", ["A", "[UNK]", "\xe9"]),
        (["A"], {"do_lower_case": True}, "A aB", ["a", "ab"]),
        ([], {"do_lower_case": False}, "A a", ["[UNK]", "a"]),
        ([], {"strip_accents": False}, "\xc9", ["\xe9"]),
        ([], None, "[SEP] a [unused1]", ["[UNK]", "[UNK]", "[UNK]", "a", "[UNK]", "[UNK]", "[UNK]"]),
    ],
)
def test_vocabulary_files_of_berts_kind(
    tmp_path: Path, extra: list[str], config: dict[str, bool] | None, text: str, expected: list[str]
) -> None:
    pieces = [*PIECES, *extra]
    (tmp_path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    make(tmp_path / "made", path=tmp_path)
    for tokenizer in (load_tokenizer(tmp_path), load_tokenizer(tmp_path / "vocab.txt"), open_tokenizer(tmp_path / "made")[0]):
        assert [pieces[number] for number in ids_of(tokenizer, text)] == expected
        assert (tokenizer.end_of_document, tokenizer.vocab_size) == (3, len(pieces))


@pytest.mark.parametrize(("name", "end", "size"), [("t5", 1, 32_000), ("sentencepiece-test", 2, 1_000)])
def test_well_known_sentencepiece_models(tmp_path: Path, name: str, end: int, size: int, c4_file: Path) -> None:
    folder = shared(f"tokenizers/{name}")
    (file,) = folder.glob("*.model")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
    made = make(tmp_path, path=file)
    for ours in (load_tokenizer(folder), load_tokenizer(file), open_tokenizer(tmp_path)[0]):
        assert (ours.end_of_document, ours.vocab_size) == (end, size) == (theirs.eos_id(), theirs.get_piece_size())
        for text in [*real_texts(c4_file, 50), *odd_texts, "a</s>b"]:
            assert ids_of(ours, text) == theirs.encode(text)
            assert end not in ids_of(ours, text)
    assert made.info["end_of_document_text"] == "</s>"


def test_the_forms_of_a_folder_have_an_order(tmp_path: Path, bpe_dir: Path, sentencepiece_dir: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES), encoding="utf-8")
    assert load_tokenizer(tmp_path).vocab_size == len(PIECES)
    as_vocabulary_files(bpe_dir, tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert load_tokenizer(tmp_path).vocab_size == 500
    shutil.copy(sentencepiece_dir / "tokenizer.model", tmp_path / "spiece.model")
    assert load_tokenizer(tmp_path).vocab_size == 600
    word_level(END).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).vocab_size == 4


# --- the end-of-document token -------------------------------------------------------------------------------------


def word_level(*names: str, special: bool = True) -> tokenizers.Tokenizer:
    """Words a and b, and ``names`` from id 3 on: special tokens, or words like the others."""
    vocabulary = {name: number for number, name in enumerate(["a", "b", "[UNK]", *(() if special else names)])}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if special:
        library.add_special_tokens(list(names))
    return library


def test_the_first_known_name_is_taken_unless_one_is_asked_for() -> None:
    assert HuggingFaceTokenizer(word_level("[SEP]", "</s>", "<eos>")).end_of_document == 4
    assert HuggingFaceTokenizer(word_level("[SEP]", "<|end_of_text|>")).end_of_document == 4
    assert HuggingFaceTokenizer(word_level("[SEP]", "</s>", END)).end_of_document == 5
    assert HuggingFaceTokenizer(word_level("[SEP]", "</s>", END), "[SEP]").end_of_document == 3


def test_without_an_end_of_document_token_there_is_an_error() -> None:
    with pytest.raises(TokenizerError, match=r"has none of <\|endoftext\|>, </s>.*name the token .* in tokenizer\.end_of_document"):
        HuggingFaceTokenizer(word_level("<end>"))
    assert HuggingFaceTokenizer(word_level("<end>"), "<end>").end_of_document == 3
    with pytest.raises(TokenizerError, match=r"tokenizer\.end_of_document: found '<stop>', which is not in the vocabulary of 5 tokens"):
        HuggingFaceTokenizer(word_level("</s>", "<end>"), "<stop>")


def test_a_token_that_text_can_make_cannot_end_documents(sentencepiece_dir: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.end_of_document: the text 'b' is encoded as this token"):
        HuggingFaceTokenizer(word_level(), "b")
    with pytest.raises(TokenizerError, match=r"tokenizer\.end_of_document: the text '</s>' is encoded as this token"):
        HuggingFaceTokenizer(word_level("</s>", special=False))
    with pytest.raises(TokenizerError, match=r"tokenizer\.end_of_document: the text '\\n' is encoded as this token"):
        load_tokenizer(sentencepiece_dir, "\n")  # a user-defined symbol
    assert load_tokenizer(sentencepiece_dir, "<s>").end_of_document == 1


def test_the_asked_token_is_trained_in(tmp_path: Path, texts: list[str]) -> None:
    manifest = make(tmp_path, texts, end_of_document="<stop>")
    tokenizer, _ = open_tokenizer(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.end_of_document == library.token_to_id("<stop>") == manifest.info["end_of_document"]
    assert library.token_to_id(END) is None
    assert tokenizer.end_of_document not in ids_of(tokenizer, "a <stop> b")


# --- training ------------------------------------------------------------------------------------------------------

TRAIN_ELSEWHERE = """
import json, sys
from pathlib import Path
from mates.preprocess.tokenizer import make_tokenizer
texts = json.loads(sys.stdin.read())
for kind, vocab_size in (("bpe", 500), ("sentencepiece", 600)):
    made = make_tokenizer(Path(sys.argv[1]) / kind, path=None, kind=kind, vocab_size=vocab_size, train_bytes=1_000_000,
                          end_of_document=None, texts=texts, inputs={})
    print(made.fingerprint)
"""


def test_training_is_deterministic(tmp_path: Path, bpe_dir: Path, sentencepiece_dir: Path, texts: list[str]) -> None:
    """Another process, another folder, another order of hashes: the same bytes."""
    command = [sys.executable, "-P", "-c", TRAIN_ELSEWHERE, str(tmp_path / "another-place")]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=True)
    for directory, fingerprint in zip((bpe_dir, sentencepiece_dir), done.stdout.split(), strict=True):
        manifest = artifact.verify(directory, "tokenizer")
        other = tmp_path / "another-place" / directory.name
        assert {name: (other / name).read_bytes() for name in manifest.files} == {
            name: (directory / name).read_bytes() for name in manifest.files
        }
        assert fingerprint == manifest.fingerprint


def test_training_reads_no_more_than_it_is_told(tmp_path: Path) -> None:
    read: list[str] = []

    def endless() -> Iterator[str]:
        while True:
            read.append("ünd " * 10)  # 50 bytes
            yield read[-1]

    make(tmp_path, endless(), train_bytes=5_000)
    assert len(read) == 100


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_documents_of_one_long_line_are_trained_on(tmp_path: Path, texts: list[str], kind: str) -> None:
    """Sentencepiece leaves lines of more than 4,192 bytes out unless told otherwise."""
    joined = " ".join(texts).replace("\n", " ")
    assert len(joined) > 50_000
    make(tmp_path, [joined, joined], kind=kind)
    tokenizer, _ = open_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 500
    assert len(ids_of(tokenizer, joined)) < len(joined.encode()) / 2


def test_training_on_too_little_is_a_tokenizer_error(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="there is no text to train a tokenizer on"):
        make(tmp_path / "none", [], kind="bpe")
    for name, texts in (("blank", [" \n "]), ("little", ["only a few words"])):
        with pytest.raises(TokenizerError, match=r"tokenizer\.vocab_size: .*5,?000"):
            make(tmp_path / name, texts, kind="sentencepiece", vocab_size=5_000)
        assert artifact.find_complete(tmp_path / name, kind="tokenizer", settings={}, inputs={}) is None


# --- what is refused -----------------------------------------------------------------------------------------------


def test_errors_name_the_file(tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(TokenizerError, match=re.escape(f"{path}: ") + message):
            load_tokenizer(path)

    refused(tmp_path / "none.json", "no such tokenizer file")
    refused(tmp_path, r"holds none of tokenizer\.json, a sentencepiece \.model, vocab\.json with")
    for name, data, message in (
        ("words.txt", b"a\nb", "unknown form; expected tokenizer.json, a sentencepiece .model, vocab.json with merges.txt"),
        ("vocab.txt", b"a\nb", r"not a WordPiece vocabulary of BERT's kind: it lacks \[UNK\], \[CLS\], \[SEP\]"),
        ("other-vocab.txt", b"\xff\n", "this file or its tokenizer_config.json cannot be read"),
        ("merges.txt", b"", "a BPE vocabulary is two files, and there is no .*vocab.json"),
        ("encoder.json", b"{}", "a BPE vocabulary is two files, and there is no .*vocab.bpe"),
        ("broken.json", b'{"model": ', "not a tokenizer.json of the tokenizers library"),
        ("other.json", b"{}", "not a tokenizer.json of the tokenizers library"),
        ("empty.json", b"", "not a tokenizer.json of the tokenizers library"),
        ("broken.model", b"\x0a\x01not a model", "not a sentencepiece model"),
        ("empty.model", b"", "not a sentencepiece model"),
    ):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, message)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    for data, message in ((b'{"a": 0}', "not a BPE vocabulary that fits"), (b"[", "not a BPE vocabulary that fits")):
        (tmp_path / "vocab.json").write_bytes(data)
        refused(tmp_path / "vocab.json", message)
    for data, message in (
        (b'{"a": 0, "b": 1, "ab": 2}', "found 2 of the 256 .* without </w>"),
        (b'{"a": 0, "b": 1, "ab": 2, "c</w>": 3}', "with </w>"),
    ):
        (tmp_path / "vocab.json").write_bytes(data)
        refused(tmp_path / "vocab.json", "not GPT-2's kind of BPE: " + ".*" + message)


def test_what_looks_like_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("./x", "../x", "/x/y", "~/x", "a/b/c", "a/b.json", "b.model", "vocab.txt", "vocab.bpe", str(tmp_path)):
        assert looks_like_path(name)
    for name in ("gpt2", "EleutherAI/pythia-1b", "google-bert/bert-base-uncased", "t5-v1.1"):
        assert not looks_like_path(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EleutherAI" / "pythia-1b").mkdir(parents=True)
    assert looks_like_path("EleutherAI/pythia-1b")


@pytest.mark.parametrize("name", ["./gone", "~/gone", "/gone/tokenizer.json", "gone.model", "gone.json", "vocab.txt", "a/b/c"])
def test_a_path_that_is_not_there_is_not_asked_of_the_model_hub(tmp_path: Path, name: str) -> None:
    with pytest.raises(TokenizerError, match=re.escape(f"tokenizer.path: {name}: no such file or folder")):
        make(tmp_path, path=name)


# --- the artifact --------------------------------------------------------------------------------------------------


def times(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}


def test_a_trained_tokenizer_is_made_once(tmp_path: Path, texts: list[str]) -> None:
    made = make(tmp_path, texts)
    before = times(tmp_path)

    def untouchable() -> Iterator[str]:
        raise AssertionError("texts were read again")
        yield ""

    assert make(tmp_path, untouchable()) == made
    assert times(tmp_path) == before
    changes: list[dict[str, Any]] = [
        {"vocab_size": 501},
        {"kind": "sentencepiece"},
        {"train_bytes": 9},
        {"end_of_document": "<end>"},
    ]
    for change in changes:
        with pytest.raises(ArtifactMismatchError, match=next(iter(change))):
            make(tmp_path, untouchable(), **change)
    assert times(tmp_path) == before
    assert open_tokenizer(tmp_path)[1] == made


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_tokenizer_that_is_taken_is_copied(tmp_path: Path, bpe_dir: Path, sentencepiece_dir: Path, as_folder: bool) -> None:
    for source, name in ((bpe_dir, "tokenizer.json"), (sentencepiece_dir, "tokenizer.model")):
        mine = tmp_path / f"mine-{name}"
        mine.mkdir()
        shutil.copy(source / name, mine / name)
        target = tmp_path / f"taken-{name}"
        made = make(target, path=mine if as_folder else mine / name)
        assert (target / name).read_bytes() == (source / name).read_bytes()
        assert open_tokenizer(target)[0].vocab_size == open_tokenizer(source)[0].vocab_size
        assert made.fingerprint == artifact.load(source).fingerprint  # trained or taken, it is the same tokenizer
        before = times(target)
        assert make(target, path=mine if as_folder else mine / name) == made
        assert times(target) == before

        with (mine / name).open("ab") as handle:
            handle.write(b"\n")
        with pytest.raises(ArtifactMismatchError, match=f'input file: "{made.inputs["file"]}"'):
            make(target, path=mine if as_folder else mine / name)


def test_models_of_any_name_in_a_folder_are_found(tmp_path: Path, sentencepiece_dir: Path) -> None:
    shutil.copy(sentencepiece_dir / "tokenizer.model", tmp_path / "spiece.model")
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, SentencePieceTokenizer)
    make(tmp_path / "taken", path=tmp_path)
    assert open_tokenizer(tmp_path / "taken")[0].vocab_size == loaded.vocab_size


# --- an encoder's tokenizer ----------------------------------------------------------------------------------------


def test_the_forms_of_one_tokenizer_encode_alike(tmp_path: Path, bpe_dir: Path) -> None:
    """Vocabulary files, what transformers writes, what comes around a text: one hash. Another vocabulary: another."""
    from transformers import AutoTokenizer

    vocabulary, saved, made = tmp_path / "vocabulary", tmp_path / "saved", tmp_path / "made"
    vocabulary.mkdir()
    (vocabulary / "vocab.txt").write_text("".join(f"{piece}\n" for piece in PIECES), encoding="utf-8")
    (vocabulary / "config.json").write_text('{"model_type": "bert"}')
    theirs = AutoTokenizer.from_pretrained(vocabulary, local_files_only=True)
    theirs(["a"], truncation=True, max_length=4, padding="max_length")  # it keeps these in its state
    theirs.save_pretrained(saved)
    make(made, path=vocabulary)
    expected = encoding_hash(load_encoder_tokenizer(vocabulary))
    assert {encoding_hash(load_encoder_tokenizer(folder)) for folder in (saved, made, made / "tokenizer.json")} == {expected}
    assert encoding_hash(theirs.backend_tokenizer) == expected
    (vocabulary / "vocab.txt").write_text("".join(f"{piece}\n" for piece in [*PIECES, "aa"]), encoding="utf-8")
    assert encoding_hash(load_encoder_tokenizer(vocabulary)) != expected
    assert load_encoder_tokenizer(saved).encode("[SEP] a ab").tokens[-2:] == ["a", "ab"]
    assert 3 not in load_encoder_tokenizer(saved).encode("[SEP] a " * 9).ids


def test_vocabularies_that_are_the_same_and_that_differ(bpe_dir: Path, sentencepiece_dir: Path) -> None:
    tokenizer = open_tokenizer(bpe_dir)[0]
    state = json.loads((bpe_dir / "tokenizer.json").read_text())
    same = tokenizers.Tokenizer.from_str(json.dumps(state))
    same.add_special_tokens(["[CLS]", "[MASK]"])  # ids of the encoder alone
    assert vocabulary_difference(tokenizer, same) == VocabularyDifference(text=[], special=[])
    names = {number: name for name, number in state["model"]["vocab"].items()}
    ordinary = [number for number in names if number not in (0, 1, 2)][5:100:30]
    for changed in (ordinary[:1], ordinary):
        vocabulary = {f"{name}?" if number in changed else name: number for number, name in names.items()}
        library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=names[1]))
        assert vocabulary_difference(tokenizer, library) == VocabularyDifference(text=changed, special=[])
    vocabulary = {"[SEP]" if name == END else name: number for number, name in names.items()}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=names[1]))
    assert vocabulary_difference(tokenizer, library) == VocabularyDifference(text=[], special=[tokenizer.end_of_document])
    small = tokenizers.Tokenizer(tokenizers.models.WordLevel({names[number]: number for number in range(400)}, unk_token=names[1]))
    assert vocabulary_difference(tokenizer, small).text == list(range(400, 500))
    pieces = open_tokenizer(sentencepiece_dir)[0]
    found = vocabulary_difference(pieces, same)
    assert {0, 1, 2} & {*found.special}
    assert sorted([*found.text, *found.special])[-1] == 599

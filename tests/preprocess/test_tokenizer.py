"""Tokenizers, taken and trained, against the libraries that they come from."""

from __future__ import annotations

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
from hypothesis import given
from hypothesis import strategies as st

from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactMismatchError, Manifest
from mates.preprocess.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerError,
    load_tokenizer,
    make_tokenizer,
    open_tokenizer,
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

    if kind == "sentencepiece":
        pytest.importorskip("google.protobuf", reason="transformers needs protobuf to read a sentencepiece model; it is not installed")
    directory: Path = request.getfixturevalue(f"{kind}_dir")
    ours, manifest = open_tokenizer(directory)
    theirs = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    assert theirs.eos_token == manifest.info["end_of_document_text"] == {"bpe": END, "sentencepiece": "</s>"}[kind]
    assert theirs.eos_token_id == ours.end_of_document == manifest.info["end_of_document"]
    assert len(theirs) == ours.vocab_size == manifest.info["vocab_size"]
    for text in texts[:50]:
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
    refused(tmp_path, r"holds neither tokenizer\.json nor a sentencepiece \.model")
    for name, data, message in (
        ("vocab.txt", b"a\nb", "unknown form; expected tokenizer.json or a sentencepiece .model"),
        ("broken.json", b'{"model": ', "not a tokenizer.json of the tokenizers library"),
        ("other.json", b"{}", "not a tokenizer.json of the tokenizers library"),
        ("empty.json", b"", "not a tokenizer.json of the tokenizers library"),
        ("broken.model", b"\x0a\x01not a model", "not a sentencepiece model"),
        ("empty.model", b"", "not a sentencepiece model"),
    ):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, message)


@pytest.mark.parametrize("name", ["./gone", "/gone/tokenizer.json", "gone.model", "gone.json", "a/b/c"])
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

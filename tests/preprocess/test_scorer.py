"""An encoder's tokens beside the language model's: each where it begins, against offsets counted in plain Python."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import zstandard
from conftest import shared
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from mates.preprocess import artifact, scorer, spans
from mates.preprocess.artifact import ArtifactError, ArtifactMismatchError, Manifest
from mates.preprocess.corpus import SPLITS, CorpusSettings, SplitShares, make_corpora
from mates.preprocess.encode import EngineDifferenceError, LibraryEngine, edge_texts
from mates.preprocess.indexed import open_indexed
from mates.preprocess.inputs import find_inputs
from mates.preprocess.parts import PartFiles, PartRecord
from mates.preprocess.readers import ReadOptions
from mates.preprocess.scorer import STRIDE, Scorer, ScorerTokenizer, open_scorer_tokens, read_scorer_tokenizer
from mates.preprocess.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerError,
    load_tokenizer,
    make_tokenizer,
    open_tokenizer,
)

from .test_corpus_parallel import environment, hashes, mpirun

END = "<|endoftext|>"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ENCODERS = ("bert", "roberta", "unigram")
LANGUAGE_MODELS = ("bpe", "nfc", "prefix space", "sentencepiece", "wordpiece")

# --- tokenizers trained here ---------------------------------------------------------------------------------------


def byte_level(texts: Sequence[str], size: int, *, prefix: bool = False, special: Sequence[str] = (END,)) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    library.decoder = decoders.ByteLevel()
    library.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(texts, trainer)
    return library


def wordpiece(texts: Sequence[str], size: int = 400) -> tokenizers.Tokenizer:
    """As bert-base-uncased: lower case, no accents, characters of CJK apart."""
    library = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False))
    library.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return library


def unigram(texts: Sequence[str]) -> tokenizers.Tokenizer:
    """As T5 and its kind: compatibility forms, a mark for spaces, bytes of what is unknown."""
    library = tokenizers.Tokenizer(models.Unigram())
    library.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("a", "")])
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False)
    library.train_from_iterator(texts, trainer)
    return library


def train_encoder(name: str, texts: Sequence[str]) -> tokenizers.Tokenizer:
    if name == "bert":
        return wordpiece(texts)
    return byte_level(texts, 600, special=["<s>", "</s>"]) if name == "roberta" else unigram(texts)


def train_language_model(name: str, texts: Sequence[str], folder: Path) -> Path:
    if name == "sentencepiece":
        settings: dict[str, Any] = {"kind": name, "vocab_size": 600, "path": None, "train_bytes": 1_000_000}
        make_tokenizer(folder, end_of_document=None, texts=texts, inputs={}, **settings)
        return folder
    library = wordpiece(texts, 350) if name == "wordpiece" else byte_level(texts, 500, prefix=name == "prefix space")
    if name == "nfc":
        library.normalizer = normalizers.NFC()
        library.add_tokens([" " * count for count in range(6, 1, -1)])
        library.add_tokens([tokenizers.AddedToken("qq", lstrip=True)])
    library.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> dict[str, Path]:
    """Their files cut and fill up texts, and put special tokens around them."""
    folders = {name: tmp_path_factory.mktemp("encoder") for name in ENCODERS}
    for name, folder in folders.items():
        library = train_encoder(name, texts)
        library.enable_truncation(12)
        library.enable_padding(length=12)
        library.save(str(folder / "tokenizer.json"))
    return folders


@pytest.fixture(scope="session")
def language_models(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> dict[str, Any]:
    return {name: load_tokenizer(train_language_model(name, texts, tmp_path_factory.mktemp("model"))) for name in LANGUAGE_MODELS}


# --- by brute force ------------------------------------------------------------------------------------------------


def bare(state: str) -> tokenizers.Tokenizer:
    """The library's tokenizer without what it adds, with offsets as they are before spaces are trimmed."""
    library = tokenizers.Tokenizer.from_str(json.dumps(json.loads(state) | {"post_processor": None, "truncation": None, "padding": None}))
    library.encode_special_tokens = True
    return library


def token_ends(tokenizer: Any, text: str) -> list[int]:
    """The byte behind each token of a text."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return [piece.end for piece in tokenizer.library.encode(text, return_type="proto").pieces]
    return [len(text[:end].encode()) for _, end in bare_copy(tokenizer).encode(text).offsets]


@cache
def bare_copy(tokenizer: Any) -> tokenizers.Tokenizer:
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return bare(tokenizer.library.to_str())


def slices_by_brute_force(ends: Sequence[int], encoded: tokenizers.Encoding, text: str) -> list[list[int]]:
    """Encoder tokens of each of a document's tokens."""
    slices: list[list[int]] = [[] for _ in ends]
    owner = 0
    for number, (start, _) in zip(encoded.ids, encoded.offsets, strict=True):
        begin = len(text[:start].encode())
        owner = max(owner, next((token for token, end in enumerate(ends) if end > begin), len(ends) - 1))
        if ends:
            slices[owner].append(number)
    return slices


def slices_of(counts: Sequence[int], ids: Sequence[int]) -> list[list[int]]:
    rest = iter(ids)
    return [list(itertools.islice(rest, count)) for count in counts]


@cache
def opened(encoder: Path, tokenizer: Any) -> tuple[Scorer, tokenizers.Tokenizer]:
    """The encoder, ours and by itself."""
    return Scorer(read_scorer_tokenizer(encoder), tokenizer, "library"), bare((encoder / "tokenizer.json").read_text())


def check(make: Scorer, library: tokenizers.Tokenizer, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    ids, offsets = LibraryEngine(tokenizer).encode(texts, ends=True)
    block = make(texts, ids, offsets)
    assert len(block.counts) == len(ids)
    assert block.counts.sum() == block.lengths.sum() == len(block.ids)
    firsts = np.append(0, np.cumsum(block.lengths))
    for number, text in enumerate(texts):
        own = block.ids[firsts[number] : firsts[number + 1]].tolist()
        counts = block.counts[offsets[number] : offsets[number + 1]].tolist()
        if not counts:
            assert own == []
            continue
        encoded = library.encode(text, add_special_tokens=False)
        assert own == encoded.ids
        assert slices_of(counts, own) == [*slices_by_brute_force(token_ends(tokenizer, text), encoded, text), []]


SPECIAL_PARTS = [END, *SPECIAL, "</s>", "qq", " ", "  ", "\n", "\t", "\0", "\ufffd", "\u200b", "Ab", "ba de", "é", "e\u0301", "İ", "ß", "ﬁ"]
ODD_PARTS = [
    "日本", "한", "\u1112\u1161\u11ab", "\U0001f468\u200d\U0001f469", "❤️", "\u0344", "a\u0327\u0301", "\u0301" * 3, "\u0915\u094d", "½"
]  # fmt: skip
any_texts = st.lists(st.text(max_size=20) | st.lists(st.sampled_from(SPECIAL_PARTS + ODD_PARTS), max_size=10).map("".join), max_size=4)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("model", LANGUAGE_MODELS)
@given(texts=any_texts)
def test_each_encoder_token_is_in_the_token_that_it_begins_in(
    language_models: dict[str, Any], encoders: dict[str, Path], model: str, encoder: str, texts: list[str]
) -> None:
    check(*opened(encoders[encoder], language_models[model]), language_models[model], texts)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("model", LANGUAGE_MODELS)
def test_documents(
    language_models: dict[str, Any],
    encoders: dict[str, Path],
    texts: list[str],
    model: str,
    encoder: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Much longer than the encoder reads, and nothing is said about it."""
    tokenizer = language_models[model]
    check(*opened(encoders[encoder], tokenizer), tokenizer, [*texts[:20], "", " ".join(texts[20:50]), "".join(ODD_PARTS), "👍🏽" * 30])
    assert capfd.readouterr() == ("", "")


def test_it_does_not_matter_which_texts_come_together(
    language_models: dict[str, Any], encoders: dict[str, Path], texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = language_models["nfc"]
    make = Scorer(read_scorer_tokenizer(encoders["bert"]), tokenizer, "library")
    chosen = [*texts[:30], "", "e\u0301 x", " qq "]
    whole = make(chosen, *LibraryEngine(tokenizer).encode(chosen, ends=True))
    alone = [make([text], *LibraryEngine(tokenizer).encode([text], ends=True)) for text in chosen]
    monkeypatch.setattr(scorer, "BATCH_CHARACTERS", 700)
    monkeypatch.setattr(spans, "KEPT_CHARACTERS", 100)
    again = make(chosen, *LibraryEngine(tokenizer).encode(chosen, ends=True))  # words that were known are forgotten
    for name in ("ids", "lengths", "counts"):
        assert np.concatenate([getattr(block, name) for block in alone]).tolist() == getattr(whole, name).tolist()
        assert getattr(again, name).tolist() == getattr(whole, name).tolist()


@given(texts=any_texts)
def test_ids_alone_say_where_tokens_of_bytes_end(language_models: dict[str, Any], texts: list[str]) -> None:
    """And the library is not asked."""
    tokenizer = language_models["bpe"]
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    ids, offsets = LibraryEngine(tokenizer).encode(texts, ends=True)
    ends = spans.TokenEnds(tokenizer, "library")
    ends._library = None  # type: ignore[assignment]
    found = ends(texts, ids, offsets, spans.TextBytes(texts))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    begins = itertools.accumulate((len(text.encode()) for text in texts), initial=0)
    expected = []
    for begin, text in zip(begins, texts, strict=False):
        lengths = [len(letters) for letters in tokenizer.library.encode(text, add_special_tokens=False).tokens]  # a letter a byte
        expected += [*itertools.accumulate(lengths[1:], initial=begin + lengths[0]), begin + len(text.encode())] if lengths else []
    assert found.tolist() == expected


def test_special_token_text_has_the_width_of_its_text(language_models: dict[str, Any], encoders: dict[str, Path]) -> None:
    """Where the language model makes a special token of it; to the encoder it is text all the same."""
    library = tokenizers.Tokenizer.from_str(language_models["bpe"].library.to_str())
    tokenizer = HuggingFaceTokenizer(library, special_token_text="special")
    text = f"ba{END} de[SEP]{END}{END}"
    block = Scorer(read_scorer_tokenizer(encoders["bert"]), tokenizer, "library")(
        [text], *LibraryEngine(tokenizer).encode([text], ends=True)
    )
    encoded = read_scorer_tokenizer(encoders["bert"]).open().encode(text)
    assert not {2, 3} & {*encoded.ids}
    ends = [len(text[:end].encode()) for _, end in library.encode(text).offsets]
    assert len(ends) < 12
    assert slices_of(block.counts.tolist(), block.ids.tolist()) == [*slices_by_brute_force(ends, encoded, text), []]


def assert_words_serve(library: tokenizers.Tokenizer, texts: Sequence[str]) -> None:
    assert spans.WordStarts.serves(library)
    by_words = spans.WordStarts(library)
    whole = spans.LibraryStarts(library)(texts)
    for _ in range(2):  # new words, then known ones
        found = by_words(texts)
        assert all(np.array_equal(found[item], whole[item]) for item in range(3))


@pytest.mark.parametrize(
    "normalizer", [{}, {"lowercase": False}, {"strip_accents": True, "lowercase": False}, {"handle_chinese_chars": False}]
)
def test_texts_of_berts_kind_are_their_words(encoders: dict[str, Path], texts: list[str], normalizer: dict[str, bool]) -> None:
    """Whatever stands around a space, and in whatever order."""
    library = read_scorer_tokenizer(encoders["bert"]).open()
    library.normalizer = normalizers.BertNormalizer(**normalizer)
    edges = edge_texts(SPECIAL)
    assert_words_serve(library, [*edges, *texts])
    assert_words_serve(library, [f"{one} {other}" for one, other in itertools.pairwise(edges)])


def test_other_kinds_are_not_read_by_words(encoders: dict[str, Path]) -> None:
    assert not any(spans.WordStarts.serves(read_scorer_tokenizer(encoders[name]).open()) for name in ("roberta", "unigram"))
    library = read_scorer_tokenizer(encoders["bert"]).open()
    library.add_tokens(["ba de"])
    assert not spans.WordStarts.serves(library)


def test_offsets_of_other_ids_are_refused(language_models: dict[str, Any], encoders: dict[str, Path]) -> None:
    """The library's offsets belong to the library's ids: an engine that gave others is found out."""
    tokenizer = language_models["wordpiece"]
    ids, offsets = LibraryEngine(tokenizer).encode(["ba de"], ends=True)
    with pytest.raises(EngineDifferenceError, match="engine fast: text 'ba de'"):
        Scorer(read_scorer_tokenizer(encoders["bert"]), tokenizer, "fast")(["ba de"], ids[::-1].copy(), offsets)


# --- more than a count can hold ------------------------------------------------------------------------------------


def words_and_letters(folder: Path) -> tuple[Tokenizer, ScorerTokenizer]:
    """A language model that knows the word a alone, and an encoder of letters."""
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([END])
    letters = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    letters.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")])
    letters.save(str(folder / "letters.json"))
    return HuggingFaceTokenizer(words), read_scorer_tokenizer(folder / "letters.json")


@pytest.mark.parametrize(
    ("text", "counts", "kept"),
    [
        ("b" * 255 + " a a", [255, 1, 1], 257),
        ("b" * 256 + " a a", [255, 2, 1], 258),
        ("a " + "b" * 600 + " a a a", [1, 255, 255, 92, 1], 604),
        ("a " + "b" * 600 + " a", [1, 255, 255], 511),
        ("b" * 300, [255], 255),
        ("b" * 255 + " " + "b" * 256 + " a", [255, 255, 2], 512),
    ],
)
def test_what_a_count_cannot_hold_goes_to_the_next_tokens(tmp_path: Path, text: str, counts: list[int], kept: int) -> None:
    tokenizer, encoder = words_and_letters(tmp_path)
    texts = ["a b", text, "", "b a"]
    block = Scorer(encoder, tokenizer, "library")(texts, *LibraryEngine(tokenizer).encode(texts, ends=True))
    assert block.counts.tolist() == [1, 1, 0, *counts, 0, 1, 1, 0]
    assert block.lengths.tolist() == [2, kept, 0, 2]
    letters = [0 if letter == "a" else 1 for letter in text.replace(" ", "")]
    assert block.ids.tolist() == [0, 1, *letters[:kept], 1, 0]


@given(counts=st.lists(st.integers(0, 20), max_size=40), first=st.integers(0, 30), before=st.integers(0, 9))
def test_starts_of_a_run(counts: list[int], first: int, before: int) -> None:
    """Every run gives the starts that lie in it."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr(scorer, "STRIDE", 7)
        number, starts = scorer.starts_of(np.array(counts, np.uint8), first_token=first, first_scorer_token=before)
    places = [place for place in range(first, first + len(counts)) if place % 7 == 0]
    assert starts.tolist() == [before + sum(counts[: place - first]) for place in places]
    assert not places or number == places[0] // 7
    assert starts.dtype == np.int64


# --- corpora -------------------------------------------------------------------------------------------------------

SETTINGS = CorpusSettings(shares=SplitShares(pool=0.2, holdout=0.1, seed=5), reading=ReadOptions(keep_empty=True), features=())
PART_BYTES = 30_000
SCRIPT = """
import sys
from pathlib import Path
from mates.preprocess.inputs import find_inputs
from mates.preprocess.corpus import make_corpora
from mates.preprocess.ranks import find_ranks
from tests.preprocess.test_scorer import PART_BYTES, SETTINGS
if __name__ == "__main__":
    directory, inputs, tokenizer, encoder, workers = sys.argv[1:]
    make_corpora(
        Path(directory), inputs=find_inputs([inputs]), settings=SETTINGS, tokenizer_dir=Path(tokenizer), scorer_tokenizer=Path(encoder),
        workers=int(workers), part_bytes=PART_BYTES, ranks=find_ranks(),
    )
"""
FILES = ("scorer.bin", "scorer.idx", "scorer_counts.bin", "scorer_starts.bin")


@pytest.fixture(scope="module")
def documents(texts: list[str]) -> list[str]:
    """Empty ones and odd ones between the others."""
    return [*texts[:150], "", "", "e\u0301", *texts[150:400], "".join(ODD_PARTS), "", "İ" * 30, *SPECIAL, *texts[400:]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    for number, part in enumerate((documents[:500], documents[500:503], documents[503:])):
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return folder


def make(
    directory: Path, inputs: Path, bpe_dir: Path, encoder: Path | None, workers: int = 1, part_bytes: int = PART_BYTES
) -> dict[str, Manifest]:
    given: dict[str, Any] = {"inputs": find_inputs([str(inputs)]), "settings": SETTINGS, "tokenizer_dir": bpe_dir}
    return make_corpora(directory, scorer_tokenizer=encoder, workers=workers, part_bytes=part_bytes, **given)


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, inputs: Path, bpe_dir: Path, encoders: dict[str, Path]
) -> tuple[Path, dict[str, Manifest], dict[str, str]]:
    directory = tmp_path_factory.mktemp("made")
    manifests = make(directory, inputs, bpe_dir, encoders["bert"])
    found = hashes(directory)
    assert len([name for name in found if name.startswith("train/documents/")]) > 8  # parts
    return directory, manifests, found


Made = tuple[Path, dict[str, Manifest], dict[str, str]]


def test_a_corpus_with_encoder_tokens(made: Made, documents: list[str], bpe_dir: Path, encoders: dict[str, Path]) -> None:
    directory, manifests, _ = made
    tokenizer, _ = open_tokenizer(bpe_dir)
    library = bare((encoders["bert"] / "tokenizer.json").read_text())
    for split in SPLITS:
        own = [text for text in documents if SETTINGS.shares.split_of(text) == split]
        tokens, encoded = open_indexed(directory / split / "tokens"), open_indexed(directory / split / "scorer")
        assert [encoded.document(number).tolist() for number in range(encoded.documents)] == [library.encode(text).ids for text in own]
        found = open_scorer_tokens(directory / split, len(tokens.tokens))
        expected: list[list[int]] = []
        for text in filter(None, own):
            expected += [*slices_by_brute_force(token_ends(tokenizer, text), library.encode(text), text), []]
        assert found.counts.tolist() == [len(item) for item in expected]
        assert found.starts.tolist() == [int(found.counts[:place].sum()) for place in range(0, len(tokens.tokens), STRIDE)]
        assert len(found.starts) > (2 if split == "train" else 0)
        info = manifests[split].info["scorer"]
        assert info == {
            "tokenizer": str(encoders["bert"]),
            "hash": info["hash"],
            "vocab_size": 400,
            "dtype": "uint16",
            "tokens": len(encoded.tokens),
        }
        for length, limit in ((1, 9), (7, 10**9), (64, 20), (5_000, 10**9)):
            firsts = np.arange(0, len(tokens.tokens), length)[::-1]
            slices = [list(itertools.chain(*expected[first : first + length]))[:limit] for first in firsts]
            assert [window.tolist() for window in found.windows(firsts, length, limit)] == slices
        assert artifact.verify(directory / split) == manifests[split]


def test_it_adds_files_and_changes_none(tmp_path: Path, made: Made, inputs: Path, bpe_dir: Path) -> None:
    _, manifests, found = made
    without = make(tmp_path, inputs, bpe_dir, None)
    assert hashes(tmp_path) == {name: value for name, value in found.items() if not name.endswith(FILES)}
    assert {name.split("/")[1] for name in found if name not in hashes(tmp_path)} == set(FILES)
    for split in SPLITS:
        assert "scorer" not in without[split].info
        assert set(without[split].inputs) == {"tokenizer"}
        assert without[split].settings == manifests[split].settings
        assert without[split].fingerprint != manifests[split].fingerprint


def test_a_changed_file_is_found(tmp_path: Path, made: Made) -> None:
    directory = tmp_path / "train"
    for name in FILES:
        shutil.rmtree(tmp_path)
        shutil.copytree(made[0] / "train", directory)
        data = bytearray((directory / name).read_bytes())
        data[-1] ^= 1
        (directory / name).write_bytes(data)
        with pytest.raises(ArtifactError, match=rf"{name}: BLAKE3 \w+.*the file was changed"):
            artifact.verify(directory)
    tokens = len(open_indexed(directory / "tokens").tokens)
    with pytest.raises(ArtifactError, match=rf"scorer_counts.bin: {tokens} bytes, expected {tokens + 1} for {tokens + 1} tokens"):
        open_scorer_tokens(directory, tokens + 1)
    (directory / "scorer_starts.bin").unlink()
    with pytest.raises(ArtifactError, match=r"scorer_starts.bin: None bytes"):
        open_scorer_tokens(directory, tokens)


def test_other_encoders_are_refused(tmp_path: Path, inputs: Path, bpe_dir: Path, encoders: dict[str, Path]) -> None:
    make(tmp_path, inputs, bpe_dir, encoders["bert"])
    moved = tmp_path / "moved"
    shutil.copytree(encoders["bert"], moved)
    make(tmp_path, inputs, bpe_dir, moved / "tokenizer.json")  # the same one, elsewhere
    for other, message in (
        (encoders["roberta"], "input scorer_tokenizer: .*now asked"),
        (None, "input scorer_tokenizer: .*now not asked for"),
    ):
        with pytest.raises(ArtifactMismatchError, match=message):
            make(tmp_path, inputs, bpe_dir, other)


def test_what_is_no_encoders_tokenizer(tmp_path: Path, inputs: Path, bpe_dir: Path, texts: list[str]) -> None:
    pieces = train_language_model("sentencepiece", texts, tmp_path / "pieces")
    (tmp_path / "tokenizer.json").write_text("{}")
    for path, message in ((pieces, "a sentencepiece model"), (tmp_path / "gone", "no such"), (tmp_path, "not a tokenizer.json")):
        with pytest.raises(TokenizerError, match=rf"corpus\.scorer_tokenizer: .*{message}"):
            make(tmp_path / "out", inputs, bpe_dir, path)
    assert not (tmp_path / "out").exists()


def test_a_language_model_without_offsets_is_refused(
    tmp_path: Path, inputs: Path, encoders: dict[str, Path], texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_proto(*arguments: object, **named: object) -> None:
        raise ValueError("no protobuf")

    pieces = train_language_model("sentencepiece", texts, tmp_path / "pieces")
    monkeypatch.setattr(spans._SentencePieceEnds, "__call__", no_proto)
    with pytest.raises(TokenizerError, match=r"corpus\.scorer_tokenizer: .*does not say where its tokens lie in a text \(no protobuf\)"):
        make(tmp_path / "out", inputs, pieces, encoders["bert"])


# --- the same bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 1)])
def test_any_number_of_processes_gives_the_same_bytes(
    tmp_path: Path, made: Made, inputs: Path, bpe_dir: Path, encoders: dict[str, Path], ranks: int, workers: int
) -> None:
    script = tmp_path / "make.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-P", str(script), str(tmp_path / "out"), str(inputs), str(bpe_dir), str(encoders["bert"]), str(workers)]
    run = command if ranks == 1 else [mpirun(), "-n", str(ranks), *command]
    subprocess.run(run, check=True, env=environment(), timeout=300)
    assert hashes(tmp_path / "out") == made[2]


def test_part_size_does_not_show(tmp_path: Path, made: Made, inputs: Path, bpe_dir: Path, encoders: dict[str, Path]) -> None:
    make(tmp_path, inputs, bpe_dir, encoders["bert"], part_bytes=1 << 20)
    found = hashes(tmp_path)
    for split, name in itertools.product(SPLITS, FILES):
        assert found[f"{split}/{name}"] == made[2][f"{split}/{name}"]


def interrupt(*arguments: object, **named: object) -> None:
    raise KeyboardInterrupt


def test_interrupted_at_every_part_and_every_joined_part(
    tmp_path: Path, made: Made, inputs: Path, bpe_dir: Path, encoders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mates.preprocess import join, parts

    count = 0

    def every_second(whole: Callable[..., Any]) -> Callable[..., Any]:
        def then_interrupted(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count % 2 == 0:
                raise KeyboardInterrupt
            return whole(*arguments)

        return then_interrupted

    def remove(files: PartFiles, record: PartRecord) -> None:
        whole_remove(files, record)

    whole_remove = join.remove_part
    monkeypatch.setattr(parts.PartWriter, "__call__", every_second(parts.PartWriter.__call__))
    monkeypatch.setattr(join, "remove_part", every_second(remove))
    for _ in range(200):
        try:
            make(tmp_path, inputs, bpe_dir, encoders["bert"])
        except KeyboardInterrupt:
            continue
        break
    assert count > 30
    assert hashes(tmp_path) == made[2]


@pytest.mark.parametrize("kind", ["*.scorer.bin", "*.scorer.lengths", "*.scorer.counts"])
@pytest.mark.parametrize("damage", ["zeros", "cut", "gone"])
def test_what_a_crash_of_the_machine_took_is_made_again(
    tmp_path: Path,
    made: Made,
    inputs: Path,
    bpe_dir: Path,
    encoders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    damage: str,
) -> None:
    from mates.preprocess import corpus

    with monkeypatch.context() as context:
        context.setattr(corpus, "_prepare_join", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, inputs, bpe_dir, encoders["bert"])
    path = sorted(path for path in next(tmp_path.glob("unfinished-*")).glob(kind) if path.stat().st_size)[1]
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(bytes(path.stat().st_size) if damage == "zeros" else path.read_bytes()[:-1])
    make(tmp_path, inputs, bpe_dir, encoders["bert"])
    assert hashes(tmp_path) == made[2]


@pytest.mark.parametrize("name", FILES)
def test_joined_files_that_were_lost_are_made_again(
    tmp_path: Path, made: Made, inputs: Path, bpe_dir: Path, encoders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Before they have their names, and after."""
    from mates.preprocess import corpus

    for place, lost in ((corpus, f"pool/.{name}.*.joining"), (artifact, f"pool/{name}")):
        with monkeypatch.context() as context:
            context.setattr(place, "_finish" if place is corpus else "commit", interrupt)
            with pytest.raises(KeyboardInterrupt):
                make(tmp_path / place.__name__, inputs, bpe_dir, encoders["bert"])
        path = next(path for split in ("train", "pool") for path in (tmp_path / place.__name__).glob(lost.replace("pool", split)))
        path.unlink()
        make(tmp_path / place.__name__, inputs, bpe_dir, encoders["bert"])
        assert hashes(tmp_path / place.__name__) == made[2]


# --- real text -----------------------------------------------------------------------------------------------------


def test_c4_with_gpt_neox_and_bert(c4_file: Path, neox_tokenizer: Path) -> None:
    with c4_file.open("rb") as handle, zstandard.ZstdDecompressor().stream_reader(handle) as stream:
        texts = [json.loads(line)["text"] for line in stream.read().splitlines()[:1_000]]
    tokenizer, encoder = load_tokenizer(neox_tokenizer), read_scorer_tokenizer(shared("tokenizers/bert-base-uncased"))
    assert_words_serve(encoder.open(), texts)
    odd = [*ODD_PARTS, *SPECIAL_PARTS, " ".join(ODD_PARTS + SPECIAL_PARTS)]
    check(Scorer(encoder, tokenizer, "library"), encoder.open(), tokenizer, [*texts[:120], *odd])


def test_ids_are_those_of_transformers(tmp_path: Path, neox_tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    shutil.copy(shared("tokenizers/bert-base-uncased/vocab.txt"), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    texts = [" ".join(ODD_PARTS + SPECIAL_PARTS), "Unaffable, naïve 中文 ##ing " * 300, *SPECIAL]
    tokenizer = load_tokenizer(neox_tokenizer)
    block = Scorer(read_scorer_tokenizer(tmp_path), tokenizer, "library")(texts, *LibraryEngine(tokenizer).encode(texts, ends=True))
    expected = [theirs(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"] for text in texts]
    assert block.ids.tolist() == list(itertools.chain(*expected))

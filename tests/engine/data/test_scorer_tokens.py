"""Encoder tokens of samples: those of the text of their tokens, in corpora and unions of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from synthetic_run import make_recipe
from tokenizers import models, normalizers, pre_tokenizers

from mates.engine.config import CorpusConfig, Recipe, RecipeError
from mates.engine.data import steps
from mates.engine.data.corpus import open_corpus
from mates.engine.layout import layout_of
from mates.preprocess.artifact import ArtifactError
from mates.preprocess.tokenizer import encoding_hash, load_encoder_tokenizer

LENGTH = 32


def write_encoder(folder: Path, letters: str) -> Path:
    """One token a letter; unknown ones are 0."""
    library = tokenizers.Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(f"?{letters}")}, unk_token="?"))
    library.normalizer = normalizers.Lowercase()
    library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")])
    folder.mkdir()
    library.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> list[Recipe]:
    """Corpora of one tokenizer: two with the tokens of one encoder, one with another's, one with none."""
    folder = tmp_path_factory.mktemp("made")
    first = make_recipe(folder / "a")
    steps.tokenizer_step(first)
    lines = Path(first.corpus.inputs[0]).read_text().splitlines()
    one, other = (write_encoder(folder / name, letters) for name, letters in (("one", "abcdefghij"), ("other", "jihg")))
    made = []
    for number, encoder in enumerate((one, one / "tokenizer.json", other, None)):
        (folder / f"{number}.jsonl").write_text("".join(f"{line}\n" for line in lines[number * 170 : number * 170 + 170]))
        corpus = replace(first.corpus, inputs=[str(folder / f"{number}.jsonl")], scorer_tokenizer=str(encoder) if encoder else None)
        tokenizer = replace(first.tokenizer, path=str(layout_of(first).tokenizer / "tokenizer.json"))
        made.append(replace(first, run_dir=str(folder / f"run{number}"), tokenizer=tokenizer, corpus=corpus))
        steps.tokenizer_step(made[-1])
        steps.preprocess_step(made[-1])
    return made


def train_corpus(recipe: Recipe) -> Path:
    return layout_of(recipe).corpus("train")


def united(recipe: Recipe, parts: list[Recipe], run_dir: Path) -> Path:
    whole = replace(recipe, run_dir=str(run_dir), corpus=CorpusConfig(union=[str(layout_of(part).data) for part in parts]))
    steps.tokenizer_step(whole)
    steps.preprocess_step(whole)
    return train_corpus(whole)


@pytest.mark.parametrize("length", [1, 17, LENGTH, 1_000])
def test_samples_have_the_encoder_tokens_of_their_text(recipes: list[Recipe], length: int) -> None:
    """The tokenizer is made of bytes and the encoder of letters: the tokens' text says all."""
    corpus = open_corpus(train_corpus(recipes[0]), length, verify=True)
    library = tokenizers.Tokenizer.from_file(str(layout_of(recipes[0]).tokenizer / "tokenizer.json"))
    encoder = load_encoder_tokenizer(Path(str(recipes[0].corpus.scorer_tokenizer)))
    chosen = np.random.default_rng(0).permutation(corpus.samples)[:100]
    for limit in (10**9, 5):
        found = corpus.scorer_tokens(chosen, limit)
        for window, tokens in zip(corpus.windows(chosen), found, strict=True):
            expected = encoder.encode(library.decode(window[:-1].tolist())).ids[:limit]
            assert tokens.tolist() == expected
            assert tokens.dtype == np.uint16
    assert corpus.has_scorer_tokens
    assert corpus.scorer_hash == encoding_hash(encoder)
    assert corpus.scorer_tokens(np.zeros(0, np.int64), 5) == []
    for bad in (-1, corpus.samples):
        with pytest.raises(IndexError, match=f"of {corpus.samples}"):
            corpus.scorer_tokens(np.array([bad]), 5)


def test_samples_of_a_union_are_those_of_its_parts(recipes: list[Recipe], tmp_path: Path) -> None:
    parts = [open_corpus(train_corpus(recipe), LENGTH) for recipe in recipes[:2]]
    whole = open_corpus(united(recipes[0], recipes[:2], tmp_path), LENGTH)
    assert whole.has_scorer_tokens
    assert whole.scorer_hash == parts[0].scorer_hash == parts[1].scorer_hash
    expected = [tokens.tolist() for part in parts for tokens in part.scorer_tokens(np.arange(part.samples), 40)]
    mixed = np.random.default_rng(0).permutation(whole.samples)
    assert [tokens.tolist() for tokens in whole.scorer_tokens(mixed, 40)] == [expected[sample] for sample in mixed]


def test_unions_that_do_not_fit_are_refused_where_it_matters(recipes: list[Recipe], tmp_path: Path) -> None:
    """The tokens of the language model can be read all the same."""
    for number, has, message in (
        (2, True, r"run2/.*encoder tokens of .*other \(\w{16}…\), in .*run0/.* of .*one "),
        (3, False, "run3/.*no encoder tokens"),
    ):
        whole = open_corpus(united(recipes[0], [recipes[0], recipes[number]], tmp_path / str(number)), LENGTH)
        assert whole.has_scorer_tokens is has
        assert len(whole.windows(np.arange(whole.samples))) == whole.samples
        with pytest.raises(ArtifactError, match=message):
            whole.scorer_tokens(np.array([0]), 5)
        with pytest.raises(ArtifactError, match=message):
            assert whole.scorer_hash
    alone = open_corpus(train_corpus(recipes[3]), LENGTH)
    assert not alone.has_scorer_tokens
    with pytest.raises(ArtifactError, match=r"no encoder tokens; make this corpus with corpus\.scorer_tokenizer"):
        alone.scorer_tokens(np.array([0]), 5)


def test_a_union_takes_none_of_its_own() -> None:
    with pytest.raises(RecipeError, match=r"corpus\.scorer_tokenizer.*null where corpus\.union is set"):
        CorpusConfig(union=["a"], scorer_tokenizer="b")

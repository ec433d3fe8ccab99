"""Corpora that were made apart are read as one, sample by sample, and only where they fit together."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import make_recipe

from mates.engine.config import CorpusConfig, Recipe
from mates.engine.data import steps
from mates.engine.data.corpus import open_corpus
from mates.engine.data.loader import Batches
from mates.engine.evaluate.contents import sample_text
from mates.engine.layout import layout_of
from mates.engine.pretrain.stage import open_train_corpus
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError
from mates.preprocess.metadata import document_rows
from mates.preprocess.tokenizer import open_tokenizer

LENGTH = 32


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Recipe]:
    """Two recipes that share a tokenizer, with their corpora."""
    folder = tmp_path_factory.mktemp("made")
    first = make_recipe(folder / "a")
    steps.tokenizer_step(first)
    lines = Path(first.corpus.inputs[0]).read_text().splitlines()
    for number, part in enumerate((lines[:350], lines[350:])):
        (folder / f"{number}.jsonl").write_text("".join(f"{line}\n" for line in part))
    tokenizer = replace(first.tokenizer, path=str(layout_of(first).tokenizer / "tokenizer.json"))
    recipes = [
        replace(
            first,
            run_dir=str(folder / f"run{number}"),
            tokenizer=tokenizer,
            corpus=replace(first.corpus, inputs=[str(folder / f"{number}.jsonl")]),
        )
        for number in range(2)
    ]
    for recipe in recipes:
        steps.tokenizer_step(recipe)
        steps.preprocess_step(recipe)
    return recipes


@pytest.fixture(scope="module")
def united(made: list[Recipe], tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folders = [str(layout_of(recipe).data) for recipe in made]
    recipe = replace(made[0], run_dir=str(tmp_path_factory.mktemp("united")), corpus=CorpusConfig(union=folders))
    steps.tokenizer_step(recipe)
    steps.preprocess_step(recipe)
    return recipe


def test_samples_are_those_of_the_parts_in_order(made: list[Recipe], united: Recipe) -> None:
    whole, parts = open_train_corpus(united), [open_train_corpus(recipe) for recipe in made]
    assert whole.samples == sum(part.samples for part in parts)
    expected = np.concatenate([part.windows(np.arange(part.samples)) for part in parts])
    mixed = np.random.default_rng(0).permutation(whole.samples)
    assert np.array_equal(whole.windows(mixed), expected[mixed])
    assert whole.stored(mixed).dtype == parts[0].stored(mixed[:1] % parts[0].samples).dtype
    with Batches(whole, mixed, 8) as batches:
        assert np.array_equal(np.concatenate(list(batches)), expected[mixed][: len(mixed) // 8 * 8])
    for bad in (-1, whole.samples):
        with pytest.raises(IndexError, match=f"of {whole.samples}"):
            whole.windows(np.array([bad]))


def test_documents_are_found_in_their_parts(made: list[Recipe], united: Recipe) -> None:
    whole = open_train_corpus(united)
    tokenizer, _ = open_tokenizer(layout_of(united).tokenizer)
    for sample in (0, whole.starts[1] - 1, whole.starts[1], whole.samples - 1):
        part, number = whole.document_of(int(sample))
        assert part == layout_of(made[int(sample >= whole.starts[1])]).corpus("train").resolve()
        assert document_rows(part, [number])["url"][0].as_py().startswith("https://example.org")
        assert sample_text(whole, tokenizer, int(sample))


def test_it_is_made_once_and_known_by_what_it_is_made_of(made: list[Recipe], united: Recipe, tmp_path: Path) -> None:
    first = artifact.load(layout_of(united).corpus("train")).fingerprint
    steps.preprocess_step(united)
    assert artifact.load(layout_of(united).corpus("train")).fingerprint == first
    turned = replace(united, run_dir=str(tmp_path), corpus=CorpusConfig(union=united.corpus.union[::-1]))
    steps.tokenizer_step(turned)
    steps.preprocess_step(turned)
    assert artifact.load(layout_of(turned).corpus("train")).fingerprint != first
    sizes = [artifact.load(layout_of(recipe).corpus("train")).info["tokens"] for recipe in (united, *made)]
    assert sizes[0] == sizes[1] + sizes[2]


def united_with(recipe: Recipe, folders: list[Path], run_dir: Path) -> Recipe:
    return replace(recipe, run_dir=str(run_dir), corpus=CorpusConfig(union=[str(folder) for folder in folders]))


def test_corpora_of_different_tokenizers_are_refused(made: list[Recipe], tmp_path: Path) -> None:
    """Also where the tokenizer that lies beside them now is another than the one that made them."""
    other = make_recipe(tmp_path / "other")
    other = replace(other, tokenizer=replace(other.tokenizer, vocab_size=450))
    steps.tokenizer_step(other)
    steps.preprocess_step(other)
    first, second = layout_of(made[0]).data, layout_of(other).data
    recipe = united_with(made[0], [first, second], tmp_path / "run")
    steps.tokenizer_step(recipe)
    for _ in range(2):
        with pytest.raises(ArtifactError, match=r"its corpora were made with the tokenizer \w+…, the union's, .*set tokenizer.path of all"):
            steps.preprocess_step(recipe)
        shutil.rmtree(second / "tokenizer")
        shutil.copytree(first / "tokenizer", second / "tokenizer")


def test_corpora_that_were_split_in_another_way_are_refused(made: list[Recipe], tmp_path: Path) -> None:
    other = replace(made[0], run_dir=str(tmp_path / "other"), corpus=replace(made[0].corpus, split_seed=1))
    steps.tokenizer_step(other)
    steps.preprocess_step(other)
    recipe = united_with(made[0], [layout_of(made[0]).data, layout_of(other).data], tmp_path / "run")
    steps.tokenizer_step(recipe)
    with pytest.raises(ArtifactError, match=r"corpus.split_seed is 1, in .* it is 0; with different splits"):
        steps.preprocess_step(recipe)


def test_no_corpus_is_in_twice(made: list[Recipe], united: Recipe, tmp_path: Path) -> None:
    data = layout_of(made[0]).data
    for number, folders in enumerate(([data, data / "corpus" / ".."], [layout_of(united).data, data])):
        recipe = united_with(made[0], folders, tmp_path / str(number))
        steps.tokenizer_step(recipe)
        with pytest.raises(ArtifactError, match=r"train: this corpus is in corpus.union twice"):
            steps.preprocess_step(recipe)


def test_a_union_of_a_union_and_a_corpus(made: list[Recipe], tmp_path: Path) -> None:
    one = united_with(made[0], [layout_of(made[0]).data], tmp_path / "one")
    two = united_with(made[0], [layout_of(one).data, layout_of(made[1]).data], tmp_path / "two")
    for recipe in (one, two):
        steps.tokenizer_step(recipe)
        steps.preprocess_step(recipe)
    parts = [open_train_corpus(recipe).windows(np.arange(open_train_corpus(recipe).samples)) for recipe in made]
    whole = open_train_corpus(two)
    assert np.array_equal(whole.windows(np.arange(whole.samples)), np.concatenate(parts))


def test_parts_that_moved_are_found_at_their_new_place(made: list[Recipe], tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(layout_of(made[0]).data, old)
    recipe = united_with(made[0], [old], tmp_path / "run")
    steps.tokenizer_step(recipe)
    steps.preprocess_step(recipe)
    fingerprint, samples = open_train_corpus(recipe).fingerprint, open_train_corpus(recipe).samples
    old.rename(new)
    with pytest.raises(ArtifactError, match=r"(?s)a union of corpora, one of which was at .*old/corpus/train: .*name its data folder in"):
        open_train_corpus(recipe)
    moved = united_with(made[0], [new], tmp_path / "run")
    steps.preprocess_step(moved)
    assert (open_train_corpus(moved).fingerprint, open_train_corpus(moved).samples) == (fingerprint, samples)


def test_a_part_that_changed_is_named(made: list[Recipe], united: Recipe, tmp_path: Path) -> None:
    directory = layout_of(made[1]).corpus("train")
    manifest = directory / artifact.MANIFEST_NAME
    before = manifest.read_bytes()
    raw = json.loads(before)
    raw.pop(artifact.CHECKSUM)
    raw["fingerprint"] = "0" * 64
    try:
        artifact.write_json(manifest, raw | {artifact.CHECKSUM: artifact.fingerprint_of(raw)})
        with pytest.raises(ArtifactError, match=rf"{directory.resolve()}: a corpus with the fingerprint 0000"):
            open_train_corpus(united)
    finally:
        manifest.write_bytes(before)
    assert open_corpus(layout_of(united).corpus("train"), LENGTH, verify=True).samples > 0

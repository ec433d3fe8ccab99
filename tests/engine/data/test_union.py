"""Corpora that were made apart are read as one, sample by sample, and only where they fit together."""

from __future__ import annotations

import json
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


def test_corpora_of_different_tokenizers_are_refused(made: list[Recipe], tmp_path: Path) -> None:
    other = make_recipe(tmp_path / "other")
    other = replace(other, tokenizer=replace(other.tokenizer, vocab_size=450))
    steps.tokenizer_step(other)
    steps.preprocess_step(other)
    folders = [str(layout_of(recipe).data) for recipe in (made[0], other)]
    recipe = replace(made[0], run_dir=str(tmp_path / "run"), corpus=CorpusConfig(union=folders))
    steps.tokenizer_step(recipe)
    with pytest.raises(ArtifactError, match=r"its tokenizer \w+… is not that of .*set tokenizer.path of all their recipes"):
        steps.preprocess_step(recipe)


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

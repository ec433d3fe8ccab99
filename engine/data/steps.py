"""The data steps of a recipe: embedded corpus, tokenizer, corpora and reference."""

from __future__ import annotations

import glob
from collections import Counter
from pathlib import Path

from mates.engine.config import SAMPLE, Recipe
from mates.engine.data.union import take_tokenizer, unite_corpora
from mates.engine.layout import layout_of, union_layouts
from mates.engine.pretrain.shapes import resolve_shape
from mates.engine.progress import Progress, say
from mates.engine.reference.make import make_further_reference, make_reference
from mates.preprocess import artifact
from mates.preprocess.artifact import Manifest
from mates.preprocess.corpus import CorpusSettings, SplitShares, make_corpora, texts_of
from mates.preprocess.inputs import InputFile, find_inputs
from mates.preprocess.ledger import REJECTS_NAME
from mates.preprocess.ranks import Alone, Ranks, on_all
from mates.preprocess.readers import ReadOptions
from mates.preprocess.sample_corpus import write_sample_corpus
from mates.preprocess.tokenizer import make_tokenizer
from mates.preprocess.workers import default_workers

SAMPLE_REFERENCE = ("reference-train.jsonl", "reference-test.jsonl")


def uses_sample(recipe: Recipe) -> bool:
    """Whether the recipe reads the embedded corpus or its reference task."""
    return (SAMPLE in recipe.corpus.inputs and not recipe.corpus.union) or recipe.reference.source == SAMPLE


def sample_corpus_step(recipe: Recipe) -> Manifest | None:
    """Write the embedded corpus where the recipe uses it."""
    if not uses_sample(recipe):
        return None
    return write_sample_corpus(
        layout_of(recipe).sample_corpus,
        seed=recipe.corpus.split_seed,
        max_text_bytes=recipe.corpus.sample_bytes,
        progress=say,
    )


def input_files(recipe: Recipe) -> list[InputFile]:
    """The recipe's input files, ``sample`` standing for the shards of the embedded corpus."""
    if SAMPLE in recipe.corpus.inputs:
        artifact.load(layout_of(recipe).sample_corpus, "sample-corpus")
    shards = f"{glob.escape(str(layout_of(recipe).sample_corpus))}/shard-*.json.gz"
    return find_inputs([shards if item == SAMPLE else item for item in recipe.corpus.inputs])


def split_shares(recipe: Recipe) -> SplitShares:
    """How documents are divided."""
    return SplitShares(pool=recipe.corpus.pool_share, holdout=recipe.corpus.holdout_share, seed=recipe.corpus.split_seed)


def read_options(recipe: Recipe) -> ReadOptions:
    """How documents are read."""
    corpus = recipe.corpus
    return ReadOptions(
        text_field=corpus.text_field,
        metadata_fields=tuple(corpus.metadata_fields),
        on_bad_input=corpus.on_bad_input,
        keep_empty=corpus.empty_documents == "keep",
        max_document_bytes=corpus.max_document_bytes,
    )


def _origin(recipe: Recipe) -> str | None:
    """The embedded corpus' fingerprint where it is the only input; paths of runs then do not matter."""
    if recipe.corpus.inputs != [SAMPLE]:
        return None
    return artifact.load(layout_of(recipe).sample_corpus, "sample-corpus").fingerprint


def tokenizer_step(recipe: Recipe) -> Manifest:
    """Take or train the tokenizer, or take that of the corpora that are read as one."""
    config = recipe.tokenizer
    if recipe.corpus.union:
        return take_tokenizer(layout_of(recipe).tokenizer, union_layouts(recipe)[0].tokenizer)
    inputs: dict[str, str] = {}
    if config.path is None:
        origin = _origin(recipe) or [[file.name, file.bytes] for file in input_files(recipe)]
        inputs["documents"] = artifact.fingerprint_of(
            [origin, recipe.corpus.text_field, recipe.corpus.pool_share, recipe.corpus.holdout_share]
        )
    return make_tokenizer(
        layout_of(recipe).tokenizer,
        path=config.path,
        kind=config.kind,
        vocab_size=config.vocab_size,
        train_bytes=config.train_bytes,
        end_of_document=config.end_of_document,
        texts=texts_of(input_files(recipe), read_options(recipe), split_shares(recipe)) if config.path is None else [],
        inputs=inputs,
        special_token_text=recipe.corpus.special_token_text,
    )


def preprocess_step(recipe: Recipe, ranks: Ranks | None = None) -> dict[str, Manifest]:
    """Tokenize the documents into the train, pool and holdout corpora, as one of the ranks that were started."""
    layout, ranks = layout_of(recipe), ranks or Alone()
    if recipe.corpus.union:
        united = on_all(ranks, lambda: unite_corpora(layout, union_layouts(recipe)) if ranks.rank == 0 else {})[0]
        if ranks.rank == 0:
            for split, manifest in united.items():
                info = manifest.info
                say(f"preprocess: {split} corpus, a union, of {info['documents']:,} documents, {info['tokens']:,} tokens")
        return united
    files, origin = on_all(ranks, lambda: (input_files(recipe), _origin(recipe)))[0]  # an error of one rank is told to all
    workers = recipe.corpus.workers or (default_workers() if ranks.size == 1 else 1)
    with Progress("preprocess", sum(file.bytes for file in files), "byte", enabled=ranks.rank == 0 and ranks.size == 1) as shown:
        done = make_corpora(
            layout.corpus("train").parent,
            inputs=files,
            settings=CorpusSettings(
                shares=split_shares(recipe),
                reading=read_options(recipe),
                features=tuple(sorted(recipe.corpus.features)),
                special_token_text=recipe.corpus.special_token_text,
            ),
            tokenizer_dir=layout.tokenizer,
            scorer_tokenizer=Path(recipe.corpus.scorer_tokenizer) if recipe.corpus.scorer_tokenizer else None,
            workers=workers,
            ranks=ranks,
            origin=origin,
            progress=shown.reach,
            say=say if ranks.rank == 0 else lambda text: None,
        )
    if ranks.rank == 0:
        _say_corpora(done, layout.corpus("train").parent)
    return done


def _say_corpora(done: dict[str, Manifest], directory: Path) -> None:
    for split, manifest in done.items():
        say(f"preprocess: {split} corpus of {manifest.info['documents']:,} documents, {manifest.info['tokens']:,} tokens")
    files = next(iter(done.values())).info["input_files"]
    dropped: Counter[str] = sum((Counter(file["dropped"]) for file in files), Counter())
    if dropped:
        reasons = ", ".join(f"{count:,} ({reason})" for reason, count in sorted(dropped.items()))
        say(f"preprocess: dropped {reasons}; examples in {directory / REJECTS_NAME}")
    damaged = [file for file in files if file["damage"]]
    if damaged:
        first = "; ".join(f"{file['path']}: {file['damage']}" for file in damaged[:3])
        more = f"; and {len(damaged) - 3} more, named in {directory / REJECTS_NAME}" if len(damaged) > 3 else ""
        say(f"preprocess: WARNING: {len(damaged)} damaged files were read up to the damage and no further: {first}{more}")


def reference_step(recipe: Recipe) -> list[Manifest]:
    """Pack the reference task's two halves, and the further tasks."""
    layout, config = layout_of(recipe), recipe.reference
    if config.source == SAMPLE:
        artifact.load(layout.sample_corpus, "sample-corpus")
    sources = [layout.sample_corpus / name for name in SAMPLE_REFERENCE] if config.source == SAMPLE else [Path(config.source)]
    halves = make_reference(
        layout.reference("train").parent,
        sources=sources,
        name=config.name,
        form=config.format,
        items={"train": config.items, "test": config.test_items},
        tokenizer_dir=layout.tokenizer,
        max_tokens=resolve_shape(recipe.model).max_positions,
        seed=recipe.corpus.split_seed,
        avoid=config.avoided(),
    )
    further = {
        task.name: make_further_reference(
            layout.further_reference(task.name),
            source=Path(task.source),
            name=task.name,
            form=task.format,
            items=task.items,
            tokenizer_dir=layout.tokenizer,
            max_tokens=resolve_shape(recipe.model).max_positions,
            seed=recipe.corpus.split_seed,
            avoid=config.avoided(),
        )
        for task in config.more
    }
    _say_references({f"{half} half": manifest for half, manifest in halves.items()} | further)
    if config.avoid:
        _say_dropped({config.name: halves["train"]} | further)
    return [*halves.values(), *further.values()]


def _say_references(done: dict[str, Manifest]) -> None:
    for title, manifest in done.items():
        info = manifest.info
        say(f"reference: {title} with {info['items']:,} items, {info['tokens']:,} tokens, {info['label_tokens']:,} of them labels")


def _say_dropped(probed: dict[str, Manifest]) -> None:
    dropped = ", ".join(f"{manifest.info['dropped_for_overlap']:,} of {name}" for name, manifest in probed.items())
    say(f"reference: left out for overlap with reference.avoid: {dropped}")

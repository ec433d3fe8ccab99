"""What a run refuses before work begins, or as soon as sizes are known, rather than hours later."""

from __future__ import annotations

from pathlib import Path

from mates.engine.config import SAMPLE, Recipe, RecipeError, require, require_packages


def check_paths(recipe: Recipe) -> None:
    """Refuse files that are not there before the hours of work that come before their use."""
    from mates.engine.evaluate.task_data import find_files
    from mates.engine.flops import shape_of
    from mates.engine.layout import union_layouts
    from mates.preprocess.artifact import MANIFEST_NAME, read_json
    from mates.preprocess.inputs import find_inputs
    from mates.preprocess.tokenizer import load_encoder_tokenizer, load_tokenizer, looks_like_path

    require_packages(recipe)
    check_model(recipe)
    find_inputs([item for item in recipe.corpus.inputs if item != SAMPLE])
    for part in union_layouts(recipe):
        there = (part.corpus("train") / MANIFEST_NAME).is_file()
        require(there, "corpus.union", str(part.data), "a data folder in which `mates preprocess` has finished")
    reference = recipe.reference
    sources = [] if reference.source == SAMPLE else [("reference.source", Path(reference.source))]
    sources += [(f"reference.more ({task.name}).source", Path(task.source)) for task in reference.more]
    sources += [("reference.avoid", path) for _, path in reference.avoided()]
    for name, path in sources:
        require(path.is_file(), name, str(path), "a file that is there")
    if recipe.tokenizer.path is not None and looks_like_path(recipe.tokenizer.path):
        load_tokenizer(Path(recipe.tokenizer.path), recipe.tokenizer.end_of_document, recipe.corpus.special_token_text)
    if recipe.corpus.scorer_tokenizer is not None:
        load_encoder_tokenizer(Path(recipe.corpus.scorer_tokenizer))
    for name in recipe.evaluate.tasks:
        find_files(name, Path(recipe.evaluate.task_data or ""))
    if "ratings" in recipe.methods:
        ratings = recipe.baselines.ratings
        require(ratings is not None and Path(ratings).is_file(), "baselines.ratings", ratings, "a file that is there")
    if "quality" in recipe.methods:
        find_inputs(recipe.baselines.quality_sources)
    encoder = recipe.fit.encoder
    if encoder is not None and looks_like_path(encoder):
        config = Path(encoder) / "config.json"
        require(config.is_file(), "fit.encoder", encoder, "a Hugging Face folder with a config.json")
        raw = read_json(config)
        try:
            shape_of(raw)
        except KeyError as error:
            raise RecipeError(f"fit.encoder: {config} has {error.args[0]}, expected the shape of a transformer encoder") from error
        positions = raw.get("max_position_embeddings") or recipe.fit.chunk_tokens
        require(recipe.fit.chunk_tokens <= positions, "fit.chunk_tokens", recipe.fit.chunk_tokens, f"at most the {positions} of {encoder}")


def check_model(recipe: Recipe) -> None:
    """Refuse a transformers configuration, weights or their tokenizer that training could not start from, before anything is made."""
    from mates.engine.layout import union_layouts
    from mates.engine.pretrain.shapes import config_file, resolve_shape

    file = config_file(recipe.model)
    if file is None:
        return
    import torch

    from mates.engine.pretrain.model import build_empty, check_weights, model_config, padded_vocabulary
    from mates.preprocess.artifact import ArtifactError, read_json
    from mates.preprocess.tokenizer import HuggingFaceTokenizer, load_tokenizer

    shape = resolve_shape(recipe.model)
    try:
        build_empty(model_config(shape, 64, 0), torch.float32, torch.device("cpu"))
    except RecipeError as error:
        raise RecipeError(f"{file}: {error}") from error
    if recipe.model.weights is None:
        return
    folder = Path(recipe.model.weights)
    check_weights(folder)
    used = union_layouts(recipe)[0].tokenizer if recipe.corpus.union else Path(recipe.tokenizer.path or "")
    if not used.exists():  # a name on the model hub
        return
    tokenizer = load_tokenizer(used, recipe.tokenizer.end_of_document)
    rows, held = padded_vocabulary(tokenizer.vocab_size, recipe.model.vocab_multiple), read_json(file).get("vocab_size")
    multiple = recipe.model.vocab_multiple
    require(rows == held, "model.vocab_multiple", multiple, f"one that makes {held} rows of {tokenizer.vocab_size} token ids, not {rows}")
    if (folder / "tokenizer.json").exists() and isinstance(tokenizer, HuggingFaceTokenizer):
        own = load_tokenizer(folder / "tokenizer.json", recipe.tokenizer.end_of_document)
        assert isinstance(own, HuggingFaceTokenizer)
        if own.library.get_vocab() != tokenizer.library.get_vocab():
            raise ArtifactError(f"{used}: not the tokenizer that {folder} was trained with; set tokenizer.path to {folder}")


def check_sizes(recipe: Recipe) -> None:
    """Refuse corpora that are too small for a later step of the recipe, as soon as their sizes are known."""
    from mates.engine.baselines.scorers import cluster_count
    from mates.engine.data.blocks import block_sizes, make_blocks
    from mates.engine.data.corpus import open_corpus
    from mates.engine.influence.features import unprobed_samples
    from mates.engine.influence.fit import check_parts, split_labels
    from mates.engine.layout import layout_of
    from mates.engine.probe.stage import probed_samples
    from mates.engine.select.methods import needs_influences

    length = recipe.pretrain.sequence_length
    train, pool = (open_corpus(layout_of(recipe).corpus(split), length) for split in ("train", "pool"))
    make_blocks(recipe, train.samples)
    for stage in range(recipe.pretrain.stages):
        if any(needs_influences(recipe, method, stage) for method in recipe.methods):
            check_parts(split_labels(probed_samples(recipe, pool.samples, stage), recipe.fit, recipe.seed))
            if recipe.fit.features:
                unprobed_samples(recipe, pool, stage)
    if "semdedup" in recipe.methods and recipe.pretrain.stages > 1:
        cluster_count(recipe, block_sizes(recipe)[1])
    if "ratings" in recipe.methods and recipe.baselines.ratings is not None:
        from mates.engine.baselines.ratings import read_ratings

        read_ratings(Path(recipe.baselines.ratings), train.samples)
    if recipe.select.domains is not None and recipe.pretrain.stages > 1:
        from mates.engine.select.domains import Domains

        Domains(train, recipe.select)

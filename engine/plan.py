"""What a run will take, before anything runs: tokens needed and found, FLOPs and device-hours by step, disk and memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mates.engine.baselines.scorers import OF_CHECKPOINT
from mates.engine.config import INFLUENCE_METHODS, SAMPLE, FitConfig, Recipe
from mates.engine.data.blocks import block_sizes
from mates.engine.data.corpus import sample_count
from mates.engine.evaluate.stage import evaluation_flops
from mates.engine.flops import BERT_BASE, EncoderShape, decoder_forward, decoder_training, shape_of
from mates.engine.influence.bags import ngram_flops
from mates.engine.influence.features import DIFFICULTY, QUALITY, RELEVANCE, feature_flops
from mates.engine.influence.ngrams import ridge_flops
from mates.engine.layout import layout_of, union_layouts
from mates.engine.pretrain.model import padded_vocabulary
from mates.engine.pretrain.shapes import ModelShape, resolve_shape
from mates.engine.probe.stage import label_weights, probe_flops
from mates.engine.select.methods import earlier_models, needs_influences, needs_scores
from mates.preprocess import artifact
from mates.preprocess.indexed import token_dtype

TEXT_BYTES_PER_TOKEN = 4.4  # English web text through a 50k vocabulary; a smaller vocabulary gives more tokens
COMPRESSION = 2.7  # gzip or zstandard on web text
REFERENCE_TOKENS_PER_ITEM = 90  # LAMBADA; a reference that exists is counted exactly
STATE_BYTES = 12  # a weight's bytes in state/: fp32 weights and moments
CHECKPOINT_BYTES = STATE_BYTES + 4 + 14  # and in hf/ (fp32) and DeepSpeed's own folder


@dataclass(frozen=True)
class Device:
    """What arithmetic is available: peak dense bf16 FLOP/s of one device, the share of it that is reached, and how many."""

    peak_flops: float
    utilisation: float
    count: int

    def hours(self, flops: float) -> float:
        """Device-hours of work."""
        return flops / (self.peak_flops * self.utilisation) / 3600


@dataclass(frozen=True)
class Plan:
    """Figures of a recipe. ``flops`` by step over the whole run of one method; bytes as they will lie on disk and in memory."""

    parameters: int
    vocab_size: int
    samples_needed: int
    tokens_needed: int
    tokens_found: int | None
    found_is_estimate: bool
    flops: dict[str, float]
    disk_bytes: dict[str, float]
    memory_bytes_per_rank: dict[str, float]


def encoder_shape(config: FitConfig) -> EncoderShape:
    """The influence model's shape; a pretrained encoder that is not on this disk is taken for a BERT-base."""
    if config.encoder is None:
        return EncoderShape(hidden_size=config.hidden_size, layers=config.layers, intermediate_size=4 * config.hidden_size)
    path = Path(config.encoder) / "config.json"
    if path.is_file():
        return shape_of(artifact.read_json(path))
    return BERT_BASE


def make_plan(recipe: Recipe, method: str = "mates") -> Plan:
    """Plan the run of one method."""
    shape = resolve_shape(recipe.model)
    vocab = _vocab_size(recipe)
    rows = padded_vocabulary(vocab, recipe.model.vocab_multiple)
    needed = sum(block_sizes(recipe))
    found, estimated = _tokens_found(recipe)
    return Plan(
        parameters=shape.parameters(rows),
        vocab_size=vocab,
        samples_needed=needed,
        tokens_needed=needed * recipe.pretrain.sequence_length,
        tokens_found=found,
        found_is_estimate=estimated,
        flops=_flops(recipe, shape, vocab, rows, method),
        disk_bytes=_disk(recipe, shape, rows, found, vocab),
        memory_bytes_per_rank=_memory(recipe, shape, rows),
    )


def _vocab_size(recipe: Recipe) -> int:
    directory = layout_of(recipe).tokenizer
    if (directory / artifact.MANIFEST_NAME).exists():
        return int(artifact.load(directory, "tokenizer").info["vocab_size"])
    if recipe.corpus.union:
        return int(artifact.load(union_layouts(recipe)[0].tokenizer, "tokenizer").info["vocab_size"])
    if recipe.tokenizer.path is None:
        return recipe.tokenizer.vocab_size
    if Path(recipe.tokenizer.path).exists():
        from mates.preprocess.tokenizer import load_tokenizer

        return load_tokenizer(Path(recipe.tokenizer.path), recipe.tokenizer.end_of_document).vocab_size
    return 50_277  # a name on the model hub: GPT-NeoX's size stands in until the tokenizer is there


def _tokens_found(recipe: Recipe) -> tuple[int | None, bool]:
    directory = layout_of(recipe).corpus("train")
    if (directory / artifact.MANIFEST_NAME).exists():
        return int(artifact.load(directory, "corpus").info["tokens"]), False
    if recipe.corpus.union:
        return sum(int(artifact.load(part.corpus("train"), "corpus").info["tokens"]) for part in union_layouts(recipe)), False
    if SAMPLE in recipe.corpus.inputs:
        return None, True
    from mates.preprocess.inputs import InputError, find_inputs

    try:
        files = find_inputs(recipe.corpus.inputs)
    except InputError:
        return None, True
    text = sum(file.bytes * (1.0 if file.name.endswith((".json", ".jsonl")) else COMPRESSION) for file in files)
    train = 1 - recipe.corpus.pool_share - recipe.corpus.holdout_share
    return int(text * train / TEXT_BYTES_PER_TOKEN), True


def _reference(recipe: Recipe, half: str, items: int) -> tuple[int, int, int]:
    directory = layout_of(recipe).reference(half)
    if (directory / artifact.MANIFEST_NAME).exists():
        info = artifact.load(directory, "reference").info
        return info["items"], info["tokens"], info["label_tokens"]
    return items, items * REFERENCE_TOKENS_PER_ITEM, 2 * items


def _probed_references(recipe: Recipe) -> list[tuple[int, int, int]]:
    more = [(task.items, task.items * REFERENCE_TOKENS_PER_ITEM, 2 * task.items) for task in recipe.reference.more]
    spans = [recipe.reference.loss_over, *(task.loss_over for task in recipe.reference.more)]
    answers = [_reference(recipe, "train", recipe.reference.items), *more]
    return [(items, tokens, labels if span == "answer" else tokens) for (items, tokens, labels), span in zip(answers, spans, strict=True)]


def _flops(recipe: Recipe, shape: ModelShape, vocab: int, rows: int, method: str) -> dict[str, float]:
    config, length = recipe.pretrain, recipe.pretrain.sequence_length
    per_stage = decoder_training(shape, rows, tokens=config.steps_per_stage * config.tokens_per_step, length=length)
    chosen = [stage for stage in range(config.stages) if needs_scores(method, stage)]
    candidates = sum(block_sizes(recipe)[stage] for stage in chosen)
    probed = [stage for stage in chosen if needs_influences(recipe, method, stage)]
    fit = score = 0.0
    if probed:
        parts = {"ngram": [_ngram_flops], "encoder": [_encoder_flops], "cascade": [_ngram_flops, _encoder_flops]}[recipe.fit.model]
        fit, score = (sum(column) for column in zip(*(part(recipe, candidates, probed) for part in parts), strict=True))
        features = set(recipe.fit.features)
        tables = len(label_weights(recipe)) * len(features & {RELEVANCE, QUALITY})
        score += feature_flops(candidates, length, difficulty=DIFFICULTY in features, tables=tables)
    elif method in OF_CHECKPOINT:
        logits = 0 if method == "semdedup" else candidates * length
        score = decoder_forward(shape, rows, tokens=candidates * length, length=length, logit_tokens=logits)
    elif method in ("dsir", "quality"):
        score = ngram_flops(candidates, length)
    test = _reference(recipe, "test", recipe.reference.test_items)
    return {
        "pretrain": config.stages * per_stage,
        "probe": len(probed) * probe_flops(recipe, vocab, _probed_references(recipe), recipe.probe.samples),
        "fit": len(probed) * fit,
        "score": score,
        "evaluate": config.stages * evaluation_flops(recipe, vocab, recipe.evaluate.holdout_samples, test),
    }


def _encoder_flops(recipe: Recipe, candidates: int, probed: list[int]) -> tuple[float, float]:
    """Of fitting an encoder once, and of scoring so many samples with it; what a cascade drops is only known when it is fitted."""
    fit = recipe.fit
    read = min(recipe.pretrain.sequence_length, fit.chunk_tokens * fit.max_chunks)
    encoder, chunk = encoder_shape(fit), min(read, fit.chunk_tokens)
    samples = fit.epochs * (3 * _train_labels(recipe, probed) + fit.validation_share * recipe.probe.samples) + recipe.probe.samples
    return encoder.forward(tokens=samples * read, length=chunk), encoder.forward(tokens=candidates * read, length=chunk)


def _ngram_flops(recipe: Recipe, candidates: int, probed: list[int]) -> tuple[float, float]:
    length = recipe.pretrain.sequence_length
    return ridge_flops(round(_train_labels(recipe, probed)), length), ngram_flops(candidates, length)


def _train_labels(recipe: Recipe, probed: list[int]) -> float:
    """Labels that one fit trains on, those of earlier probes among them; the mean over the stages that are probed for."""
    earlier = [min(recipe.fit.earlier_labels, len(earlier_models(recipe, stage))) for stage in probed]
    return (1 - recipe.fit.test_share - recipe.fit.validation_share) * recipe.probe.samples * (1 + sum(earlier) / len(earlier))


def _disk(recipe: Recipe, shape: ModelShape, rows: int, tokens_found: int | None, vocab: int) -> dict[str, float]:
    sizes = block_sizes(recipe)
    tokens = tokens_found or sum(sizes) * recipe.pretrain.sequence_length
    checkpoints = 1 + len(recipe.methods) * (recipe.pretrain.stages - 1)
    branches = checkpoints if recipe.probe.after_decay else 0  # weights and moments of each decay branch, for the probe
    scored = [method for method in recipe.methods if needs_scores(method, recipe.pretrain.stages - 1)]
    scores = sum(len(label_weights(recipe)) if method in INFLUENCE_METHODS else 1 for method in scored)
    train = 1 - recipe.corpus.pool_share - recipe.corpus.holdout_share
    scorer = 3 if recipe.corpus.scorer_tokenizer else 0  # about as many encoder tokens, mostly of 2 bytes, and a count
    found = {
        "corpora": float(tokens / train * (token_dtype(vocab).itemsize + scorer)),
        "checkpoints (all kept)": float((checkpoints * CHECKPOINT_BYTES + branches * STATE_BYTES) * shape.parameters(rows)),
        "scores and indices": float(sum(sizes) * 4 * scores + sum(sizes) * 8 * recipe.select.ratio * len(recipe.methods)),
    }
    if recipe.select.materialize:
        trained = recipe.pretrain.steps_per_stage * recipe.pretrain.tokens_per_step
        found["copies of selected samples"] = float(checkpoints * trained * token_dtype(vocab).itemsize)
    if "semdedup" in recipe.methods:  # of one stage at a time, in chunks and in one piece
        found["embeddings, for a while"] = float(2 * max(sizes) * 4 * shape.hidden_size)
    return found


def _memory(recipe: Recipe, shape: ModelShape, rows: int) -> dict[str, float]:
    """Model states by ZeRO (Rajbhandari et al., arXiv 1910.02054); activations of a fused-attention transformer, 34·d bytes a token
    and layer in bf16 (Korthikanti et al., arXiv 2205.05198, without its attention term), and fp32 logits with their gradient."""
    config, ranks = recipe.pretrain, recipe.launch.processes
    parameters, stage = shape.parameters(rows), config.zero_stage
    weight = 2 if config.precision == "bf16" and stage > 0 else 4
    states = parameters * (
        weight / (ranks if stage >= 3 else 1)
        + weight / (ranks if stage >= 2 else 1)
        + (12 if weight == 2 else 8) / (ranks if stage >= 1 else 1)
    )
    tokens = config.micro_batch_size * config.sequence_length
    layer = 34 * shape.hidden_size * (1 if config.precision == "bf16" else 2)
    activations = tokens * layer * (1 if config.activation_checkpointing else shape.layers)
    return {"model states": states, "activations": float(activations), "logits": float(tokens * rows * 10)}


def describe(recipe: Recipe, device: Device) -> Iterator[str]:
    """The plan as lines of text."""
    method = next((one for one in (*INFLUENCE_METHODS, *recipe.methods) if one in recipe.methods and one != "random"), "random")
    plan, config = make_plan(recipe, method), recipe.pretrain
    length = config.sequence_length
    yield f"model       {plan.parameters:,} parameters, vocabulary {plan.vocab_size:,}"
    yield (
        f"training    {config.stages} stages x {config.steps_per_stage:,} steps x {config.batch_size} samples x {length} tokens"
        f" = {config.total_steps * config.tokens_per_step:,} tokens a method"
    )
    yield (
        f"needed      {plan.tokens_needed:,} train tokens ({plan.samples_needed:,} samples): stage 0, then candidates at ratio "
        f"{recipe.select.ratio}"
    )
    yield f"found       {_found(plan, length)}"
    yield ""
    yield f"FLOPs of one method's run ({method}); device-hours at {device.peak_flops / 1e12:g} TFLOP/s peak x {device.utilisation:.0%}:"
    total = sum(plan.flops.values())
    for name, flops in plan.flops.items():
        yield f"  {name:<10} {flops:10.3e}  {_hours(device.hours(flops)):>10} h  {flops / total:6.1%}"
    wall = _hours(device.hours(total) / device.count)
    on = f"on {device.count} devices {wall} h" if device.count > 1 else "on one device"
    yield f"  {'total':<10} {total:10.3e}  {_hours(device.hours(total)):>10} h   {on}"
    for name in [method, *(other for other in recipe.methods if other not in (method, "random"))]:
        own = plan.flops if name == method else make_plan(recipe, name).flops
        selection = sum(own[part] for part in ("probe", "fit", "score"))
        yield f"  selection by {name} costs {selection / own['pretrain']:.1%} of pretraining"
    yield ""
    yield "disk        " + ", ".join(f"{name} {_size(value)}" for name, value in plan.disk_bytes.items())
    yield f"memory      of one of {recipe.launch.processes} ranks: " + ", ".join(
        f"{name} {_size(value)}" for name, value in plan.memory_bytes_per_rank.items()
    )


def _found(plan: Plan, length: int) -> str:
    if plan.tokens_found is None:
        return "not known before the corpus is there"
    about = "about " if plan.found_is_estimate else ""
    enough = sample_count(plan.tokens_found, length) >= plan.samples_needed
    return f"{about}{plan.tokens_found:,} train tokens: {'enough' if enough else 'TOO FEW'}"


def _hours(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.1g}"


def _size(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"

"""The report: one self-contained HTML file about a run, finished or not, that shows what its artifacts hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from mates.engine.config import INFLUENCE_METHODS, Recipe
from mates.engine.evaluate import contents, figures
from mates.engine.evaluate.contents import StageView
from mates.engine.layout import layout_of
from mates.engine.ledger import NOT_DONE, PHASES, TRAINING, Entry, Ledger, cumulative_cost, write_ledger
from mates.engine.probe.stage import label_weights
from mates.preprocess import artifact
from mates.preprocess.artifact import Cost
from mates.preprocess.corpus import SPLITS

TEMPLATE = "report.html"
TASK_METRICS = {"acc": "accuracy", "acc_norm": "accuracy by length", "loss_nats": "nats per answer", "bits_per_byte": "bits per byte"}
SMOOTHED_SHARE = 20  # training losses are averaged over about a twentieth of a stage


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A method at its last stage; None where the run is not that far. The cost is of pretraining and selection."""

    method: str
    series: int
    metrics: dict[str, float] | None
    cost: Cost | None
    overhead_share: float | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A method against random at the last stage: differences of losses in nats, and the ratio of FLOPs."""

    method: str
    reference_nats: float
    holdout_nats: float
    flops_ratio: float


@dataclass(frozen=True, kw_only=True)
class StageSection:
    """A stage's numbers and figures; a figure is None where its step is not complete."""

    view: StageView
    influences: Markup | None
    agreement: Markup | None
    scores: Markup | None


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What a method has cost so far, and of each part the verb, the amount and the length (the longest bar has 100)."""

    method: str
    total: str
    complete: bool
    parts: list[tuple[str, str, float]]


def write_report(recipe: Recipe) -> Path:
    """Write the ledger and ``report.html`` of a run that may be unfinished.

    Returns:
        The report's path.

    Raises:
        ArtifactError: an artifact's contents contradict its manifest.
    """
    ledger = write_ledger(recipe)
    path = layout_of(recipe).report
    with artifact.atomic_file(path) as handle:
        handle.write(render(recipe, ledger).encode("utf-8", "replace"))
    return path


def render(recipe: Recipe, ledger: Ledger) -> str:
    """The report as HTML."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "flops": show_flops,
        "seconds": show_seconds,
        "percent": show_percent,
        "signed": figures.signed,
        "step_name": str,
    }
    summaries = summarise(recipe, ledger)
    return environment.get_template(TEMPLATE).render(
        recipe=recipe,
        reference=recipe.reference.name,
        influence_tasks=list(label_weights(recipe)),
        last_stage=recipe.pretrain.stages - 1,
        ledger=ledger,
        missing=ledger.missing,
        not_done=NOT_DONE,
        summaries=summaries,
        comparisons=compare(recipe, summaries),
        tasks=contents.task_rows(recipe, ledger),
        task_metrics=TASK_METRICS,
        task_value=show_task_value,
        fields=contents.field_rows(recipe, ledger),
        settings=recipe_rows(recipe, ledger),
        yaml=yaml.safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True),
        loss_figures=loss_figures(recipe, ledger),
        loss_window=loss_window(recipe),
        evaluation_figures=evaluation_figures(recipe, ledger),
        costs=cost_rows(recipe, ledger),
        bars={unit: cost_bars(recipe, ledger, unit) for unit in ("flops", "seconds")},
        stages=[stage_section(recipe, view) for view in contents.stage_views(recipe, ledger)],
    )


# --- numbers -------------------------------------------------------------------------------------------------------


def show_flops(flops: float) -> str:
    """Three digits and a unit: ``412 GFLOP``."""
    size, unit = figures.flops_unit(flops * 1.0005)  # 999.9 GFLOP are 1.00 TFLOP
    return f"{flops / size:#.3g}".rstrip(".") + f" {unit}" if flops else "0"


def show_seconds(seconds: float) -> str:
    """``0.004 s``, ``12.3 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    if seconds < 1:
        return f"{seconds:.3f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3599.5:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    return f"{round(seconds / 60) // 60} h {round(seconds / 60) % 60:02d} min"


def show_percent(share: float) -> str:
    """A share as a percentage with three digits, or one behind the point from 10% on."""
    return f"{100 * share:.1f}%" if share >= 0.1 or share == 0 else f"{100 * share:.2g}%"


def show_task_value(metric: str, value: float) -> str:
    """Accuracies as percentages, anything else as it is."""
    return f"{100 * value:.2f}%" if metric.startswith("acc") else f"{value:.4f}"


# --- summary -------------------------------------------------------------------------------------------------------


def summarise(recipe: Recipe, ledger: Ledger) -> list[Summary]:
    """Every method at its last stage."""
    last = recipe.pretrain.stages - 1
    return [
        Summary(
            method=method,
            series=figures.series_number(recipe.methods, method),
            metrics=contents.metrics_of(recipe, ledger, method, last),
            cost=cumulative_cost(ledger, method, last),
            overhead_share=ledger.totals(method).overhead_share,
        )
        for method in recipe.methods
    ]


def compare(recipe: Recipe, summaries: Sequence[Summary]) -> list[Comparison]:
    """Every complete method against a complete random one; none where all methods are still the shared stage 0."""
    complete = {s.method: (s.metrics, s.cost) for s in summaries if s.metrics is not None and s.cost is not None}
    if "random" not in complete or recipe.pretrain.stages < 2:
        return []
    metrics, cost = complete.pop("random")
    reference = f"{recipe.reference.name}.loss_nats"
    return [
        Comparison(
            method=method,
            reference_nats=own[reference] - metrics[reference],
            holdout_nats=own["holdout_loss_nats"] - metrics["holdout_loss_nats"],
            flops_ratio=own_cost.flops / cost.flops,
        )
        for method, (own, own_cost) in complete.items()
    ]


def recipe_rows(recipe: Recipe, ledger: Ledger) -> list[tuple[str, str, dict[str, str]]]:
    """The recipe in short: what, in words, and the fingerprints of the artifacts it led to."""
    fit, probe, select, evaluate = recipe.fit, recipe.probe, recipe.select, recipe.evaluate
    encoder = fit.encoder or f"BERT from scratch, width {fit.hidden_size}, {fit.layers} layers"
    ridge, own = "ridge regression on hashed n-grams", f"{encoder}; {fit.epochs} epochs, learning rate {fit.lr:g}"
    influence_model = {"ngram": ridge, "encoder": own, "cascade": f"{ridge}, and for what it does not drop {own}"}[fit.model]
    if fit.features:
        influence_model += f"; extra features {', '.join(fit.features)}"
    items = f"{recipe.reference.items} items to probe with, up to {recipe.reference.test_items} held out"
    measured = {"answer": "the answers", "passage": "whole passages"}[recipe.reference.loss_over]
    often = "a stage" if probe.every == 1 else f"every {probe.every} stages"
    rows = [
        ("Model", _model_text(recipe, ledger), None),
        ("Training", _training_text(recipe), None),
        ("Corpus", _corpus_text(recipe, ledger), "preprocess"),
        ("Tokenizer", _tokenizer_text(recipe), "tokenizer"),
        ("Reference", f"{recipe.reference.name}: {items}; loss of {measured}", "reference"),
        ("Probes", f"{probe.samples} samples {often}, {probe.method}, {probe.precision}", None),
        ("Influence model", influence_model, None),
        *((f"Method {name}", _method_text(recipe, name), None) for name in recipe.methods if name not in INFLUENCE_METHODS),
        ("Selection", f"ratio {select.ratio:g}, temperature {select.temperature:g} SD", None),
        (
            "Evaluation",
            f"{evaluate.decay_steps} steps of decay; up to {evaluate.holdout_samples} holdout samples",
            None,
        ),
    ]
    return [(name, text, _fingerprints(ledger.entry(verb) if verb else None)) for name, text, verb in rows]


def _method_text(recipe: Recipe, method: str) -> str:
    config = recipe.baselines
    good = ", ".join(Path(name).name for name in config.quality_sources) or "the reference tasks"
    texts = {
        "random": "a uniform sample of the candidates",
        "dsir": "importance resampling on hashed n-grams towards the reference tasks",
        "semdedup": "the candidates least like others by the checkpoint's embeddings",
        "quality": f"the likeliest by a classifier of {good} against the pool",
        "perplexity": f"those with {config.perplexity_keep} loss under the checkpoint before",
        "ratings": f"{config.ratings_best} scores of {Path(config.ratings or '').name}, temperature {config.ratings_temperature:g}",
    }
    return texts[method]


def _training_text(recipe: Recipe) -> str:
    train = recipe.pretrain
    factors = f"{train.stages} stages × {train.steps_per_stage:,} steps × {train.batch_size} samples"
    tokens = f"{train.sequence_length} tokens = {train.total_steps * train.tokens_per_step:,} tokens"
    return f"{factors} × {tokens}; {train.schedule}, learning rate {train.lr:g}, {train.precision}"


def _tokenizer_text(recipe: Recipe) -> str:
    config = recipe.tokenizer
    if recipe.corpus.union:
        return "that of the corpora"
    return Path(config.path).name if config.path else f"{config.kind}, trained on the corpus"


def _fingerprints(entry: Entry | None) -> dict[str, str]:
    return {name: value[:12] for name, value in entry.fingerprints.items()} if entry else {}


def _model_text(recipe: Recipe, ledger: Ledger) -> str:
    from mates.engine.pretrain.model import padded_vocabulary
    from mates.engine.pretrain.shapes import resolve_shape

    shape = resolve_shape(recipe.model)
    text = f"{shape.family}, width {shape.hidden_size}, {shape.layers} layers, {shape.heads} heads"
    if not ledger.done("tokenizer"):
        return text
    vocabulary = artifact.load(layout_of(recipe).tokenizer, "tokenizer").info["vocab_size"]
    weights = shape.parameters(padded_vocabulary(vocabulary, recipe.model.vocab_multiple))
    return f"{text}, {vocabulary:,} tokens in the vocabulary: {weights:,} parameters"


def _corpus_text(recipe: Recipe, ledger: Ledger) -> str:
    inputs = ", ".join(Path(item).name for item in recipe.corpus.union or recipe.corpus.inputs)
    if not ledger.done("preprocess"):
        return f"{inputs}; {NOT_DONE}"
    layout = layout_of(recipe)
    sizes = []
    for split in SPLITS:
        info = artifact.load(layout.corpus(split), "corpus").info
        sizes.append(f"{split} {info['documents']:,} documents, {info['tokens']:,} tokens")
    return "; ".join([inputs, *sizes])


# --- figures -------------------------------------------------------------------------------------------------------


def loss_window(recipe: Recipe) -> int:
    """Steps that the training curves are averaged over: an odd number, so that the mean is not shifted."""
    return (recipe.pretrain.steps_per_stage // SMOOTHED_SHARE) | 1


def loss_figures(recipe: Recipe, ledger: Ledger) -> list[Markup]:
    """Training loss of the whole run, and of the stages in which the methods differ."""
    curves = contents.loss_curves(recipe, ledger)
    shape: dict[str, Any] = {"steps_per_stage": recipe.pretrain.steps_per_stage, "window": loss_window(recipe)}
    own = [curve for curve in curves if curve.first_step > 0]
    groups = [("loss-whole", curves), ("loss-own", own)]
    return [figures.loss_figure(name, group, recipe.methods, **shape) for name, group in groups if group]


def evaluation_figures(recipe: Recipe, ledger: Ledger) -> list[Markup]:
    """The metrics against total compute."""
    points = {str(method): contents.evaluation_points(recipe, ledger, method) for method in recipe.methods}
    shown = {method: line for method, line in points.items() if line}
    if not shown:
        return []
    name, passages = recipe.reference.name, recipe.evaluate.passages
    panels = [
        ("reference-loss", f"{name}.loss_nats", f"held-out {name} loss (nats)", False),
        ("reference-accuracy", f"{name}.accuracy", f"held-out {name} accuracy (%)", True),
        *([("reference-passages", f"{name}.passage_loss_nats", f"held-out {name} passages (nats)", False)] if passages else []),
        ("holdout-loss", "holdout_loss_nats", "held-out text loss (nats)", False),
    ]
    return [
        figures.evaluation_figure(f"evaluation-{panel}", shown, metric, label, recipe.methods, percent=percent)
        for panel, metric, label, percent in panels
    ]


def stage_section(recipe: Recipe, view: StageView) -> StageSection:
    """The figures of a stage's selection."""
    series, name = figures.series_number(recipe.methods, view.method), f"{view.method}-{view.stage}"
    return StageSection(
        view=view,
        influences=figures.influence_figure(f"influence-{name}", view.probes.influence_nats, series) if view.probes else None,
        agreement=figures.agreement_figure(f"agreement-{name}", view.fit, series) if view.fit else None,
        scores=figures.selection_figure(f"scores-{name}", view.selection, series) if view.selection else None,
    )


# --- costs ---------------------------------------------------------------------------------------------------------

SHOWN_VERBS = (*PHASES["pretrain"], *PHASES["selection"], *PHASES["evaluation"])


def cost_rows(recipe: Recipe, ledger: Ledger) -> list[tuple[str, list[Cost | str]]]:
    """A row a step: its cost in each method, or why there is none."""

    def cell(method: str, verb: str) -> Cost | str:
        own = [entry for entry in ledger.path(method) if entry.step.verb == verb]
        return (ledger.cost(method, verb) or NOT_DONE) if own else "–"

    rows: list[tuple[str, list[Cost | str]]] = [(verb, [cell(method, verb) for method in recipe.methods]) for verb in SHOWN_VERBS]
    training = [cumulative_cost(ledger, method, ledger.stages - 1, TRAINING) or NOT_DONE for method in recipe.methods]
    return [
        *rows,
        ("pretrain and selection", training),
        ("data, shared", [ledger.totals(m).data or NOT_DONE for m in recipe.methods]),
    ]


def cost_bars(recipe: Recipe, ledger: Ledger, unit: str) -> list[Bar]:
    """What the complete steps of each method cost, part by part."""
    parts: dict[str, dict[str, float]] = {}
    for method in recipe.methods:
        complete = [(entry.step.verb, entry.cost) for entry in ledger.path(method) if entry.cost is not None]
        parts[method] = {verb: sum(float(getattr(cost, unit)) for own, cost in complete if own == verb) for verb in SHOWN_VERBS}
    longest = max(sum(amounts.values()) for amounts in parts.values())
    show = show_flops if unit == "flops" else show_seconds
    return [
        Bar(
            method=method,
            total=show(sum(amounts.values())),
            complete=all(entry.cost is not None for entry in ledger.path(method)),
            parts=[(verb, show(amount), 100 * amount / longest) for verb, amount in amounts.items() if amount],
        )
        for method, amounts in parts.items()
        if longest > 0
    ]

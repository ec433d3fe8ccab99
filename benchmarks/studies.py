"""The questions that model-chosen data raises, each answered by one command with one plot, from the runs of a tier.

    python benchmarks/studies.py NAME [--tier cpu] [--seeds 3] [--out runs/flops_to_accuracy_cpu]

NAME        what is asked                                           what is done
labels      how good the labels are, and how many are needed        probes 4,000 samples at the last probed checkpoint of seed 1
drift       whether preferences move, so that probing again pays     predictions of each stage's model for the labels of every other
references  what depends on the reference, and one against several  probes on LAMBADA and nine tasks at an early and a late checkpoint
selection   temperature and ratio                                    the labels that choices by the runs' models come to
overhead    what selection costs beside pretraining                  the ledger of the runs, and its formulas for longer stages
cost        what it would cost at 70M to 70B parameters              the ledger's formulas, held against what the runs were billed

All but ``cost`` need complete runs of the arms ``random`` and ``mates`` (``flops_to_accuracy.py --tier ...``); ``overhead`` shows other
arms too, as far as they are there. ``labels`` and ``references`` probe checkpoints again, on this machine's CPU, so that a tier with
``prune: true`` will not do; ``references`` takes the tasks from the shared data folder beside the checkout. Their probes go into
``OUT/studies``, and are not made twice. A gate comes first: every figure is there and finite, else nothing is written and the exit code
is 1.

Writes ``study_NAME_TIER.{json,png,svg}`` into ``--results``.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from comparison import Arm, missing_stages
from exits import exit_code
from experiment import Run, Tier, load_tier, measured, other_settings, runs_of
from matplotlib.figure import Figure
from measuring import GateError
from plots import save_figure
from surroundings import REPOSITORY, SHARED_DATA, surroundings, without_paths

from mates.engine.config import FitConfig, Method, Recipe, RecipeError, TaskConfig, require
from mates.engine.data.corpus import Corpus, open_corpus
from mates.engine.distributed import World
from mates.engine.evaluate.by_field import DocumentValues
from mates.engine.evaluate.figures import SERIES
from mates.engine.influence.fit import PREDICTIONS_FILE, selected_influence
from mates.engine.layout import Layout, layout_of
from mates.engine.pretrain.stage import open_train_corpus
from mates.engine.select.methods import needs_influences
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError
from mates.preprocess.inputs import InputError

METHOD: Method = "mates"
ALONE = World(0, 1, torch.device("cpu"))
Json = dict[str, Any]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Runs:
    """What the studies look at: the tier's runs, by seed and arm."""

    tier: Tier
    out: Path
    runs: tuple[Run, ...]
    given: str = ""
    """--tier as it was given."""
    overrides: tuple[str, ...] = ()

    def of(self, arm: str) -> list[Run]:
        """The runs of an arm, seed by seed. GateError where one is not complete."""
        found = [run for run in self.runs if run.arm is not None and run.arm.name == arm]
        if not found:
            raise GateError(f"tier {self.tier.name} has no arm {arm}, only {', '.join(self.tier.arms)}")
        for run in found:
            stages = run.recipe.pretrain.stages
            missing = missing_stages(measured(run), stages) if run.folder.is_dir() else list(range(stages))
            if missing:
                if other := other_settings(run):
                    raise GateError(f"{run}: {other}")
                words = [
                    "--tier",
                    self.given,
                    "--arms",
                    f"random,{arm}",
                    "--seeds",
                    str(len(found)),
                    "--out",
                    str(self.out),
                    *self.overrides,
                ]
                command = f"benchmarks/flops_to_accuracy.py {shlex.join(words)}"
                raise GateError(f"{run}: {len(missing)} stages are not complete; run {command}, or look at fewer --seeds")
        return found

    def measured(self) -> list[Arm]:
        """All arms that are complete."""
        arms = [measured(run) for run in self.runs if run.arm is not None and run.folder.is_dir()]
        stages = self.runs[0].recipe.pretrain.stages
        return [arm for arm in arms if not missing_stages(arm, stages)]


@dataclass(frozen=True)
class Study:
    """A study's figures and their picture."""

    figures: Json
    plot: Figure


# --- how good labels are, and how many are needed --------------------------------------------------------------------


def labels(runs: Runs, options: argparse.Namespace) -> Study:
    """Spearman's correlation of an n-gram model and an encoder with test labels, by the number of training labels; and how good the labels
    themselves are.

    With reliability r (the correlation of influences on the reference with those on another as large, by Spearman–Brown from its two
    halves) the labels correlate by √r with influences on an endless reference: more items, not more labels, raise that.
    """
    from mates.engine.influence.fit import fit_stage, split_labels
    from mates.engine.influence.model import Samples
    from mates.engine.influence.ngrams import all_features, label_curve
    from mates.engine.probe.stage import probe_stage, probed_samples, read_influences

    source = runs.of(METHOD)[0]
    stage, name = fitted_stages(source.recipe)[-1], source.recipe.reference.name
    own = beside(runs, source, f"labels-{options.labels}-{options.exact}", stage)
    own = replace(own, probe=replace(own.probe, samples=options.labels, method="linear", fidelity_samples=options.exact))
    pool = open_corpus(layout_of(own).corpus("pool"), own.pretrain.sequence_length)
    training = split_labels(probed_samples(own, pool.samples, stage), own.fit, own.seed)["train"]
    require(len(training) >= options.fewest, "--labels", options.labels, f"more than {options.fewest} training labels (--fewest)")
    fidelity = probe_stage(own, ALONE, METHOD, stage).info["fidelity"]
    ids, values, _ = read_influences(layout_of(own).labels(METHOD, stage), [name])
    samples = Samples(pool, ids)
    parts = split_labels(ids, own.fit, own.seed)
    divisors = [2**power for power in range(int(math.log2(len(parts["train"]) / options.fewest)), -1, -1)]
    curve = label_curve(lambda rows: all_features(samples[rows]), values[:, 0], parts, own.seed, stage, divisors)
    length = own.pretrain.sequence_length
    changed: Any = {"model": "encoder", "lr": 1e-3, "chunk_tokens": length, "max_chunks": 1, "warm_start": False, "earlier_labels": 0}
    encoder = replace(own, fit=replace(own.fit, **changed))
    read = fit_stage(encoder, ALONE, METHOD, stage).info
    reliability = fidelity["reliability"][name]["value"]
    items = own.reference.items
    half = reliability / (2 - reliability)  # of influences on half the items
    needed = {str(n): (2 * n / items) * half / (1 + (2 * n / items - 1) * half) for n in (20, 40, 80, 160, 320, 640, 1280)}
    figures = {
        "stage": stage,
        "labels": {part: len(rows) for part, rows in parts.items()},
        "reference_items": items,
        "reliability": fidelity["reliability"][name],
        "labels_with_endless_reference": math.sqrt(reliability),
        "reliability_by_reference_items": needed,
        "agreement_with_exact": {method: found[name] for method, found in fidelity["methods"].items()},
        "ngram": curve,
        "encoder": {"labels": read["labels"]["train"], **read["agreement"]["test"]},
    }
    figure = Figure(figsize=(8.5, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([point["labels"] for point in curve], [point["spearman"] for point in curve], "o-", color=SERIES[1], label="n-grams")
    left.plot([figures["encoder"]["labels"]], [figures["encoder"]["spearman"]], "s", color=SERIES[2], label="a small encoder")
    left.axhline(math.sqrt(reliability), color=SERIES[0], ls="--", label="labels, with an endless reference")
    left.set(xscale="log", xlabel="training labels", ylabel="Spearman on test labels", ylim=(0, 1))
    left.legend(frameon=False)
    right.plot([int(n) for n in needed], list(needed.values()), "o-", color=SERIES[3])
    right.set(xscale="log", xlabel="items of the reference", ylabel="reliability of exact influences", ylim=(0, 1))
    return Study(figures, figure)


# --- whether preferences move ----------------------------------------------------------------------------------------


def drift(runs: Runs, options: argparse.Namespace) -> Study:
    """How well the model of each stage predicts the test labels of every other, and what its choice is worth on them.

    Labels of later stages were probed on checkpoints that the earlier models had a hand in. Test labels are those of samples that no model
    of any stage was fitted to.
    """
    from mates.engine.influence.fit import agreement, split_labels
    from mates.engine.influence.model import Samples, joining, open_model, predict
    from mates.engine.probe.stage import label_weights, read_labels
    from mates.preprocess.tokenizer import open_tokenizer

    rank, worth = [], []
    for run in runs.of(METHOD):
        recipe, layout = run.recipe, layout_of(run.recipe)
        stages = fitted_stages(recipe)
        pool, (tokenizer, _) = open_corpus(layout.corpus("pool"), recipe.pretrain.sequence_length), open_tokenizer(layout.tokenizer)
        own_rank, own_worth = np.empty((len(stages), len(stages))), np.empty((len(stages), len(stages)))
        for row, fitted in enumerate(stages):
            directory = layout.influence_model(METHOD, fitted)
            model = open_model(directory, recipe, tokenizer, ALONE.device)
            join = joining(list(label_weights(recipe).values()), artifact.load(directory).info["label_covariance_nats2"])
            for column, probed in enumerate(stages):
                ids, nats, _ = read_labels(layout.labels(METHOD, probed), label_weights(recipe))
                parts = split_labels(ids, recipe.fit, recipe.seed)
                test, train = parts["test"], nats[parts["train"]]
                predicted = predict(model, Samples(pool, ids[test])).astype(np.float64) @ join
                spearman = agreement(predicted, nats[test])["spearman"]
                own_rank[row, column] = math.nan if spearman is None else spearman
                oracle = (nats[test] - train.mean()) / train.std()
                chosen = selected_influence(predicted, oracle, recipe.select.ratio, recipe.select.temperature)
                own_worth[row, column] = chosen["selected"] - chosen["random"]
        rank.append(own_rank)
        worth.append(own_worth)
    mean_rank, mean_worth = np.mean(rank, axis=0), np.mean(worth, axis=0)
    by_lag = {lag: float(np.mean(np.diagonal(mean_rank, lag))) for lag in range(len(mean_rank))}
    first = {"spearman": mean_rank[0].tolist(), "selected_sd": mean_worth[0].tolist()}
    fresh = {"spearman": np.diagonal(mean_rank).tolist(), "selected_sd": np.diagonal(mean_worth).tolist()}
    figures = {
        "seeds": len(rank),
        "stages": stages,
        "spearman": mean_rank.tolist(),
        "spearman_by_age": by_lag,
        "first_model": first,
        "fresh_model": fresh,
    }
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    heat, line, value = figure.subplots(1, 3)
    numbers = range(len(stages))
    shown = heat.imshow(mean_rank, origin="lower", cmap="viridis")
    heat.set(xlabel="labels of stage", ylabel="model of stage", title="Spearman on test labels")
    heat.set_xticks(numbers, stages)
    heat.set_yticks(numbers, stages)
    figure.colorbar(shown, ax=heat)
    for axes, key, label in (
        (line, "spearman", "Spearman on test labels"),
        (value, "selected_sd", "chosen, minus chance (SD; lower helps)"),
    ):
        axes.plot(stages, fresh[key], "o-", color=SERIES[1], label="model of the stage")
        axes.plot(stages, first[key], "s-", color=SERIES[2], label="model of stage 1")
        axes.set(xlabel="stage", ylabel=label)
        axes.legend(frameon=False)
    return Study(figures, figure)


def fitted_stages(recipe: Recipe) -> list[int]:
    """Stages that have labels and an influence model of their own."""
    return [stage for stage in range(1, recipe.pretrain.stages) if needs_influences(recipe, METHOD, stage)]


# --- one reference against others --------------------------------------------------------------------------------------

TASKS: Mapping[str, tuple[Any, str]] = {
    "arc-easy": ("arc", "arc_easy/train.jsonl.gz"),
    "arc-challenge": ("arc", "arc_challenge/train.jsonl.gz"),
    "boolq": ("boolq", "boolq/train.jsonl.gz"),
    "hellaswag": ("hellaswag", "hellaswag/validation.jsonl.gz"),
    "logiqa": ("logiqa", "logiqa/validation.jsonl.gz"),
    "openbookqa": ("openbookqa", "openbookqa/train.jsonl.gz"),
    "piqa": ("piqa", "piqa/train.jsonl.gz"),
    "sciq": ("sciq", "sciq/validation.jsonl.gz"),
    "winogrande": ("winogrande", "winogrande/train_xl.jsonl.gz"),
}


def references(runs: Runs, options: argparse.Namespace) -> Study:
    """Labels on LAMBADA's passages, on its last words and on nine tasks' answers: how they agree, how predictable they are, which sources
    help most, and how well the mean over some of the nine tasks foretells the mean over the others."""
    from mates.engine.influence.fit import split_labels
    from mates.engine.influence.model import Samples
    from mates.engine.influence.ngrams import all_features, label_curve
    from mates.engine.probe.fidelity import spearman

    source = runs.of(METHOD)[0]
    found: Json = {}
    for label, stage in (("early", 1), ("late", fitted_stages(source.recipe)[-1])):
        own, ids, passages = labels_on(runs, source, "references", stage, "passage", options)
        last_words = labels_on(runs, source, "references-last-words", stage, "answer", options)[2]
        names = ["passages", "last words", *TASKS]
        values = np.column_stack([passages[:, 0], last_words[:, 0], passages[:, 1:]])
        samples = Samples(open_corpus(layout_of(own).corpus("pool"), own.pretrain.sequence_length), ids)
        parts = split_labels(ids, own.fit, own.seed)
        features, sources, k = all_features(samples), Sources(samples.corpus).of(ids), max(1, round(own.select.ratio * len(ids)))
        tasks = (values[:, 2:] - values[:, 2:].mean(0)) / values[:, 2:].std(0)
        found[label] = {
            "stage": stage,
            "names": names,
            "spearman": [[float(spearman(one, other)) for other in values.T] for one in values.T],
            "mean_of_some_tasks_with_mean_of_others": {str(count): halves_agree(tasks, count) for count in (1, 2, 3, 4)},
            "predicted_spearman": {
                name: label_curve(features.__getitem__, column, parts, own.seed, stage, [1])[0]["spearman"]
                for name, column in zip(names, values.T, strict=True)
            },
            "best_by_source": {
                name: shares(sources[np.argsort(column, kind="stable")[:k]]) for name, column in zip(names, values.T, strict=True)
            },
            "all_by_source": shares(sources),
        }
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    for axes, one in zip(figure.subplots(1, 2), found.values(), strict=True):
        matrix, names = np.array(one["spearman"]), one["names"]
        shown = axes.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r")
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
        axes.set_yticks(range(len(names)), names)
        for row in range(len(names)):
            for column in range(len(names)):
                ink = "white" if abs(matrix[row, column]) > 0.6 else "black"
                axes.text(column, row, f"{matrix[row, column]:.2f}", ha="center", va="center", fontsize=6, color=ink)
        axes.set_title(f"Spearman between labels, stage {one['stage']}")
        figure.colorbar(shown, ax=axes)
    return Study(found, figure)


def labels_on(
    runs: Runs, source: Run, study: str, stage: int, span: Literal["answer", "passage"], options: argparse.Namespace
) -> tuple[Recipe, npt.NDArray[np.int64], Floats]:
    """The recipe, sample ids [n] and labels [n, 1 + tasks] of the checkpoint before a stage, on the run's reference and on the tasks."""
    from mates.engine.data.steps import reference_step
    from mates.engine.probe.stage import probe_stage, read_influences

    own = beside(runs, source, f"{study}-{options.samples}-{options.items}", stage)
    more = [
        TaskConfig(name=name, format=form, source=str(SHARED_DATA / "eval" / path), items=options.items)
        for name, (form, path) in (TASKS.items() if span == "passage" else ())
    ]
    own = replace(
        own,
        data_dir=None,
        probe=replace(own.probe, samples=options.samples, method="linear", fidelity_samples=0),
        reference=replace(own.reference, more=more, loss_over=span),
    )
    link_data(layout_of(source.recipe), layout_of(own))
    reference_step(own)
    probe_stage(own, ALONE, METHOD, stage)
    ids, values, _ = read_influences(layout_of(own).labels(METHOD, stage), [own.reference.name, *(task.name for task in more)])
    order = np.argsort(ids)
    return own, ids[order], values[order]


def halves_agree(tasks: Floats, count: int) -> float:
    """Mean Spearman correlation of the mean label over ``count`` tasks with that over the others; ``tasks`` [n, R] in SD."""
    from mates.engine.probe.fidelity import spearman

    found = []
    for some in itertools.combinations(range(tasks.shape[1]), count):
        others = [task for task in range(tasks.shape[1]) if task not in some]
        found.append(float(spearman(tasks[:, list(some)].mean(1), tasks[:, others].mean(1))))
    return statistics.fmean(found)


class Sources:
    """The collection that each sample's first predicted token is from: its document's source up to a colon (``owner/name:path``)."""

    def __init__(self, corpus: Corpus) -> None:
        self._known = DocumentValues(corpus, "source")
        self._names = np.array([name.partition(":")[0] for name in self._known.names])

    def of(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.str_]:
        """Of samples [n]."""
        return self._names[self._known.of_targets(ids)[:, 0]]


def shares(names: npt.NDArray[np.str_]) -> dict[str, float]:
    """The share of each name, the largest first."""
    values, counts = np.unique(names, return_counts=True)
    return {str(values[at]): float(counts[at] / len(names)) for at in np.argsort(-counts, kind="stable")}


# --- temperature and ratio -----------------------------------------------------------------------------------------------

TEMPERATURES = (1e-3, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
RATIOS = (0.05, 0.1, 0.2, 0.3, 0.5)
SHOWN_SOURCES = 12


def selection(runs: Runs, options: argparse.Namespace) -> Study:
    """Mean label of what each temperature and ratio would choose among the test labels of all stages; sources of what was chosen."""
    from mates.engine.data.blocks import make_blocks
    from mates.engine.data.index import read_index

    found: dict[float, dict[float, list[float]]] = {ratio: {temperature: [] for temperature in TEMPERATURES} for ratio in RATIOS}
    oracles: dict[float, list[float]] = {ratio: [] for ratio in RATIOS}
    sources: dict[str, list[dict[str, float]]] = {}
    candidates: list[dict[str, float]] = []
    complete = runs.of(METHOD)
    corpus = open_train_corpus(complete[0].recipe)  # all seeds' own
    known = Sources(corpus)
    for run in complete:
        for stage in fitted_stages(run.recipe):
            directory = layout_of(run.recipe).influence_model(METHOD, stage)
            info, table = artifact.load(directory).info, pq.read_table(directory / PREDICTIONS_FILE)
            test = np.array(table["part"].to_pylist()) == "test"
            nats, predicted = table["oracle_nats"].to_numpy()[test], table["predicted_sd"].to_numpy()[test].astype(np.float64)
            oracle = (nats - info["label_mean_nats"]) / info["label_sd_nats"]
            for ratio in RATIOS:
                for temperature in TEMPERATURES:
                    worth = selected_influence(predicted, oracle, ratio, temperature)
                    found[ratio][temperature].append(worth["sampled"] - worth["random"])
                oracles[ratio].append(worth["oracle"] - worth["random"])
            chosen_ids = read_index(layout_of(run.recipe).index(METHOD, stage), corpus.fingerprint).ids
            sources.setdefault(str(stage), []).append(shares(known.of(chosen_ids)))
        offered = make_blocks(run.recipe, corpus.samples)
        candidates.append(shares(known.of(offered.candidates(1, 0, min(offered.size(1), 20_000)))))
    everything = mean_shares(candidates)
    later = {stage: mean_shares(many) for stage, many in sources.items()}
    figures = {
        "labels_per_point": len(next(iter(oracles.values()))),
        "chosen_minus_chance_sd": {
            str(ratio): {str(temperature): statistics.fmean(values) for temperature, values in row.items()} for ratio, row in found.items()
        },
        "oracle_minus_chance_sd": {str(ratio): statistics.fmean(values) for ratio, values in oracles.items()},
        "sources_of_candidates": everything,
        "sources_of_chosen": later,
    }
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    for number, ratio in enumerate(RATIOS):
        means = [statistics.fmean(found[ratio][temperature]) for temperature in TEMPERATURES]
        left.plot(TEMPERATURES, means, "o-", color=SERIES[number + 1], label=f"ratio {ratio:g}")
    left.set(xscale="log", xlabel="temperature (SD of labels)", ylabel="mean label of the chosen,\nminus chance (SD; lower helps)")
    left.legend(frameon=False)
    names, chosen = list(everything)[:SHOWN_SOURCES], later
    bottom = np.zeros(len(chosen) + 1)
    for number, name in enumerate(names):
        heights = np.array([everything[name], *(chosen[stage].get(name, 0.0) for stage in chosen)])
        right.bar(["all", *chosen], heights, bottom=bottom, label=name.partition("@")[0], color=mpl.colormaps["tab20"](number % 20))
        bottom += heights
    right.set(xlabel="stage", ylabel="share of what was chosen\n(the rest: smaller sources)", ylim=(0, 1))
    right.legend(frameon=False, fontsize=6, ncols=1, bbox_to_anchor=(1, 1), loc="upper left")
    return Study(figures, figure)


def mean_shares(many: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Shares averaged over seeds, the largest first."""
    names = {name for one in many for name in one}
    means = {name: statistics.fmean(one.get(name, 0.0) for one in many) for name in names}
    return dict(sorted(means.items(), key=lambda item: (-item[1], item[0])))


# --- what selection costs --------------------------------------------------------------------------------------------


def overhead(runs: Runs, options: argparse.Namespace) -> Study:
    """Selection's share of FLOPs and of seconds, part by part, of every arm; and by formula for longer stages with as many labels."""
    from comparison import SELECTION
    from comparison import overhead as of_arm

    from mates.engine.plan import make_plan

    arms = runs.measured()
    names = [name for name in runs.tier.arms if any(arm.name == name for arm in arms) and name != "random"]
    measured_shares = {name: of_arm(arms, name) | {"seeds": [arm.seed for arm in arms if arm.name == name]} for name in names}
    lines = [f"{name} ({len(measured_shares[name]['seeds'])})" for name in names]
    recipe = runs.of(METHOD)[0].recipe
    steps = [recipe.pretrain.steps_per_stage * factor for factor in (1, 2, 4, 8, 16, 32)]
    predicted = {}
    for count in steps:
        flops = make_plan(replace(recipe, pretrain=replace(recipe.pretrain, steps_per_stage=count)), METHOD).flops
        predicted[str(count)] = sum(flops[part] for part in SELECTION if part in flops) / flops["pretrain"]
    figures = {"arms": measured_shares, "over_pretraining_by_steps_per_stage": predicted}
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, key, label in zip(
        figure.subplots(1, 3)[:2], ("share", "share_of_time"), ("share of all FLOPs (%)", "share of all seconds (%)"), strict=True
    ):
        bottom = np.zeros(len(names))
        for number, part in enumerate(SELECTION):
            heights = np.array([100 * measured_shares[name]["overhead"][part][key] for name in names])
            axes.barh(lines, heights, left=bottom, color=SERIES[number + 1], label=part)
            bottom += heights
        axes.set(xlabel=label, ylabel="arm (seeds)" if key == "share" else "")
        axes.invert_yaxis()
        axes.legend(frameon=False)
    right = figure.axes[2]
    right.plot(steps, [100 * value for value in predicted.values()], "o-", color=SERIES[1])
    right.set(xscale="log", yscale="log", xlabel="optimizer steps of a stage", ylabel="selection over pretraining (%)")
    return Study(figures, figure)


MODELS = ("pythia-70m", "pythia-160m", "pythia-410m", "pythia-1b", "pythia-2.8b", "pythia-6.9b", "pythia-12b")
LARGER = {"30b": (7168, 48, 56), "70b": (8192, 80, 64)}  # width, layers, heads


def cost(runs: Runs, options: argparse.Namespace) -> Study:
    """Selection over pretraining by the ledger's formulas, in the paper's setting (stages of 10,000 steps of 512 × 1,024 tokens, 80,000
    labels, a fifth selected): exact probes with BERT-base, linear probes with it, with a small encoder, and with n-grams.

    The formulas are those of ``mates plan``. What they say of this tier's own run is held against what its steps were billed.
    """
    from comparison import SELECTION

    from mates.engine.plan import make_plan
    from mates.launchers.recipe import load_recipe

    paper = load_recipe(REPOSITORY / "launchers" / "recipes" / "pythia-410m-c4.yaml")
    small = FitConfig(chunk_tokens=1024, max_chunks=1, hidden_size=256, layers=4, heads=4, lr=1e-3)
    linear = replace(paper, probe=replace(paper.probe, method="linear", fidelity_samples=32))
    ways = {
        "exact probes, BERT-base (the paper)": replace(paper, probe=replace(paper.probe, fidelity_samples=0)),
        "linear probes, BERT-base": linear,
        "linear probes, encoder 4 × 256": replace(linear, fit=small),
        "linear probes, n-grams": replace(linear, fit=FitConfig(model="ngram")),
    }
    models = {name: replace(paper.model, preset=name) for name in MODELS}
    models |= {
        name: replace(paper.model, preset=None, hidden_size=width, layers=layers, heads=heads, max_positions=2048)
        for name, (width, layers, heads) in LARGER.items()
    }
    sizes: list[int] = []
    found: dict[str, list[Json]] = {way: [] for way in ways}
    for name, model in models.items():
        for way, recipe in ways.items():
            plan = make_plan(replace(recipe, model=model), METHOD)
            parts = {part: plan.flops[part] / plan.flops["pretrain"] for part in SELECTION if part in plan.flops}
            found[way].append({"model": name, "parameters": plan.parameters, "over_pretraining": sum(parts.values()), "parts": parts})
        sizes.append(plan.parameters)
    figures: Json = {"ways": found}
    own = [arm.rows[-1] for arm in runs.measured() if arm.name == METHOD]
    if own:
        plan = make_plan(next(run.recipe for run in runs.runs if run.arm and run.arm.name == METHOD), METHOD)
        figures["formula_over_billed"] = {
            part: plan.flops[part] / statistics.fmean(row.flops[part] for row in own) for part in ("pretrain", "probe", "fit", "score")
        }
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, (way, rows) in enumerate(found.items()):
        axes.plot(sizes, [100 * row["over_pretraining"] for row in rows], "o-", color=SERIES[number + 1], label=way)
    axes.axhline(5, color=SERIES[0], ls="--", lw=1)
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="selection over pretraining (% of FLOPs)")
    axes.legend(frameon=False, fontsize=7)
    return Study(figures, figure)


STUDIES: Mapping[str, Callable[[Runs, argparse.Namespace], Study]] = {
    "labels": labels,
    "drift": drift,
    "references": references,
    "selection": selection,
    "overhead": overhead,
    "cost": cost,
}


# --- folders ---------------------------------------------------------------------------------------------------------


def beside(runs: Runs, run: Run, study: str, stage: int) -> Recipe:
    """A recipe for probing a run's checkpoint before ``stage`` again, in a folder of the study's own. GateError where it is gone."""
    own = replace(run.recipe, run_dir=str(runs.out / "studies" / study / f"seed-{run.recipe.seed}"), methods=[METHOD])
    for verb in ("pretrain", "evaluate"):
        theirs, ours = (layout_of(one).of_step(verb, METHOD, stage - 1) for one in (run.recipe, own))
        if not theirs.is_dir():
            raise GateError(f"{theirs}: no such folder, and it would be probed; a tier with `prune: true` keeps no checkpoints")
        link(theirs, ours)
    return own


def link_data(theirs: Layout, ours: Layout) -> None:
    """Use a run's tokenizer and corpora."""
    link(theirs.tokenizer, ours.tokenizer)
    link(theirs.corpus("train").parent, ours.corpus("train").parent)


def link(theirs: Path, ours: Path) -> None:
    """Let ``ours`` be ``theirs``, by a link that holds when all runs are moved."""
    wanted = os.path.relpath(theirs.resolve(), ours.parent.resolve())
    if ours.is_symlink() and str(ours.readlink()) != wanted:
        ours.unlink()
    if not ours.is_symlink():
        ours.parent.mkdir(parents=True, exist_ok=True)
        ours.symlink_to(wanted, target_is_directory=True)


# --- results ---------------------------------------------------------------------------------------------------------


def not_finite(value: Any, where: str = "") -> list[str]:
    """Places of figures that are missing or not finite."""
    if value in ({}, []):
        return [where]
    if isinstance(value, dict):
        return [place for key, item in value.items() for place in not_finite(item, f"{where}.{key}")]
    if isinstance(value, list):
        return [place for number, item in enumerate(value) for place in not_finite(item, f"{where}.{number}")]
    return [where] if value is None or (isinstance(value, float) and not math.isfinite(value)) else []


def write_study(folder: Path, name: str, study: Study, settings: Json) -> None:
    """Write NAME.json, .png and .svg. GateError where a figure is missing."""
    if places := not_finite(study.figures):
        raise GateError(f"no figure at {', '.join(places)}")
    found = surroundings() | {"settings": settings} | study.figures
    artifact.write_json(folder / f"{name}.json", without_paths(found))
    save_figure(study.plot, folder, name)


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options, and recipe values by their dotted names."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("study", choices=[*STUDIES, "all"], metavar="NAME", help=f"{', '.join(STUDIES)}, or all")
    add("--tier", default="cpu", help="as for flops_to_accuracy.py")
    add("--seeds", type=int, default=3, help="seeds that are looked at, counted up from the recipe's own")
    add("--out", type=Path, help="folder of the runs (default runs/flops_to_accuracy_TIER)")
    add("--results", type=Path, default=REPOSITORY / "benchmarks" / "results", help="folder of results")
    add("--labels", type=int, default=4000, help="labels: samples that are probed")
    add("--fewest", type=int, default=60, help="labels: training labels at the first point of the curve, at least")
    add("--exact", type=int, default=128, help="labels: samples that are probed exactly as well")
    add("--samples", type=int, default=1000, help="references: samples that are probed")
    add("--items", type=int, default=200, help="references: items of each task beside LAMBADA")
    return parser.parse_known_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 1 the gate is closed or a step failed, 2 a bad option."""
    options, overrides = parse(arguments)
    return exit_code("studies", lambda: run_studies(options, overrides))


def run_studies(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """The studies that are asked for. Exit code 1 where one of them lacks something."""
    tier = load_tier(options.tier)
    out = options.out or Path("runs") / tier.results_name
    for option, least in (("seeds", 1), ("exact", 8), ("samples", 20), ("items", 2), ("fewest", 2)):
        require(getattr(options, option) >= least, f"--{option}", getattr(options, option), f"at least {least}")
    every = tuple(runs_of(tier, list(tier.arms), options.seeds, out, overrides))
    runs = Runs(tier=tier, out=out, runs=every, given=options.tier, overrides=tuple(overrides))
    settings = {key: value for key, value in vars(options).items() if key not in ("results", "out", "study")}
    is_closed = False
    for name in STUDIES if options.study == "all" else [options.study]:
        try:
            write_study(options.results, f"study_{name}_{tier.name}", STUDIES[name](runs, options), settings)
        except (GateError, RecipeError, ArtifactError, InputError) as error:  # one that lacks something leaves the others alone
            print(f"studies: {name}: {error}", file=sys.stderr)
            is_closed = True
        else:
            print(f"study {name}: written to {options.results}", flush=True)
    return 1 if is_closed else 0


if __name__ == "__main__":
    sys.exit(main())

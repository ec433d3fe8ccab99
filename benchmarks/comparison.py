"""Runs that are compared at their evaluations: what each cost and reached, whether they may be compared, and by how much they differ."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from mates.engine.config import Recipe
from mates.engine.evaluate.contents import metrics_of
from mates.engine.layout import layout_of
from mates.engine.ledger import PHASES, Ledger, collect
from mates.preprocess import artifact
from mates.preprocess.artifact import Cost

BASELINE = "random"
SELECTION = PHASES["selection"]
PARTS = ("pretrain", *SELECTION)
RESAMPLES, ALL_RESAMPLES_OF = 10_000, 6  # of up to six seeds every resample is taken (6⁶ = 46,656)
COVERED = 0.95

Censored = Literal["not reached", "before the first evaluation"]
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """An evaluation of an arm of one seed. FLOPs and seconds are cumulative over the arm's path, by part (``PARTS``)."""

    seed: int
    arm: str
    method: str
    stage: int
    flops: dict[str, float]
    seconds: dict[str, float]
    pretrain_tokens: int
    metrics: dict[str, float]

    @property
    def total_flops(self) -> float:
        """Pretraining and selection."""
        return sum(self.flops.values())

    @property
    def selection_flops(self) -> float:
        """Probe, fit, score and select."""
        return sum(self.flops[part] for part in SELECTION)

    def numbers(self) -> dict[str, float]:
        """What is averaged over seeds."""
        return {"total_flops": self.total_flops, "seconds": sum(self.seconds.values())} | self.metrics

    def line(self) -> Json:
        """A line of the tidy table."""
        return {
            "seed": self.seed,
            "arm": self.arm,
            "method": self.method,
            "stage": self.stage,
            "total_flops": self.total_flops,
            "selection_flops": self.selection_flops,
            **{f"{part}_flops": self.flops[part] for part in PARTS},
            "seconds": sum(self.seconds.values()),
            **{f"{part}_seconds": self.seconds[part] for part in PARTS},
            "pretrain_tokens": self.pretrain_tokens,
            **self.metrics,
        }

    @classmethod
    def from_line(cls, line: Mapping[str, str]) -> Row:
        """What :meth:`line` gave, after a CSV. KeyError or ValueError for anything else."""
        return cls(
            seed=int(line["seed"]),
            arm=line["arm"],
            method=line["method"],
            stage=int(line["stage"]),
            flops={part: float(line[f"{part}_flops"]) for part in PARTS},
            seconds={part: float(line[f"{part}_seconds"]) for part in PARTS},
            pretrain_tokens=int(line["pretrain_tokens"]),
            metrics={name: float(value) for name, value in line.items() if name not in _COLUMNS},
        )


_NOTHING = dict.fromkeys(PARTS, 0.0)
_COLUMNS = Row(seed=0, arm="", method="", stage=0, flops=_NOTHING, seconds=_NOTHING, pretrain_tokens=0, metrics={}).line().keys()
"""Of the tidy table, beside metrics."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm of one seed: its evaluations, fingerprints of its stage-0 checkpoint and test sets, and the machine, versions and commit that
    it was measured with."""

    seed: int
    name: str
    method: str
    stage0: str | None
    test_sets: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    surroundings: Json = field(default_factory=dict)

    def __str__(self) -> str:
        return f"seed {self.seed} {self.name}"

    def as_json(self) -> Json:
        """For :meth:`from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Json) -> Arm:
        """What :meth:`as_json` gave."""
        return cls(**raw | {"rows": [Row(**row) for row in raw["rows"]]})


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """FLOPs at which a loss is first reached, or why that is not known."""

    flops: float | None = None
    censored: Censored | None = None


# --- measurement ---------------------------------------------------------------------------------------------------


def measure(recipe: Recipe) -> list[Arm]:
    """What the artifacts of a run say of each of its methods. Steps that are not complete are left out; the gate then names them."""
    ledger = collect(recipe)
    return [measure_arm(recipe, ledger, method, method) for method in recipe.methods]


def measure_arm(recipe: Recipe, ledger: Ledger, name: str, method: str) -> Arm:
    """What the artifacts say of one method of a run."""
    stages = range(recipe.pretrain.stages)
    rows = [row for stage in stages if (row := _row(recipe, ledger, name, method, stage)) is not None]
    test_sets: dict[str, str] = {}
    for row in rows:
        inputs = artifact.load(layout_of(recipe).evaluation(method, row.stage), "evaluation").inputs
        test_sets |= {key: value for key, value in inputs.items() if key != "checkpoint"}
    return Arm(seed=recipe.seed, name=name, method=method, stage0=_stage0(recipe, method), test_sets=test_sets, rows=rows)


def _row(recipe: Recipe, ledger: Ledger, name: str, method: str, stage: int) -> Row | None:
    metrics, costs = metrics_of(recipe, ledger, method, stage), _costs(ledger, method, stage)
    if metrics is None or costs is None:
        return None
    return Row(
        seed=recipe.seed,
        arm=name,
        method=method,
        stage=stage,
        flops={part: math.fsum(cost.flops for cost in costs[part]) for part in PARTS},
        seconds={part: math.fsum(cost.seconds for cost in costs[part]) for part in PARTS},
        pretrain_tokens=sum(cost.tokens for cost in costs["pretrain"]),
        metrics={key: value for key, value in metrics.items() if isinstance(value, float)},  # the rest are counts
    )


def _costs(ledger: Ledger, method: str, stage: int) -> dict[str, list[Cost]] | None:
    """Costs of a method's path up to and including a stage, by part; None where a step is missing."""
    found: dict[str, list[Cost]] = {part: [] for part in PARTS}
    for entry in ledger.path(method, stage):
        if entry.step.verb in found:
            if entry.cost is None:
                return None
            found[entry.step.verb].append(entry.cost)
    return found


def _stage0(recipe: Recipe, method: str) -> str | None:
    """Fingerprint of the stage-0 checkpoint that a method's own first stage says it continued from."""
    layout = layout_of(recipe)
    try:
        if recipe.pretrain.stages == 1:
            return artifact.load(layout.checkpoint(method, 0), "checkpoint").fingerprint
        return artifact.load(layout.checkpoint(method, 1), "checkpoint").inputs["parent"]
    except artifact.ArtifactError:
        return None


# --- gate ----------------------------------------------------------------------------------------------------------


def gate(arms: Sequence[Arm], stages: int) -> list[str]:
    """Why the arms may not be compared, a line each; none where they may."""
    problems = [problem for arm in arms for problem in _gate_arm(arm, stages)]
    for seed in sorted({arm.seed for arm in arms}):
        problems += _gate_seed(seed, [arm for arm in arms if arm.seed == seed], stages)
    if len({tuple(sorted(arm.test_sets.items())) for arm in arms}) > 1:
        problems.append("the arms were evaluated on different test sets")
    names = {name for arm in arms for row in arm.rows for name in row.metrics}
    for arm in arms:
        if missing := sorted(names - {name for row in arm.rows for name in row.metrics}):
            problems.append(f"{arm}: it was evaluated without {', '.join(missing)}, which others have")
    return problems


def missing_stages(arm: Arm, stages: int) -> list[int]:
    """Stages whose evaluation, or costs until then, are not complete."""
    return sorted(set(range(stages)) - {row.stage for row in arm.rows})


def _gate_arm(arm: Arm, stages: int) -> Iterator[str]:
    missing = missing_stages(arm, stages)
    if missing:
        yield f"{arm}: no complete evaluation and costs of stage {', '.join(map(str, missing))}"
    for row in arm.rows:
        bad = [key for key, value in row.numbers().items() if not math.isfinite(value)]
        if bad:
            yield f"{arm} stage {row.stage}: {', '.join(bad)} not finite"
        if not row.flops["pretrain"] > 0:
            yield f"{arm} stage {row.stage}: {row.flops['pretrain']} pretraining FLOPs"


def _gate_seed(seed: int, arms: Sequence[Arm], stages: int) -> Iterator[str]:
    if len({arm.stage0 for arm in arms}) > 1 or arms[0].stage0 is None:
        found = ", ".join(f"{arm.name} {(arm.stage0 or 'none')[:12]}" for arm in arms)
        yield f"seed {seed}: the arms do not share one stage-0 checkpoint ({found})"
    for stage in range(stages):
        rows = [row for arm in arms for row in arm.rows if row.stage == stage]
        if len({(row.flops["pretrain"], row.pretrain_tokens) for row in rows}) > 1:
            found = ", ".join(f"{r.arm} {r.flops['pretrain']:.6g} FLOPs, {r.pretrain_tokens} tokens" for r in rows)
            yield f"seed {seed} stage {stage}: pretraining differs between arms ({found})"


# --- between evaluations -------------------------------------------------------------------------------------------


def flops_to_reach(target: float, flops: Sequence[float], losses: Sequence[float]) -> Crossing:
    """FLOPs at which the line through the evaluations first comes down to ``target``: straight in (loss, log FLOPs)."""
    if losses[0] <= target:
        return Crossing(flops=flops[0]) if losses[0] == target else Crossing(censored="before the first evaluation")
    for after in range(1, len(losses)):
        before = after - 1
        if losses[after] <= target:
            part = (losses[before] - target) / (losses[before] - losses[after])
            return Crossing(flops=math.exp((1 - part) * math.log(flops[before]) + part * math.log(flops[after])))
    return Crossing(censored="not reached")


def value_at(wanted: float, flops: Sequence[float], values: Sequence[float]) -> float | None:
    """A metric at ``wanted`` FLOPs, on the same lines; None outside the evaluations, where nothing is known of it."""
    if not flops[0] <= wanted <= flops[-1]:
        return None
    return float(np.interp(math.log(wanted), np.log(flops), values))


# --- over seeds ----------------------------------------------------------------------------------------------------


def final_of(arms: Sequence[Arm], seed: int) -> Row:
    """The baseline's last evaluation of a seed."""
    return next(arm for arm in arms if (arm.seed, arm.name) == (seed, BASELINE)).rows[-1]


def median(values: Sequence[float]) -> float:
    """The median of ratios of which 0 and infinity stand for censored ones; one that falls between such and another is censored too."""
    ordered = sorted(values)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return (low + high) / 2 if low > 0 else 0.0


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95% percentile interval of the median under resampling of the seeds; None for one seed.

    Quantiles are values that some resample has (no interpolation), so that censored ones stay what they are. Of up to six seeds
    all resamples are taken. With three the interval is the range: no fewer than 7 of 27 resamples have either end as their median.
    """
    n = len(values)
    if n < 2:
        return None
    every = itertools.product(range(n), repeat=n) if n <= ALL_RESAMPLES_OF else np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    medians = sorted(median([values[seed] for seed in resample]) for resample in every)
    outside = (1 - COVERED) / 2
    return medians[math.ceil(outside * len(medians)) - 1], medians[math.ceil((1 - outside) * len(medians)) - 1]


def ratio_to_baseline(arms: Sequence[Arm], name: str, metric: str) -> Json:
    """FLOPs to reach the baseline's final loss over the baseline's FLOPs: each seed, median, 95% bootstrap interval and range.

    A censored seed counts as what it is, above all measured ratios or below them; a median or a bound that falls on one is None.
    """
    seeds, ratios = [], []
    for arm in (arm for arm in arms if arm.name == name):
        final = final_of(arms, arm.seed)
        target, losses = final.metrics[metric], [row.metrics[metric] for row in arm.rows]
        crossing = flops_to_reach(target, [row.total_flops for row in arm.rows], losses)
        ratio = None if crossing.flops is None else crossing.flops / final.total_flops
        ratios.append(ratio or (math.inf if crossing.censored == "not reached" else 0.0))
        seeds.append({"seed": arm.seed, "target": target, "ratio": ratio, "censored": crossing.censored})
    low, high = (_measured(end) for end in bootstrap_interval(ratios) or (0.0, 0.0))
    return {
        "metric": metric,
        "per_seed": seeds,
        "reached": sum(seed["ratio"] is not None for seed in seeds),
        "censored": sum(seed["ratio"] is None for seed in seeds),
        "median": _measured(median(ratios)),
        "low": low,
        "high": high,
        "range": [_measured(min(ratios)), _measured(max(ratios))],
    }


def _measured(ratio: float) -> float | None:
    return ratio if 0 < ratio < math.inf else None


def mean_and_error(values: Sequence[float]) -> Json:
    """Mean (None of no value), standard error of the mean (None of a single one) and number of values."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values) if values else None, "standard_error": error, "n": len(values)}


def last_stage(arms: Sequence[Arm], name: str) -> dict[str, Json]:
    """Mean and standard error over seeds of each number at the last stage, and of its difference from the baseline."""
    own = {arm.seed: arm.rows[-1].numbers() for arm in arms if arm.name == name}
    base = {seed: final_of(arms, seed).numbers() for seed in own}
    return {
        key: mean_and_error([own[seed][key] for seed in own])
        | {"minus_random": mean_and_error([own[seed][key] - base[seed][key] for seed in own])}
        for key in next(iter(own.values()))
    }


def minus_random(arms: Sequence[Arm], name: str) -> dict[str, Json]:
    """Each metric minus the baseline's of the same seed: at equal tokens (the last stage), and at the baseline's final total FLOPs.

    Mean and standard error over seeds. ``censored`` counts seeds whose evaluations do not reach as many FLOPs.
    """
    runs = [arm for arm in arms if arm.name == name]
    found: dict[str, Json] = {}
    for metric in runs[0].rows[-1].metrics:
        tokens, flops = [], []
        for arm in runs:
            final = final_of(arms, arm.seed)
            tokens.append(arm.rows[-1].metrics[metric] - final.metrics[metric])
            value = value_at(final.total_flops, [row.total_flops for row in arm.rows], [row.metrics[metric] for row in arm.rows])
            flops += [] if value is None else [value - final.metrics[metric]]
        censored = {"censored": len(runs) - len(flops)}
        found[metric] = {"equal_tokens": mean_and_error(tokens), "equal_flops": mean_and_error(flops) | censored}
    return found


def overhead(arms: Sequence[Arm], name: str) -> Json:
    """What selection costs over the whole path, shares of the total (pretraining and selection); means over seeds."""
    rows = [arm.rows[-1] for arm in arms if arm.name == name]

    def mean(values: Iterator[float]) -> float:
        return statistics.fmean(values)

    parts = {
        part: {
            "flops": mean(row.flops[part] for row in rows),
            "seconds": mean(row.seconds[part] for row in rows),
            "share": mean(row.flops[part] / row.total_flops for row in rows),
            "share_of_time": mean(row.seconds[part] / sum(row.seconds.values()) for row in rows),
        }
        for part in SELECTION
    }
    return {
        "overhead_share": math.fsum(part["share"] for part in parts.values()),
        "overhead_share_of_time": math.fsum(part["share_of_time"] for part in parts.values()),
        "overhead": parts,
    }

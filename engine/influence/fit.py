"""The fit step: an influence model out of labels, with a proper test."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy import stats

from mates.engine.config import FitConfig, Recipe
from mates.engine.data.corpus import open_corpus
from mates.engine.distributed import World
from mates.engine.influence.encoder import EncoderModel, encoder_inputs, load_encoder, new_encoder
from mates.engine.influence.model import InfluenceModel, open_model
from mates.engine.influence.ngrams import NgramModel, best_ridge, curve_line, label_curve, ngram_features, ridge_flops
from mates.engine.influence.training import EncoderFit
from mates.engine.layout import layout_of
from mates.engine.probe.stage import label_weights, read_labels
from mates.engine.progress import say
from mates.engine.random import key_of, uniform
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, Cost, Manifest, Request
from mates.preprocess.tokenizer import open_tokenizer

PARTS = ("train", "validation", "test")
PREDICTIONS_FILE = "predictions.parquet"

Floats = npt.NDArray[np.float64]


def split_labels(ids: npt.NDArray[np.int64], config: FitConfig, seed: int) -> dict[str, npt.NDArray[np.int64]]:
    """Rows of each part, by a keyed hash of the sample id: a sample stays in its part at every stage."""
    draw = uniform(ids, seed, "fit-split")
    test = draw < config.test_share
    validation = ~test & (draw < config.test_share + config.validation_share)
    return {
        "train": np.flatnonzero(~test & ~validation),
        "validation": np.flatnonzero(validation),
        "test": np.flatnonzero(test),
    }


def check_parts(parts: dict[str, npt.NDArray[np.int64]]) -> None:
    """ArtifactError where a part has too few labels."""
    for name, rows in parts.items():
        if len(rows) < 2:
            advice = "lower fit.test_share and fit.validation_share" if name == "train" else f"raise fit.{name}_share"
            raise ArtifactError(f"fit: {len(rows)} labels in the {name} part, at least 2 are needed; raise probe.samples or {advice}")


def agreement(predicted: npt.NDArray[np.floating[Any]], oracle: npt.NDArray[np.floating[Any]]) -> dict[str, float | None]:
    """Spearman's and Pearson's correlation; None where one side is constant or there are fewer than three points."""
    if len(predicted) < 3 or np.ptp(predicted) == 0 or np.ptp(oracle) == 0:
        return {"spearman": None, "pearson": None}
    return {
        "spearman": float(stats.spearmanr(predicted, oracle).statistic),
        "pearson": float(stats.pearsonr(predicted, oracle).statistic),
    }


def selected_influence(predicted: Floats, oracle: Floats, ratio: float) -> dict[str, float]:
    """What choosing by predictions is worth: the mean oracle influence of the share of samples with the lowest predictions, of all samples
    (a random choice) and of the share with the lowest oracle influences (the best choice), in the unit of ``oracle``."""
    k = max(1, round(ratio * len(oracle)))
    return {
        "selected": float(oracle[np.argsort(predicted, kind="stable")[:k]].mean()),
        "random": float(oracle.mean()),
        "oracle": float(np.sort(oracle)[:k].mean()),
    }


def calibration(predicted: Floats, oracle: Floats) -> dict[str, float | None]:
    """Slope and intercept of the oracle's influences on predictions: 1 and 0 where predictions are right in size too."""
    if len(predicted) < 3 or np.ptp(predicted) == 0:
        return {"slope": None, "intercept": None}
    line = stats.linregress(predicted, oracle)
    return {"slope": float(line.slope), "intercept": float(line.intercept)}


def _parent(recipe: Recipe, method: str, stage: int) -> Path | None:
    """The influence model that fitting starts from."""
    return layout_of(recipe).influence_model(method, stage - 1) if recipe.fit.starts_from_earlier(stage) else None


def fit_request(recipe: Recipe, method: str, stage: int) -> Request:
    """The influence model that scores the candidates of ``stage``."""
    layout, parent = layout_of(recipe), _parent(recipe, method, stage)
    inputs = {
        "labels": artifact.load(layout.labels(method, stage), "labels").fingerprint,
        "tokenizer": artifact.load(layout.tokenizer, "tokenizer").fingerprint,
    }
    if parent is not None:
        inputs["parent"] = artifact.load(parent, "influence model").fingerprint
    settings = asdict(recipe.fit) | {"stage": stage, "seed": recipe.seed, "label_weights": label_weights(recipe)}
    return Request(directory=layout.influence_model(method, stage), kind="influence model", settings=settings, inputs=inputs)


def fit_stage(recipe: Recipe, world: World, method: str, stage: int) -> Manifest:
    """Fit the influence model that scores the candidates of ``stage``. Runs on one rank."""
    request = fit_request(recipe, method, stage)
    done = request.find()
    if done:
        return done
    start = time.perf_counter()
    layout, parent = layout_of(recipe), _parent(recipe, method, stage)
    ids, values, labels = read_labels(layout.labels(method, stage), label_weights(recipe))
    pool = open_corpus(layout.corpus("pool"), recipe.pretrain.sequence_length)
    found = Labels(ids, values, pool.windows(ids)[:, :-1], split_labels(ids, recipe.fit, recipe.seed))
    label = f"fit {method} stage {stage}"
    is_ngram = recipe.fit.model == "ngram"
    fitted = _fit_ngrams(found) if is_ngram else _fit_encoder(recipe, world, found, stage, parent, label)
    predicted = fitted.model.predict(found.windows)
    _save(request.directory, fitted.model, found, predicted)
    test = found.parts["test"]
    on_test = predicted[test].astype(np.float64), found.targets[test].astype(np.float64)
    curve = label_curve(found.windows, values, found.parts, recipe.seed, stage)
    info = {
        "model": recipe.fit.model,
        "label_mean_nats": found.mean,
        "label_sd_nats": found.sd,
        "labels": {name: len(rows) for name, rows in found.parts.items()},
        "agreement": {name: agreement(predicted[rows], values[rows]) for name, rows in found.parts.items()},
        "selection": {"ratio": recipe.select.ratio, **selected_influence(*on_test, recipe.select.ratio)},
        "calibration": calibration(*on_test),
        "drift": _drift(recipe, world, method, stage, found, predicted),
        "epochs": fitted.history,
        "label_curve": curve,
        "flops_per_sample": fitted.model.forward_flops(1, recipe.pretrain.sequence_length),
        "references": labels.info["references"],
        "warm_started": parent is not None,
    }
    flops = fitted.flops + fitted.model.forward_flops(*found.windows.shape)
    cost = Cost(flops=flops, seconds=time.perf_counter() - start, tokens=fitted.tokens + found.windows.size)
    result = request.commit(info=info, cost=cost)
    shown = ", ".join(f"{name} {'undefined' if value is None else f'{value:.3f}'}" for name, value in info["agreement"]["test"].items())
    worth = info["selection"]
    say(
        f"{label}: on {len(test)} test labels {shown}; the chosen {worth['ratio']:.0%} have a mean influence of "
        f"{worth['selected']:+.2f} SD, where chance has {worth['random']:+.2f} and the oracle {worth['oracle']:+.2f}; {curve_line(curve)}"
    )
    return result


def _drift(
    recipe: Recipe, world: World, method: str, stage: int, labels: Labels, predicted: npt.NDArray[np.float32]
) -> dict[str, float | None] | None:
    """How the predictions for the test labels agree with those of the stage before: has the model's preference moved?

    None where that stage has no model of the kind: nothing but this figure needs one.
    """
    earlier = layout_of(recipe).influence_model(method, stage - 1)
    if stage < 2 or not (earlier / artifact.MANIFEST_NAME).is_file():
        return None
    if artifact.load(earlier, "influence model").info["model"] != recipe.fit.model:
        return None
    tokenizer, _ = open_tokenizer(layout_of(recipe).tokenizer)
    rows = labels.parts["test"]
    before = open_model(earlier, recipe, tokenizer, world.device).predict(labels.windows[rows])
    return agreement(predicted[rows], before)


class Labels:
    """What an influence model is fitted to: samples [n, L], their influences [n] in nats and in SD of the training labels."""

    def __init__(
        self,
        ids: npt.NDArray[np.int64],
        values: npt.NDArray[np.float64],
        windows: npt.NDArray[np.int64],
        parts: dict[str, npt.NDArray[np.int64]],
    ) -> None:
        """Standardise. ArtifactError for parts that are too small, or labels that are all equal."""
        check_parts(parts)
        self.ids, self.values, self.windows, self.parts = ids, values, windows, parts
        train = values[parts["train"]]
        self.mean, self.sd = float(train.mean()), float(train.std())
        if self.sd == 0:
            raise ArtifactError("fit: all training labels are equal; the probe found no difference between samples")
        self.targets = ((values - self.mean) / self.sd).astype(np.float32)


@dataclass(frozen=True)
class Fitted:
    """An influence model, what fitting took, and the errors of its epochs."""

    model: InfluenceModel
    flops: float
    tokens: int
    history: list[dict[str, float]]


def _fit_ngrams(labels: Labels) -> Fitted:
    features, targets = ngram_features(labels.windows), labels.targets.astype(np.float64)
    train = labels.parts["train"]
    ridge = best_ridge(features, targets, train, labels.parts["validation"])
    length = labels.windows.shape[1]
    return Fitted(NgramModel(ridge), ridge_flops(len(train), length), len(train) * length, [])


def _fit_encoder(recipe: Recipe, world: World, labels: Labels, stage: int, parent: Path | None, label: str) -> Fitted:
    tokenizer, _ = open_tokenizer(layout_of(recipe).tokenizer)
    reader = encoder_inputs(recipe.fit, tokenizer, tokenizer.vocab_size)
    torch.manual_seed(key_of(recipe.seed, "fit", stage)[0])
    module = (load_encoder(parent) if parent else new_encoder(recipe.fit, reader.vocab_size)).to(world.device)
    model = EncoderModel(module, reader, recipe.fit, recipe.score, world.device)
    run = EncoderFit(recipe.fit, model, labels.windows, labels.targets, labels.parts, seed=recipe.seed, stage=stage)
    run.train(label)
    return Fitted(model, run.flops, run.tokens, run.history)


def _save(target: Path, model: InfluenceModel, labels: Labels, predicted: npt.NDArray[np.float32]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    model.save(target)
    part = np.empty(len(labels.ids), object)
    for name, rows in labels.parts.items():
        part[rows] = name
    table = pa.table({"sample_id": labels.ids, "part": part.tolist(), "oracle_nats": labels.values, "predicted_sd": predicted})
    with artifact.atomic_file(target / PREDICTIONS_FILE) as handle:
        pq.write_table(table, handle)

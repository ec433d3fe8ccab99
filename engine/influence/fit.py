"""The fit step: an influence model out of labels, with a proper test."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy import sparse

from mates.engine.config import FitConfig, Recipe
from mates.engine.data.corpus import open_corpus
from mates.engine.distributed import World
from mates.engine.influence.bags import BUCKETS
from mates.engine.influence.cascade import DROPPED, CascadeModel, best_weight, dropped_share, lost_influence, mixed, undropped
from mates.engine.influence.encoder import EncoderModel, encoder_fingerprint, encoder_inputs, load_encoder, new_encoder
from mates.engine.influence.features import ExtraFeatures, feature_inputs, make_features
from mates.engine.influence.inputs import SOURCES
from mates.engine.influence.model import InfluenceModel, Samples, Scores, joining, open_model, predict, predict_together
from mates.engine.influence.ngrams import (
    NgramModel,
    ablation,
    all_features,
    best_ridge,
    curve_line,
    figure,
    label_curve,
    ridge_flops,
)
from mates.engine.influence.training import EncoderFit
from mates.engine.layout import layout_of
from mates.engine.probe.stage import label_weights, read_influences
from mates.engine.progress import say
from mates.engine.random import key_of, uniform
from mates.engine.select.choose import gumbel_keys
from mates.engine.select.methods import earlier_models, label_stages
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, Cost, Manifest, Request
from mates.preprocess.tokenizer import open_tokenizer

PARTS = ("train", "validation", "test")
PREDICTIONS_FILE = "predictions.parquet"
DRAWS = 100
READING = ("model", "encoder", "chunk_tokens", "max_chunks")  # settings that say how a model reads samples

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
    from scipy import stats  # takes a second, which every command would wait for

    if len(predicted) < 3 or np.ptp(predicted) == 0 or np.ptp(oracle) == 0:
        return {"spearman": None, "pearson": None}
    return {
        "spearman": float(stats.spearmanr(predicted, oracle).statistic),
        "pearson": float(stats.pearsonr(predicted, oracle).statistic),
    }


def selected_influence(predicted: Floats, oracle: Floats, ratio: float, temperature: float) -> dict[str, float]:
    """What choosing by predictions is worth: the mean oracle influence of the share of samples with the lowest predictions, of a choice by
    Gumbel-top-k at a temperature (over 100 draws), of all samples (a random choice), and of the share with the lowest oracle influences
    (the best choice), in the unit of ``oracle``."""
    k, rows = max(1, round(ratio * len(oracle))), np.arange(len(oracle))
    draws = [gumbel_keys(predicted, rows, temperature=temperature, seed=draw, stage=0) for draw in range(DRAWS)]
    return {
        "selected": float(oracle[np.argsort(predicted, kind="stable")[:k]].mean()),
        "sampled": float(np.mean([oracle[np.argsort(-keys, kind="stable")[:k]].mean() for keys in draws])),
        "random": float(oracle.mean()),
        "oracle": float(np.sort(oracle)[:k].mean()),
    }


def calibration(predicted: Floats, oracle: Floats) -> dict[str, float | None]:
    """Slope and intercept of the oracle's influences on predictions: 1 and 0 where predictions are right in size too."""
    from scipy import stats

    if len(predicted) < 3 or np.ptp(predicted) == 0:
        return {"slope": None, "intercept": None}
    line = stats.linregress(predicted, oracle)
    return {"slope": float(line.slope), "intercept": float(line.intercept)}


def _parent(recipe: Recipe, method: str, stage: int) -> Path | None:
    """The influence model that fitting starts from."""
    earlier = earlier_models(recipe, stage)
    return layout_of(recipe).influence_model(method, earlier[0]) if recipe.fit.warm_starts and earlier else None


def fit_request(recipe: Recipe, method: str, stage: int) -> Request:
    """The influence model that scores the candidates of ``stage``."""
    layout, parent = layout_of(recipe), _parent(recipe, method, stage)
    inputs = {
        "labels": artifact.load(layout.labels(method, stage), "labels").fingerprint,
        "tokenizer": artifact.load(layout.tokenizer, "tokenizer").fingerprint,
    }
    for earlier in label_stages(recipe, stage)[1:]:
        inputs[f"labels of stage {earlier}"] = artifact.load(layout.labels(method, earlier), "labels").fingerprint
    if parent is not None:
        inputs["parent"] = artifact.load(parent, "influence model").fingerprint
    # weights are for selection: other ones need no other model
    settings = asdict(recipe.fit) | {"stage": stage, "seed": recipe.seed, "references": list(label_weights(recipe))}
    if not recipe.fit.earlier_labels:  # what is not asked for is not named: models from before it could be are still found
        settings.pop("earlier_labels")
    if recipe.fit.features:
        inputs |= feature_inputs(recipe)
    if recipe.fit.model != "ngram" and recipe.fit.encoder is not None:
        if Path(recipe.fit.encoder).is_dir():
            inputs["encoder"] = encoder_fingerprint(Path(recipe.fit.encoder))
        elif (done := artifact.finished(layout.influence_model(method, stage), "influence model")) and "encoder" in done.inputs:
            inputs["encoder"] = done.inputs["encoder"]  # its folder is gone; a finished run can be looked at anywhere
    if recipe.fit.model == "cascade":
        settings |= {"ratio": recipe.select.ratio, "label_weights": label_weights(recipe)}
    return Request(directory=layout.influence_model(method, stage), kind="influence model", settings=settings, inputs=inputs)


def fit_stage(recipe: Recipe, world: World, method: str, stage: int) -> Manifest:
    """Fit the influence model that scores the candidates of ``stage``. Ranks share an encoder's batches."""
    request: Request = world.same(lambda: fit_request(recipe, method, stage))
    done: Manifest | None = world.same(request.find)
    if done:
        return done
    start = time.perf_counter()
    layout = layout_of(recipe)
    ids, values, manifest = read_influences(layout.labels(method, stage), list(label_weights(recipe)))
    pool = open_corpus(layout.corpus("pool"), recipe.pretrain.sequence_length)
    more, targets = _earlier_labels(recipe, method, stage)
    own = split_labels(ids, recipe.fit, recipe.seed)
    labels = Labels(Samples(pool, np.append(ids, more)), values, own, label_weights(recipe), targets)
    job = _Job(recipe, world, method, stage, labels, make_features(recipe, stage))
    fitted = job.fit()
    predicted = job.predict(fitted.model)
    flops, tokens = world.gathered(lambda: (fitted.flops, fitted.tokens)), len(ids) * pool.length

    def commit() -> Manifest:
        info = job.report(fitted, predicted) | {"probed": manifest.info["references"], "reads": fitted.reads}
        _save(request.directory, fitted.model, labels, job.predicted(predicted))
        return request.commit(
            info=info,
            cost=Cost(
                flops=sum(own for own, _ in flops) + fitted.model.forward_flops(len(ids), pool.length),
                seconds=time.perf_counter() - start,
                tokens=sum(own for _, own in flops) + tokens,
            ),
        )

    result: Manifest = world.same(commit)
    if world.first:
        for line in _lines(f"fit {method} stage {stage}", result.info):
            say(line)
    return result


def _earlier_labels(recipe: Recipe, method: str, stage: int) -> tuple[npt.NDArray[np.int64], Floats]:
    """Training labels of earlier probes: sample ids [m], and influences [m, R] in SD of the training labels of their own probe."""
    weights, ids, targets = label_weights(recipe), [np.empty(0, np.int64)], [np.empty((0, len(label_weights(recipe))))]
    for earlier in label_stages(recipe, stage)[1:]:
        probed, values, _ = read_influences(layout_of(recipe).labels(method, earlier), list(weights))
        rows = split_labels(probed, recipe.fit, recipe.seed)["train"]
        means, sds = _standard(values[rows], list(weights))
        ids.append(probed[rows])
        targets.append((values[rows] - means) / sds)
    return np.concatenate(ids), np.concatenate(targets)


def _standard(train: Floats, names: Sequence[str]) -> tuple[Floats, Floats]:
    """Mean and SD [R] of training labels. ArtifactError where they are all equal."""
    means, sds = train.mean(0), train.std(0)
    if not sds.all():
        name = names[int(np.flatnonzero(sds == 0)[0])]
        raise ArtifactError(f"fit: all training labels on {name} are equal; the probe found no difference between samples")
    return means, sds


class Labels:
    """What an influence model is fitted to: samples, their influences [n, R] in nats, and in SD of the training labels.

    ``samples`` and ``targets`` have the labels of earlier probes behind the n new ones, and ``learned`` the rows that are trained on: new
    training labels and all earlier ones. Everything else is about the new ones.
    """

    def __init__(
        self,
        samples: Samples,
        values: Floats,
        parts: dict[str, npt.NDArray[np.int64]],
        weights: Mapping[str, float],
        earlier: Floats | None = None,
    ) -> None:
        """Standardise; ``earlier`` labels [m, R] are in their SD. ArtifactError for parts that are too small, or equal labels."""
        check_parts(parts)
        self.samples, self.values, self.parts, self.weights = samples, values, parts, dict(weights)
        train = values[parts["train"]]
        self.means, self.sds = _standard(train, list(weights))
        own = (values - self.means) / self.sds
        self.targets = (own if earlier is None else np.concatenate([own, earlier])).astype(np.float32)
        self.learned = np.append(parts["train"], np.arange(len(own), len(self.targets)))
        self.new = samples[: len(own)]
        """The samples of the new labels."""
        self.covariance = np.cov(train.T, bias=True).reshape(len(self.sds), -1)
        self.join = joining(list(weights.values()), self.covariance)
        self.joined = np.average(values, axis=1, weights=list(weights.values()))
        """The weighted mean over the tasks [n], in nats."""
        joined = self.joined[parts["train"]]
        self.mean, self.sd = float(joined.mean()), float(joined.std())


@dataclass(frozen=True)
class Fitted:
    """An influence model, what fitting took, the errors of its epochs, and further figures for the manifest."""

    model: InfluenceModel
    flops: float
    tokens: int
    history: list[dict[str, float]]
    info: dict[str, Any] = field(default_factory=dict)
    reads: str = "ids"


class _Job:
    """The fit of one stage."""

    def __init__(self, recipe: Recipe, world: World, method: str, stage: int, labels: Labels, extra: ExtraFeatures) -> None:
        self.recipe, self.world, self.method, self.stage, self.labels, self.extra = recipe, world, method, stage, labels, extra
        self._features: sparse.csr_array | None = None

    def fit(self) -> Fitted:
        """The recipe's model."""
        if self.recipe.fit.model == "ngram":
            return self._ngrams()
        return self._encoder() if self.recipe.fit.model == "encoder" else self._cascade()

    def predict(self, model: InfluenceModel) -> Scores:
        """Scores [n, R] of the samples of the new labels."""
        new = self.labels.new
        if isinstance(model, NgramModel) and self._features is not None:
            return model.predict_features(self._features[: len(new)])
        return predict_together(model, new, self.world)

    def features_of(self, rows: npt.NDArray[np.int64]) -> sparse.csr_array:
        """Features of labelled samples, from those of all where these are there."""
        return all_features(self.labels.samples[rows], self.extra) if self._features is None else self._features[rows]

    def _ngrams(self) -> Fitted:
        labels, train = self.labels, self.labels.learned
        self._features = all_features(labels.samples, self.extra)
        targets = labels.targets.astype(np.float64)
        ridges = [best_ridge(self._features, column, train, labels.parts["validation"]) for column in targets.T]
        length = labels.samples.corpus.length
        once = int(self.world.first)  # all ranks do the same
        flops, tokens = len(ridges) * ridge_flops(len(train), length), len(train) * length
        return Fitted(NgramModel(tuple(ridges), self.extra), once * flops, once * tokens, [])

    def _encoder(self) -> Fitted:
        recipe, labels, world = self.recipe, self.labels, self.world
        tokenizer, _ = open_tokenizer(layout_of(recipe).tokenizer)
        parent = _parent(recipe, self.method, self.stage)
        reader = encoder_inputs(recipe.fit, tokenizer, tokenizer.vocab_size)
        torch.manual_seed(key_of(recipe.seed, "fit", self.stage)[0])
        shape = (labels.values.shape[1], len(self.extra.names))
        module = load_encoder(parent) if parent else new_encoder(recipe.fit, reader.vocab_size, *shape)
        if parent and (module.head.out_features, module.extra) != shape:
            raise ArtifactError(
                f"{parent}: a model of {module.head.out_features} tasks and {module.extra} extra features, {shape[0]} and {shape[1]} are "
                "asked for; set fit.warm_start to false"
            )
        if world.rank:
            torch.manual_seed(key_of(recipe.seed, f"fit-rank-{world.rank}", self.stage)[0])  # other dropout than rank 0
        model = EncoderModel(module.to(world.device), reader, recipe.fit, recipe.score, world.device, self.extra)
        parts = labels.parts | {"train": labels.learned}
        run = EncoderFit(recipe.fit, model, labels.samples, labels.targets, parts, world, seed=recipe.seed, stage=self.stage)
        run.train(f"fit {self.method} stage {self.stage}")
        reads = reader.source(labels.samples.corpus)
        if world.first:
            say(f"fit {self.method} stage {self.stage}: the encoder reads {SOURCES[reads]}")
        return Fitted(model, run.flops, run.tokens, run.history, {"warm_started": parent is not None}, reads)

    def _cascade(self) -> Fitted:
        first, second, labels, recipe = self._ngrams(), self._encoder(), self.labels, self.recipe
        assert isinstance(first.model, NgramModel)
        assert isinstance(second.model, EncoderModel)
        known = np.concatenate([labels.parts["validation"], labels.parts["test"]])  # on training labels predictions are too good
        words = self.predict(first.model)
        rows, rough = labels.parts["validation"], words @ labels.join
        own = predict_together(second.model, labels.samples[rows], self.world)
        weight = best_weight(words[rows], own, labels.targets[rows])
        read = mixed(words[rows], own, weight) @ labels.join
        share = dropped_share(rough[rows], read, labels.joined[rows], ratio=recipe.select.ratio, bound=recipe.fit.cascade_loss)
        threshold = float(np.quantile(rough[known], 1 - share)) if share else float(rough.max()) + DROPPED
        model = CascadeModel(first.model, second.model, threshold, labels.join, share, weight)
        return Fitted(
            model,
            second.flops + first.flops,
            second.tokens + first.tokens,
            second.history,
            second.info | {"cascade": self._cost_of_dropping(model, words)},
            second.reads,
        )

    def _cost_of_dropping(self, model: CascadeModel, words: Scores) -> dict[str, Any]:
        """On test labels, from the n-gram model's predictions of all."""
        labels, rows = self.labels, self.labels.parts["test"]
        own = predict_together(model.encoder, labels.samples[rows], self.world)
        both, dropped = mixed(words[rows], own, model.ngram_weight), words[rows] @ labels.join > model.threshold
        return {
            "dropped_share": model.share,
            "ngram_weight": model.ngram_weight,
            "test_dropped_share": float(dropped.mean()),
            "test_lost_influence": lost_influence(both @ labels.join, dropped, labels.joined[rows], self.recipe.select.ratio),
            "test_agreement": {
                name: agreement(predicted @ labels.join, labels.joined[rows])
                for name, predicted in (("ngram", words[rows]), ("encoder", own), ("both", both))
            },
        }

    def report(self, fitted: Fitted, predicted: Scores) -> dict[str, Any]:
        """Figures for the manifest."""
        labels, recipe, test = self.labels, self.recipe, self.labels.parts["test"]
        shown, nats = self.predicted(predicted), labels.joined
        joined = shown @ labels.join
        chosen_by, targets = predicted[test] @ labels.join, (nats[test] - labels.mean) / labels.sd
        ratio, stage = recipe.select.ratio, self.stage
        info = {
            "model": recipe.fit.model,
            "references": list(labels.weights),
            "label_weights": labels.weights,
            "label_covariance_nats2": labels.covariance.tolist(),
            "label_mean_nats": labels.mean,
            "label_sd_nats": labels.sd,
            "labels": {name: len(rows) for name, rows in labels.parts.items()},
            "earlier_labels": len(labels.targets) - len(labels.values),
            "agreement": {name: agreement(joined[rows], nats[rows]) for name, rows in labels.parts.items()},
            "agreement_by_reference": {
                name: agreement(shown[test, number], labels.values[test, number]) for number, name in enumerate(labels.weights)
            },
            "sensitivity": _sensitivity(labels, joined),
            "selection": {
                "ratio": ratio,
                "temperature": recipe.select.temperature,
                **selected_influence(chosen_by, targets, ratio, recipe.select.temperature),
            },
            "calibration": calibration(joined[test], targets),
            "drift": self._drift(joined),
            "epochs": fitted.history,
            "label_curve": label_curve(self._words_of, nats, labels.parts, recipe.seed, stage),
            "features": list(self.extra.names),
            "flops_per_sample": fitted.model.forward_flops(1, recipe.pretrain.sequence_length),
        }
        if self.extra.names:
            info["ablation"] = ablation(self.features_of, self.extra.names, nats, labels.parts, recipe.seed, stage)
        return info | {"warm_started": False} | fitted.info

    def predicted(self, scores: Scores) -> npt.NDArray[np.floating[Any]]:
        """What was predicted, of what a cascade drops too."""
        return undropped(scores, self.recipe.fit.model)[0]

    def _words_of(self, rows: npt.NDArray[np.int64]) -> sparse.csr_array:
        return self.features_of(rows)[:, :BUCKETS]

    def _drift(self, joined: Floats) -> dict[str, float | None] | None:
        """How the predictions for the test labels agree with those of the model before: has the model's preference moved?

        None where there is no such model of the kind: nothing but this figure needs one.
        """
        recipe, labels, before_this = self.recipe, self.labels, earlier_models(self.recipe, self.stage)
        if not before_this:
            return None
        earlier = layout_of(recipe).influence_model(self.method, before_this[0])
        if not (earlier / artifact.MANIFEST_NAME).is_file():
            return None
        manifest = artifact.load(earlier, "influence model")
        info, own = manifest.info, asdict(recipe.fit)
        if info["references"] != list(labels.weights) or any(manifest.settings[name] != own[name] for name in READING):
            return None
        tokenizer, _ = open_tokenizer(layout_of(recipe).tokenizer)
        rows = labels.parts["test"]
        before = predict(open_model(earlier, recipe, tokenizer, self.world.device), labels.samples[rows])
        return agreement(joined[rows], self.predicted(before) @ joining(list(labels.weights.values()), info["label_covariance_nats2"]))


def _sensitivity(labels: Labels, joined: Floats) -> dict[str, dict[str, float | None]]:
    """How the choice depends on each reference task: agreement of the oracle influences joined without it with those of all tasks, and
    with the predictions, on test labels. Empty where there is one task."""
    test, names = labels.parts["test"], list(labels.weights)
    found = {}
    for left_out in range(len(names)) if len(names) > 1 else ():
        weights = np.array(list(labels.weights.values()))
        weights[left_out] = 0
        without = np.average(labels.values[test], axis=1, weights=weights)
        found[names[left_out]] = {
            "oracle_spearman": agreement(without, labels.joined[test])["spearman"],
            "predicted_spearman": agreement(joined[test], without)["spearman"],
        }
    return found


def _lines(label: str, info: Mapping[str, Any]) -> Iterator[str]:
    shown = ", ".join(f"{name} {figure(value)}" for name, value in info["agreement"]["test"].items())
    yield f"{label}: on {info['labels']['test']} test labels {shown}; {curve_line(info['label_curve'])}"
    for finding in findings(info):
        yield f"{label}: {finding}"


def findings(info: Mapping[str, Any]) -> Iterator[str]:
    """What an influence model's manifest says of its worth, in sentences."""
    worth = info["selection"]
    yield (
        f"the best {worth['ratio']:.0%} of the test labels by prediction have a mean influence of {worth['selected']:+.2f} SD, those "
        f"sampled at temperature {worth['temperature']:g} {worth['sampled']:+.2f}, where chance has {worth['random']:+.2f} and the oracle "
        f"{worth['oracle']:+.2f}"
    )
    if {"train", "validation"} <= set(info["agreement"]):
        train, validation = (figure(info["agreement"][name]["spearman"]) for name in ("train", "validation"))
        yield f"its Spearman on training labels is {train}, on validation labels {validation}"
    if info["drift"]:
        yield f"its predictions agree with those of the model before by a Spearman of {figure(info['drift']['spearman'])}"
    for name, one in info["sensitivity"].items():
        yield f"without {name} labels agree with those of all tasks by a Spearman of {figure(one['oracle_spearman'])}"
    if "ablation" in info:
        sets = (f"{' + '.join(['words', *one['features']])} {figure(one['spearman'])}" for one in info["ablation"])
        yield f"an n-gram model's Spearman on test labels: {', '.join(sets)}"
    if "cascade" in info:
        one = info["cascade"]
        lost = one["test_lost_influence"]
        cost = "nothing is gained on test labels" if lost is None else f"the gain on test labels changes by {-lost:+.1%}"
        yield f"the n-gram model drops {one['dropped_share']:.0%} of the candidates; {cost}"
        alone = ", ".join(f"{name} {figure(found['spearman'])}" for name, found in one["test_agreement"].items())
        yield f"Spearman on test labels without dropping: {alone} (the n-gram model with a weight of {one['ngram_weight']:g})"
        if one["dropped_share"] >= 1 - worth["ratio"] - 1e-9:
            yield "what it leaves is all chosen, so it alone decides: fit.model ngram gives the same for less"


def _save(target: Path, model: InfluenceModel, labels: Labels, shown: npt.NDArray[np.floating[Any]]) -> None:
    shutil.rmtree(target, ignore_errors=True)  # what an interrupted fit with other settings left would be taken for this one's
    target.mkdir(parents=True)
    model.save(target)
    part = np.empty(len(labels.new), object)
    for name, rows in labels.parts.items():
        part[rows] = name
    columns = {
        "sample_id": labels.new.ids,
        "part": part.tolist(),
        "oracle_nats": labels.joined,
        "predicted_sd": (shown @ labels.join).astype(np.float32),
    }
    for number, name in enumerate(labels.weights):
        columns |= {f"oracle_nats.{name}": labels.values[:, number], f"predicted_sd.{name}": shown[:, number]}
    with artifact.atomic_file(target / PREDICTIONS_FILE) as handle:
        pq.write_table(pa.table(columns), handle)

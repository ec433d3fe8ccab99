"""The fit step: an influence model out of labels, with a proper test."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import asdict
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
from mates.engine.influence.encoder import InfluenceEncoder, encoder_inputs, load_encoder, new_encoder
from mates.engine.influence.inputs import EncoderBatch, EncoderInputs, Retokenized
from mates.engine.influence.ngrams import curve_line, label_curve
from mates.engine.layout import layout_of
from mates.engine.probe.stage import label_weights, read_labels
from mates.engine.progress import Progress, say
from mates.engine.random import KeyedPermutation, key_of, uniform
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, Cost, Manifest, Request
from mates.preprocess.tokenizer import open_tokenizer

PARTS = ("train", "validation", "test")
PREDICTIONS_FILE = "predictions.parquet"


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


def _parent(recipe: Recipe, method: str, stage: int) -> Path | None:
    """The influence model that fitting starts from."""
    return layout_of(recipe).influence_model(method, stage - 1) if recipe.fit.warm_start and stage > 1 else None


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
    layout, config, parent = layout_of(recipe), recipe.fit, _parent(recipe, method, stage)
    ids, values, labels = read_labels(layout.labels(method, stage), label_weights(recipe))
    tokenizer, _ = open_tokenizer(layout.tokenizer)
    pool = open_corpus(layout.corpus("pool"), recipe.pretrain.sequence_length)
    reader = encoder_inputs(config, tokenizer, tokenizer.vocab_size)
    torch.manual_seed(key_of(recipe.seed, "fit", stage)[0])
    model = (load_encoder(parent) if parent else new_encoder(config, reader.vocab_size)).to(world.device)
    run = _Fit(
        config,
        model,
        reader,
        pool.windows(ids)[:, :-1],
        values,
        split_labels(ids, config, recipe.seed),
        recipe.seed,
        stage,
        world.device,
    )
    run.train(f"fit {method} stage {stage}")
    predicted = run.predict(np.arange(len(ids)))
    _save(request.directory, run, reader, ids, predicted)
    curve = label_curve(run.windows, values, run.parts, recipe.seed, stage)
    info = run.info(predicted) | {
        "label_curve": curve,
        "encoder_shape": asdict(model.shape()),
        "references": labels.info["references"],
        "warm_started": parent is not None,
    }
    cost = Cost(flops=run.flops, seconds=time.perf_counter() - start, tokens=run.tokens)
    result = request.commit(info=info, cost=cost)
    shown = ", ".join(f"{name} {'undefined' if value is None else f'{value:.3f}'}" for name, value in info["agreement"]["test"].items())
    say(f"fit {method} stage {stage}: on {info['labels']['test']} test labels {shown}; {curve_line(curve)}")
    return result


class _Fit:
    """One fitting run."""

    def __init__(
        self,
        config: FitConfig,
        model: InfluenceEncoder,
        reader: EncoderInputs,
        windows: npt.NDArray[np.int64],
        values: npt.NDArray[np.float64],
        parts: dict[str, npt.NDArray[np.int64]],
        seed: int,
        stage: int,
        device: torch.device,
    ) -> None:
        self.config, self.model, self.reader, self.windows = config, model, reader, windows
        self.values, self.parts, self.seed, self.stage, self.device = values, parts, seed, stage, device
        check_parts(parts)
        train = values[parts["train"]]
        self.mean, self.sd = float(train.mean()), float(train.std())
        if self.sd == 0:
            raise ArtifactError("fit: all training labels are equal; the probe found no difference between samples")
        self.targets = ((values - self.mean) / self.sd).astype(np.float32)
        self.flops, self.tokens = 0.0, 0
        self.history: list[dict[str, float]] = []

    def _batch(self, rows: npt.NDArray[np.int64], passes: int) -> EncoderBatch:
        batch = self.reader.batch(self.windows[rows])
        self.flops += passes * self.model.shape().forward(tokens=batch.ids.numel(), length=batch.ids.shape[1])
        self.tokens += batch.ids.numel()
        return batch.to(self.device)

    def train(self, label: str) -> None:
        """Fit on the train part; keep the epoch with the lowest validation error."""
        optimizer = torch.optim.AdamW(self._groups(), lr=self.config.lr)
        rows = self.parts["train"]
        steps = -(-len(rows) // self.config.batch_size) * self.config.epochs
        warmup = max(1, steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))
        )
        best, best_loss = copy.deepcopy(self.model.state_dict()), float("inf")
        with Progress(label, self.config.epochs, "epoch") as progress:
            for epoch in range(self.config.epochs):
                self.model.train()
                losses = []
                for chosen in self._shuffled(rows, epoch):
                    optimizer.zero_grad(set_to_none=True)
                    targets = torch.from_numpy(self.targets[chosen]).to(self.device)
                    loss = torch.nn.functional.mse_loss(self.model(self._batch(chosen, passes=3)), targets)
                    loss.backward()  # type: ignore[no-untyped-call]
                    torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                    losses.append(loss.item())
                validation = self._error("validation")
                self.history.append({"train_mse": float(np.mean(losses)), "validation_mse": validation})
                if validation < best_loss:
                    best, best_loss = copy.deepcopy(self.model.state_dict()), validation
                progress.add(1, f"validation error {validation:.3f} SD²")
        self.model.load_state_dict(best)

    def _groups(self) -> list[dict[str, Any]]:
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim >= 2]
        vectors = [parameter for parameter in self.model.parameters() if parameter.ndim < 2]
        return [
            {"params": matrices, "weight_decay": self.config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]

    def _shuffled(self, rows: npt.NDArray[np.int64], epoch: int) -> Iterator[npt.NDArray[np.int64]]:
        order = rows[KeyedPermutation(len(rows), self.seed, f"fit-epoch-{epoch}", self.stage)(np.arange(len(rows)))]
        for start in range(0, len(order), self.config.batch_size):
            yield order[start : start + self.config.batch_size]

    def predict(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Predictions in label SD: [n] float32."""
        self.model.eval()
        with torch.no_grad():
            parts = [self.model(self._batch(rows[start : start + 64], passes=1)).cpu().numpy() for start in range(0, len(rows), 64)]
        return np.concatenate(parts).astype(np.float32)

    def _error(self, part: str) -> float:
        rows = self.parts[part]
        return float(np.mean((self.predict(rows) - self.targets[rows]) ** 2))

    def info(self, predicted: npt.NDArray[np.float32]) -> dict[str, Any]:
        """Figures for the manifest."""
        return {
            "label_mean_nats": self.mean,
            "label_sd_nats": self.sd,
            "labels": {name: len(rows) for name, rows in self.parts.items()},
            "agreement": {name: agreement(predicted[rows], self.values[rows]) for name, rows in self.parts.items()},
            "epochs": self.history,
        }


def _save(target: Path, run: _Fit, reader: EncoderInputs, ids: npt.NDArray[np.int64], predicted: npt.NDArray[np.float32]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    run.model.save(target)
    if isinstance(reader, Retokenized):
        reader.save(target)
    part = np.empty(len(ids), object)
    for name, rows in run.parts.items():
        part[rows] = name
    table = pa.table({"sample_id": ids, "part": part.tolist(), "oracle_nats": run.values, "predicted_sd": predicted})
    with artifact.atomic_file(target / PREDICTIONS_FILE) as handle:
        pq.write_table(table, handle)

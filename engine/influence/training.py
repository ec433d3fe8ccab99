"""Fitting an encoder to labels."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mates.engine.config import FitConfig
from mates.engine.distributed import World
from mates.engine.influence.encoder import EncoderModel
from mates.engine.influence.inputs import EncoderBatch
from mates.engine.influence.model import Samples, predict_together
from mates.engine.progress import Progress
from mates.engine.random import KeyedPermutation
from mates.preprocess.artifact import ArtifactError

Rows = npt.NDArray[np.int64]


class EncoderFit:
    """AdamW on the squared error of standardised influences; the epoch with the lowest validation error is kept."""

    def __init__(
        self,
        config: FitConfig,
        model: EncoderModel,
        samples: Samples,
        targets: npt.NDArray[np.float32],
        parts: Mapping[str, Rows],
        world: World,
        *,
        seed: int,
        stage: int,
    ) -> None:
        """Take samples and their influences in label SD [n, R]; ``parts`` has the rows of each part. Ranks share every batch."""
        self._config, self._model, self._samples, self._targets, self._parts = config, model, samples, targets, parts
        self._world, self._seed, self._stage = world, seed, stage
        self._extra = model.extra.compute(samples)
        self.flops, self.tokens = 0.0, 0
        self.history: list[dict[str, float]] = []

    def train(self, label: str) -> None:
        """All epochs."""
        module = self._model.module
        optimizer = torch.optim.AdamW(self._groups(), lr=self._config.lr)
        rows = self._parts["train"]
        steps = -(-len(rows) // self._config.batch_size) * self._config.epochs
        warmup = max(1, steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))
        )
        best, best_loss = copy.deepcopy(module.state_dict()), float("inf")
        with Progress(label, self._config.epochs, "epoch", enabled=self._world.first) as progress:
            for epoch in range(self._config.epochs):
                module.train()
                losses = []
                for chosen in self._shuffled(rows, epoch):
                    optimizer.zero_grad(set_to_none=True)
                    losses.append(self._backward(chosen))
                    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                module.eval()
                validation = self._error("validation")
                if not np.isfinite(validation):
                    raise ArtifactError(
                        f"{label}: the validation error in epoch {epoch + 1} is {validation}; lower fit.lr ({self._config.lr:g})"
                    )
                self.history.append({"train_mse": float(np.mean(losses)), "validation_mse": validation})
                if validation < best_loss:
                    best, best_loss = copy.deepcopy(module.state_dict()), validation
                progress.add(1, f"validation error {validation:.3f} SD²")
        module.load_state_dict(best)

    def _groups(self) -> list[dict[str, Any]]:
        parameters = list(self._model.module.parameters())
        return [
            {"params": [one for one in parameters if one.ndim >= 2], "weight_decay": self._config.weight_decay},
            {"params": [one for one in parameters if one.ndim < 2], "weight_decay": 0.0},
        ]

    def _shuffled(self, rows: Rows, epoch: int) -> Iterator[Rows]:
        order = rows[KeyedPermutation(len(rows), self._seed, f"fit-epoch-{epoch}", self._stage)(np.arange(len(rows)))]
        for start in range(0, len(order), self._config.batch_size):
            yield order[start : start + self._config.batch_size]

    def _backward(self, chosen: Rows) -> float:
        """Gradients of the mean squared error of a batch, of which each rank reads a part. Returns the error."""
        module, device = self._model.module, self._model.device
        own = chosen[self._world.rank :: self._world.size]
        loss = torch.zeros((), device=device)
        if len(own):
            targets = torch.from_numpy(self._targets[own]).to(device)
            loss = torch.nn.functional.mse_loss(module(self._batch(own)), targets, reduction="sum") / (len(chosen) * targets.shape[1])
            loss.backward()  # type: ignore[no-untyped-call]
        if self._world.size > 1:
            self._sum_gradients()
        return float(self._world.total(loss.detach()))

    def _sum_gradients(self) -> None:
        """Over ranks, in one piece."""
        parameters = [one for one in self._model.module.parameters() if one.requires_grad]
        own = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
        flat = self._world.total(torch.cat([one.flatten() for one in own]))
        start = 0
        for one in parameters:
            one.grad = flat[start : start + one.numel()].view_as(one)
            start += one.numel()

    def _batch(self, rows: Rows) -> EncoderBatch:
        """A batch to train on, billed."""
        batch = self._model.batch(self._model.reader.sequences(self._samples[rows]), self._extra[rows])
        self.flops += 3 * self._model.module.shape().forward(tokens=batch.ids.numel(), length=batch.ids.shape[1])
        self.tokens += batch.ids.numel()
        return batch.to(self._model.device)

    def _error(self, part: str) -> float:
        rows, samples = self._parts[part], self._samples[self._parts[part]]
        if self._world.first:
            self.flops += self._model.forward_flops(len(samples), samples.corpus.length)
            self.tokens += len(samples) * samples.corpus.length
        return float(np.mean((predict_together(self._model, samples, self._world) - self._targets[rows]) ** 2))

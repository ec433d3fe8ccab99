"""Fitting an encoder to labels."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mates.engine.config import FitConfig
from mates.engine.influence.encoder import EncoderModel
from mates.engine.influence.inputs import EncoderBatch, chunk
from mates.engine.progress import Progress
from mates.engine.random import KeyedPermutation

Rows = npt.NDArray[np.int64]


class EncoderFit:
    """AdamW on the squared error of standardised influences; the epoch with the lowest validation error is kept."""

    def __init__(
        self,
        config: FitConfig,
        model: EncoderModel,
        windows: npt.NDArray[np.int64],
        targets: npt.NDArray[np.float32],
        parts: Mapping[str, Rows],
        *,
        seed: int,
        stage: int,
    ) -> None:
        """Take samples [n, L] and their influences in label SD [n]; ``parts`` has the rows of each part."""
        self._config, self._model, self._windows, self._targets, self._parts = config, model, windows, targets, parts
        self._seed, self._stage = seed, stage
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
        with Progress(label, self._config.epochs, "epoch") as progress:
            for epoch in range(self._config.epochs):
                module.train()
                losses = []
                for chosen in self._shuffled(rows, epoch):
                    optimizer.zero_grad(set_to_none=True)
                    targets = torch.from_numpy(self._targets[chosen]).to(self._model.device)
                    loss = torch.nn.functional.mse_loss(module(self._batch(chosen)), targets)
                    loss.backward()  # type: ignore[no-untyped-call]
                    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                    losses.append(loss.item())
                module.eval()
                validation = self._error("validation")
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

    def _batch(self, rows: Rows) -> EncoderBatch:
        """A batch to train on, billed."""
        reader = self._model.reader
        batch = chunk(reader.sequences(self._windows[rows]), self._config.chunk_tokens, reader.pad)
        self.flops += 3 * self._model.module.shape().forward(tokens=batch.ids.numel(), length=batch.ids.shape[1])
        self.tokens += batch.ids.numel()
        return batch.to(self._model.device)

    def _error(self, part: str) -> float:
        rows = self._parts[part]
        windows = self._windows[rows]
        self.flops += self._model.forward_flops(*windows.shape)
        self.tokens += windows.size
        return float(np.mean((self._model.predict(windows) - self._targets[rows]) ** 2))

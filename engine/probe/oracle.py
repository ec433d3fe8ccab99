"""The reference loss at weights, its gradient, and exact influences: the definition that every estimate is measured against.

For a sample x at weights θ with AdamW state (m, v, t) (MATES, arXiv 2406.06046, section 3.1)::

    Δθ(x) = AdamW(θ, m, v, t, clip(∇L(x; θ))) − θ
    I(x)  = L_r(θ + Δθ(x)) − L_r(θ)                 nats; negative: the sample helps

L_r is the mean loss over all label tokens of reference r. θ, m and v are read and never written.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.func import functional_call

from mates.engine.pretrain.checkpoint import OptimizerState
from mates.engine.pretrain.model import LabelledLoss
from mates.engine.probe.gradients import gradient, step_of
from mates.engine.probe.shards import Shards
from mates.engine.probe.taps import Contributions, TappedBatch, Taps, autocast, layers_of, one_sample
from mates.engine.reference.batches import LabelBatch
from mates.kernels.adamw import stepped_weight
from mates.kernels.update_weights import updated_weights

Batches = Sequence[LabelBatch]
HALVES = 2


@dataclass(frozen=True)
class Losses:
    """Sums of label losses in nats and numbers of labels, by reference and half of its items (even and odd ones): [R, 2] float64 each."""

    sums: torch.Tensor
    counts: torch.Tensor

    @property
    def means(self) -> torch.Tensor:
        """L_r: [R]."""
        return self.sums.sum(1) / self.counts.sum(1)

    @property
    def half_means(self) -> torch.Tensor:
        """L of each half: [R, 2]."""
        return self.sums / self.counts


class Oracle:
    """A model's loss on one or more references, at any weights."""

    def __init__(
        self, model: nn.Module, references: Sequence[Batches], shards: Shards | None = None, products: torch.dtype | None = None
    ) -> None:
        """Take a model for its code, and the batches of each reference.

        Args:
            model: of the checkpoint's shape. references: batches of each.
            shards: of ``model``; weights are then this rank's rows of them.
            products: of gradients, see :func:`mates.engine.probe.taps.autocast`. Losses keep the weights' dtype: influences are small
                differences of them, which bf16 would drown in noise.
        """
        model.eval()  # no dropout: a probe has no random part
        self._model, self._labelled, self._shards, self._products = model, LabelledLoss(model), shards, products
        self.references = references
        self._stored = {f"{layer}.{own}".lstrip("."): name for layer, _, names in layers_of(model) for own, name in names.items()}

    def on(self, references: Sequence[Batches]) -> Oracle:
        """The same model on other references."""
        other = copy.copy(self)
        other.references = references
        return other

    def _named(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights by the names inside ``_labelled``, tied ones under each of their names."""
        return {f"model.{name}": weights[stored] for name, stored in self._stored.items()}

    def _label_losses(self, named: Mapping[str, torch.Tensor], batch: LabelBatch) -> torch.Tensor:
        arguments = (batch.tokens, batch.positions, batch.targets)
        losses, _ = self._labelled(*arguments) if self._shards else functional_call(self._labelled, dict(named), arguments)
        return losses  # type: ignore[no-any-return]

    def _take(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self._shards:
            self._shards.hold(weights)
            return {}
        return self._named(weights)

    def _share(self, batches: Batches) -> Iterator[tuple[LabelBatch, bool]]:
        """This rank's batches, as many on every rank since layers gather their weights from all; and whether each counts."""
        rank, size = (self._shards.rows.rank, self._shards.rows.size) if self._shards else (0, 1)
        for start in range(0, len(batches), size):
            counts = start + rank < len(batches)
            yield batches[start + rank if counts else start], counts

    def losses(self, weights: Mapping[str, torch.Tensor]) -> Losses:
        """The references' losses at these weights, summed in float64."""
        named = self._take(weights)
        device = next(iter(weights.values())).device
        sums = torch.zeros(len(self.references), HALVES, dtype=torch.float64, device=device)
        counts = torch.zeros_like(sums)
        with torch.no_grad():
            for number, batches in enumerate(self.references):
                for batch, is_counted in self._share(batches):
                    values, is_odd = self._label_losses(named, batch).double(), (batch.items % HALVES).double()
                    if is_counted:
                        for of, summed in ((sums, values), (counts, torch.ones_like(values))):
                            of[number] += torch.stack([(summed * (1 - is_odd)).sum(), (summed * is_odd).sum()])
        return Losses(self._shards.reduce(sums), self._shards.reduce(counts)) if self._shards else Losses(sums, counts)

    def gradients(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """∇L_r at these weights for each reference: by name [R, …], in the weights' dtype."""
        if self._shards:
            return self._sharded_gradients(weights, self._shards)
        leaves = {name: value.detach().requires_grad_() for name, value in weights.items()}
        named = self._named(leaves)
        stacks = self._stacks(weights)
        for number, batches in enumerate(self.references):
            labels = sum(len(batch.targets) for batch in batches)
            for batch in batches:
                with autocast(self._model, self._products):
                    loss = self._label_losses(named, batch).sum() / labels
                for (name, _), grad in zip(leaves.items(), torch.autograd.grad(loss, list(leaves.values())), strict=True):
                    stacks[name][number] += grad
        return stacks

    def _stacks(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.new_zeros(len(self.references), *value.shape) for name, value in weights.items()}

    def _share_of_mean(self, batch: LabelBatch, labels: int) -> torch.Tensor:
        return self._label_losses({}, batch).sum()[None] / labels

    def _sharded_gradients(self, weights: Mapping[str, torch.Tensor], shards: Shards) -> dict[str, torch.Tensor]:
        """This rank's rows of the gradients, through taps: autograd would make whole ones. Every rank runs all batches."""
        self._take(weights)
        taps = Taps(self._model, self._products)
        stacks = self._stacks(weights)
        for number, batches in enumerate(self.references):
            labels = sum(len(batch.targets) for batch in batches)
            for batch in batches:
                tapped = taps.listen(partial(self._share_of_mean, batch, labels))
                own = shards.restrict(one_sample(tapped))
                for name in own.gradients:
                    stacks[name][number] += gradient(own, weights[name], name, 0)
        return stacks


def stepped(batch: TappedBatch, state: OptimizerState, k: int, factor: torch.Tensor) -> dict[str, torch.Tensor]:
    """θ + Δθ of sample ``k``, whose gradient is scaled by ``factor``; out of place."""
    step, weights = step_of(state), {}
    for name, weight in state.weights.items():
        moments, decay, scale = (state.exp_avg[name], state.exp_avg_sq[name]), state.weight_decay[name], factor.to(weight.dtype)
        parts = batch.gradients.get(name, Contributions())
        if len(parts.dense) == 1 and not (parts.rows or parts.whole):
            inputs, grads = (values[k : k + 1] for values in parts.dense[0])
            weights[name] = updated_weights(inputs, grads, scale[None], weight, *moments, step, decay, weight.dtype)[0]
        else:
            grad = gradient(batch, weight, name, k) if name in batch.gradients else torch.zeros_like(weight)
            weights[name] = stepped_weight(weight, *moments, grad, scale, step, decay)
    return weights

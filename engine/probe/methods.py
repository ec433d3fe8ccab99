"""Influences by several methods, from the exact one to those that need no forward pass over the reference for each sample.

With h_k the gradient of sample k, g_k = h_k · min(1, c/(‖h_k‖ + 1e-6)) its clipped gradient, Δ_k the AdamW update that g_k causes, weight
decay included, and g = ∇L_r(θ):

``exact``      I_k = L_r(θ + Δ_k) − L_r(θ)
``linear``     ⟨g, Δ_k⟩: exact in AdamW, clip and weight decay; first order in L_r.
``centred``    ⟨ḡ, Δ_k⟩, ḡ = ∇L_r(θ + mean Δ): right up to a constant.
``frozen``     ⟨g, Δ_k⟩ with the second moment held at v̂ = (β2·v + (1−β2)·mean g²)/(1−β2ᵗ'): one GEMM a layer.
``corrected``  exact_S(k) − (⟨g_S, Δ_k⟩ − ⟨g, Δ_k⟩), S a few items of the reference: a control variate, unbiased over the draw of S.

Means over samples are taken over a fixed set of calibration samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from mates.engine.pretrain.checkpoint import OptimizerState
from mates.engine.probe.gradients import UpdateDots, clip_factors, gradient, gradient_dots, squared_gradient_norms, step_of
from mates.engine.probe.oracle import Batches, Losses, Oracle, stepped
from mates.engine.probe.shards import Shards
from mates.engine.probe.taps import Autograd, TappedBatch, Taps
from mates.kernels.adamw.reference import adam_update
from mates.preprocess.artifact import ArtifactError

Tensors = dict[str, torch.Tensor]


class Source(Protocol):
    """Gives the gradients of each sample of a batch."""

    def run(self, windows: torch.Tensor) -> TappedBatch:
        """Samples [K, T + 1] int64."""


@dataclass(frozen=True)
class Setting:
    """A checkpoint to be probed: its state (of this rank's rows, where it is sharded), its layers' gradients, and the references."""

    state: OptimizerState
    source: Source
    oracle: Oracle
    calibration: Sequence[torch.Tensor]
    """Batches of samples [K, T + 1] that means are taken over."""
    shards: Shards | None = None

    def run(self, windows: torch.Tensor) -> tuple[TappedBatch, torch.Tensor, torch.Tensor]:
        """The gradients of samples [K, T + 1], their norms [K] float64 and clip factors [K] float64."""
        if self.shards:
            self.shards.hold(self.state.weights)
        batch = self.source.run(windows)
        if self.shards:
            batch = self.shards.restrict(batch)
        norms = self.total(squared_gradient_norms(batch)).sqrt()
        return batch, norms, clip_factors(norms, self.state.clip_norm)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over this rank's rows, made sums over all rows."""
        return self.shards.reduce(values) if self.shards else values


def make_setting(
    model: nn.Module,
    state: OptimizerState,
    references: Sequence[Batches],
    calibration: Sequence[torch.Tensor],
    *,
    generic: bool = False,
    shards: Shards | None = None,
    products: torch.dtype | None = None,
) -> Setting:
    """Put the state's weights into ``model`` (shared, never written) and listen to its layers.

    Args:
        model: of the checkpoint's shape. state: the checkpoint's. references: batches of each.
        calibration: batches of samples that means are taken over.
        generic: take gradients sample by sample by autograd, whatever the model's layers are.
        shards: of ``model``, where ``state`` holds this rank's rows only.
        products: dtype of the matrix products of gradients, where it is not the state's.

    Raises:
        UnsupportedLayerError: a layer that taps do not know.
    """
    assert not (generic and shards), "sharded models are probed through taps"
    if not shards:
        asked = {name: tuple(value.shape) for name, value in model.named_parameters()}
        found = {name: tuple(value.shape) for name, value in state.weights.items()}
        if asked != found:
            name = min(name for name in asked.keys() | found.keys() if asked.get(name) != found.get(name))
            raise ArtifactError(
                f"the checkpoint is of another model: {name} has shape {found.get(name, 'none')}, expected {asked.get(name, 'none')}"
            )
        for name, parameter in model.named_parameters():
            parameter.data = state.weights[name]
    taps = Autograd(model, products) if generic else Taps(model, products)
    return Setting(state, taps, Oracle(model, references, shards, products), calibration, shards)


class Estimate(Protocol):
    """One method at one checkpoint."""

    def __call__(self, batch: TappedBatch, factors_K: torch.Tensor) -> torch.Tensor:
        """Influences of the samples of a batch on each reference, in nats: [K, R] float64."""


class Exact:
    """The definition: a forward pass over the references at θ + Δ_k."""

    def __init__(self, setting: Setting) -> None:
        """Measure the losses at θ."""
        self._setting = setting
        self.baseline: Losses = setting.oracle.losses(setting.state.weights)

    def __call__(self, batch: TappedBatch, factors_K: torch.Tensor) -> torch.Tensor:
        """See :class:`Estimate`."""
        return self.halves(batch, factors_K)[0]

    def halves(self, batch: TappedBatch, factors_K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Influences [K, R], and those on either half of each reference's items [K, R, 2]."""
        state = self._setting.state
        after = [self._setting.oracle.losses(stepped(batch, state, k, factor)) for k, factor in enumerate(factors_K)]
        means = torch.stack([losses.means - self.baseline.means for losses in after])
        return means, torch.stack([losses.half_means - self.baseline.half_means for losses in after])


class Linear:
    """First order in the reference loss, by its gradient at given weights."""

    def __init__(self, setting: Setting, directions: Mapping[str, torch.Tensor]) -> None:
        """Take reference gradients by name [R, …]."""
        self._setting = setting
        self._dots = UpdateDots(setting.state, directions)
        self._decay = decay_dots(setting.state, directions)

    def __call__(self, batch: TappedBatch, factors_K: torch.Tensor) -> torch.Tensor:
        """See :class:`Estimate`."""
        return self._setting.total(self._dots(batch, factors_K) + self._decay)


class Frozen:
    """Linear with a diagonal that is the same for all samples and moves onto the reference gradient."""

    def __init__(self, setting: Setting, gradients: Mapping[str, torch.Tensor]) -> None:
        """Take reference gradients by name [R, …]."""
        self._setting = setting
        state, step = setting.state, step_of(setting.state)
        squares = mean_of(setting, lambda batch, name, k, factor: (gradient(batch, state.weights[name], name, k) * factor).square())
        scale = -step.lr / step.correction1
        self._directions, self._constant = {}, decay_dots(state, gradients)
        for name, stack in gradients.items():
            second = torch.lerp(squares[name], state.exp_avg_sq[name], step.beta2)
            moved = stack * (scale / (second.div_(step.correction2).sqrt_() + step.eps))
            self._directions[name] = moved * (1 - step.beta1)
            self._constant = self._constant + (moved * (step.beta1 * state.exp_avg[name])).flatten(1).double().sum(1)

    def __call__(self, batch: TappedBatch, factors_K: torch.Tensor) -> torch.Tensor:
        """See :class:`Estimate`."""
        return self._setting.total(self._constant + gradient_dots(batch, self._directions) * factors_K[:, None])


class Corrected:
    """Exact on a few items of each reference, with the linear difference to all of them."""

    def __init__(self, setting: Setting, gradients: Mapping[str, torch.Tensor], subset: Sequence[Batches]) -> None:
        """Take reference gradients by name [R, …] and the batches of each reference's subset."""
        part = replace(setting, oracle=setting.oracle.on(subset))
        self._exact = Exact(part)
        part_gradients = part.oracle.gradients(setting.state.weights)
        self._difference = Linear(setting, {name: stack - part_gradients[name] for name, stack in gradients.items()})

    def __call__(self, batch: TappedBatch, factors_K: torch.Tensor) -> torch.Tensor:
        """See :class:`Estimate`."""
        return self._exact(batch, factors_K) + self._difference(batch, factors_K)


class Sgd:
    """The plain dot product −lr·⟨g, g_k⟩, with which other selection methods rank: for comparison."""

    def __init__(self, setting: Setting, gradients: Mapping[str, torch.Tensor]) -> None:
        """Take reference gradients by name [R, …]."""
        self._setting = setting
        self._directions = {name: stack * -setting.state.next_lr for name, stack in gradients.items()}

    def __call__(self, batch: TappedBatch, factors_K: torch.Tensor) -> torch.Tensor:
        """See :class:`Estimate`."""
        return self._setting.total(gradient_dots(batch, self._directions) * factors_K[:, None])


def decay_dots(state: OptimizerState, directions: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """⟨d_r, −lr·λ·θ⟩, the part of weight decay, equal for all samples: [R] float64."""
    dots = [
        -state.next_lr * state.weight_decay[name] * (stack * state.weights[name]).flatten(1).double().sum(1)
        for name, stack in directions.items()
    ]
    return torch.stack(dots).sum(0)


def mean_of(setting: Setting, value: Callable[[TappedBatch, str, int, torch.Tensor], torch.Tensor]) -> Tensors:
    """The mean over the calibration samples of a value in each parameter's shape.

    Args:
        setting: with at least one calibration sample.
        value: of (batch, parameter name, place in the batch, clip factor).
    """
    totals = {name: torch.zeros_like(weight) for name, weight in setting.state.weights.items()}
    count = 0
    for windows in setting.calibration:
        batch, _, factors = setting.run(windows)
        count += len(factors)
        for name in batch.gradients:
            for k, factor in enumerate(factors.to(totals[name].dtype)):
                totals[name] += value(batch, name, k, factor)
    return {name: total / count for name, total in totals.items()}


def mean_step(setting: Setting) -> Tensors:
    """θ + mean Δ over the calibration samples."""
    state, step = setting.state, step_of(setting.state)

    def update(batch: TappedBatch, name: str, k: int, factor: torch.Tensor) -> torch.Tensor:
        return adam_update(state.exp_avg[name], state.exp_avg_sq[name], gradient(batch, state.weights[name], name, k), factor, step)

    means = mean_of(setting, update)
    return {name: weight * (1 - step.lr * state.weight_decay[name]) + means[name] for name, weight in state.weights.items()}

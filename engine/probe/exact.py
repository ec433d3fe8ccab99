"""Exact one-step influences, in plain PyTorch: the definition that every faster method is measured against.

For a sample x at weights θ with AdamW state (m, v, t) (MATES, arXiv 2406.06046, section 3.1)::

    Δθ(x) = AdamW(θ, m, v, t, clip(∇L(x; θ))) − θ
    I(x)  = L_r(θ + Δθ(x)) − L_r(θ)                 nats; negative: the sample helps

L_r is the mean loss over all label tokens of the reference. θ, m and v are read and never written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.func import functional_call

from mates.engine.pretrain.checkpoint import OptimizerState
from mates.engine.pretrain.model import LabelledLoss, next_token_loss
from mates.engine.reference.batches import LabelBatch
from mates.kernels.adamw import AdamWStep, stepped_weight

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class ProbeResult:
    """``influence_nats`` I(x), the sample's own mean loss at θ, and the norm of its gradient before clipping."""

    influence_nats: float
    sample_loss_nats: float
    grad_norm: float


def clip_factor(norm: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """min(1, c / (‖h‖ + 1e-6)), as ``torch.nn.utils.clip_grad_norm_`` and DeepSpeed scale."""
    return torch.clamp(clip_norm / (norm + 1e-6), max=1.0)


def adamw_weights(state: OptimizerState, grads: Tensors, factor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Weights after one AdamW step with gradients scaled by ``factor``, out of place."""
    step = AdamWStep(t=state.t + 1, lr=state.next_lr, beta1=state.beta1, beta2=state.beta2, eps=state.eps)
    return {
        name: stepped_weight(weight, state.exp_avg[name], state.exp_avg_sq[name], grads[name], factor, step, state.weight_decay[name])
        for name, weight in state.weights.items()
    }


class ExactProbe:
    """Probes samples one by one against one reference."""

    def __init__(self, model: nn.Module, state: OptimizerState, reference: Sequence[LabelBatch]) -> None:
        """Take a model for its code (its own weights are not used), the checkpoint's state, and the reference's batches."""
        model.eval()  # no dropout: a probe has no random part
        self._labelled = LabelledLoss(model)
        self._state = state
        self._reference = reference
        self._labels = sum(len(batch.targets) for batch in reference)
        self._tied = {
            name: next(first for first, other in model.named_parameters() if other is parameter)
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        self.baseline_loss_nats = self.reference_loss(state.weights)

    def _named(self, weights: Tensors) -> dict[str, torch.Tensor]:
        """Weights by the names inside ``_labelled``, tied ones under each of their names."""
        return {f"model.{name}": weights[stored] for name, stored in self._tied.items()}

    def reference_loss(self, weights: Tensors) -> float:
        """L_r: mean loss in nats over the reference's label tokens, summed in fp64."""
        named, total = self._named(weights), 0.0
        with torch.no_grad():
            for batch in self._reference:
                losses, _ = functional_call(self._labelled, named, (batch.tokens, batch.positions, batch.targets))
                total += float(losses.double().sum())
        return total / self._labels

    def sample_gradient(self, window: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
        """Loss in nats of one sample [L + 1] and its gradient by parameter name."""
        weights = {name: value.detach().requires_grad_() for name, value in self._state.weights.items()}
        loss = functional_call(_SampleLoss(self._labelled.model), self._named(weights), (window[None],))
        grads = torch.autograd.grad(loss, list(weights.values()))
        return float(loss.detach()), dict(zip(weights, grads, strict=True))

    def probe(self, window: torch.Tensor) -> ProbeResult:
        """Influence of one sample [L + 1] int64."""
        loss, grads = self.sample_gradient(window)
        norm = torch.stack([grad.double().square().sum() for grad in grads.values()]).sum().sqrt()
        after = self.reference_loss(adamw_weights(self._state, grads, clip_factor(norm, self._state.clip_norm)))
        return ProbeResult(after - self.baseline_loss_nats, loss, float(norm))

    def probe_all(self, windows: npt.NDArray[np.int64], device: torch.device) -> list[ProbeResult]:
        """Influences of samples [n, L + 1]."""
        return [self.probe(torch.from_numpy(window).to(device)) for window in windows]


class _SampleLoss(nn.Module):
    """A sample's training loss, with the parameter names of :class:`LabelledLoss`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        return next_token_loss(self.model, windows)

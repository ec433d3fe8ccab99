"""AdamW's update in plain PyTorch, in the order of ``torch.optim.AdamW``."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AdamWStep:
    """The scalars of one step: ``t`` counts from 1."""

    t: int
    lr: float
    beta1: float
    beta2: float
    eps: float

    @property
    def correction1(self) -> float:
        """1 − β1ᵗ."""
        return float(1 - self.beta1**self.t)

    @property
    def correction2(self) -> float:
        """1 − β2ᵗ."""
        return float(1 - self.beta2**self.t)


def stepped_weight(
    weight: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grad: torch.Tensor,
    factor: torch.Tensor,
    step: AdamWStep,
    weight_decay: float,
) -> torch.Tensor:
    """The weight after one AdamW step (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2)::

        g = factor · grad      m' = m + (1 − β1)(g − m)      v' = β2·v + (1 − β2)·g²
        w' = w·(1 − lr·λ) − lr/(1 − β1ᵗ) · m' / (√v'/√(1 − β2ᵗ) + ε)

    Args:
        weight, exp_avg, exp_avg_sq, grad: any one shape and dtype; none is written.
        factor: scalar tensor, what clipping multiplies the gradient with.
        step: scalars of the step. weight_decay: λ.

    Returns:
        A new tensor like ``weight``.
    """
    first, denominator = _moments(exp_avg, exp_avg_sq, grad, factor, step)
    return (weight * (1 - step.lr * weight_decay)).addcdiv_(first, denominator, value=-step.lr / step.correction1)


def adam_update(exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, grad: torch.Tensor, factor: torch.Tensor, step: AdamWStep) -> torch.Tensor:
    """What :func:`stepped_weight` adds to a weight, without weight decay: −lr/(1 − β1ᵗ) · m' / (√v'/√(1 − β2ᵗ) + ε).

    Taken by itself and not as w' − w, which would lose the digits that w' has no room for.
    """
    first, denominator = _moments(exp_avg, exp_avg_sq, grad, factor, step)
    return first.div_(denominator).mul_(-step.lr / step.correction1)


def _moments(
    exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, grad: torch.Tensor, factor: torch.Tensor, step: AdamWStep
) -> tuple[torch.Tensor, torch.Tensor]:
    """m', and √v'/√(1 − β2ᵗ) + ε."""
    clipped = grad * factor.to(grad.dtype)
    first = torch.lerp(exp_avg, clipped, 1 - step.beta1)
    second = (exp_avg_sq * step.beta2).addcmul_(clipped, clipped, value=1 - step.beta2)
    return first, second.sqrt_().div_(step.correction2**0.5).add_(step.eps)

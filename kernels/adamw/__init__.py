"""One AdamW step out of place: the weights after it, nothing else written."""

from __future__ import annotations

import torch

from mates.kernels import available
from mates.kernels.adamw.reference import AdamWStep
from mates.kernels.adamw.reference import stepped_weight as _reference

__all__ = ["AdamWStep", "stepped_weight"]


def stepped_weight(
    weight: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grad: torch.Tensor,
    factor: torch.Tensor,
    step: AdamWStep,
    weight_decay: float,
) -> torch.Tensor:
    """See :func:`mates.kernels.adamw.reference.stepped_weight`; fused into one pass over memory where a GPU is there."""
    if available(weight, exp_avg, exp_avg_sq, grad):
        from mates.kernels.adamw.triton import stepped_weight as fused

        return fused(weight, exp_avg, exp_avg_sq, grad, factor, step, weight_decay)
    return _reference(weight, exp_avg, exp_avg_sq, grad, factor, step, weight_decay)

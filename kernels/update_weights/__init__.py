"""Weights of a linear layer after one AdamW step on one sample, without the gradient."""

from __future__ import annotations

import torch

from mates.kernels import available
from mates.kernels.adamw.reference import AdamWStep
from mates.kernels.update_weights.reference import updated_weights as _reference

__all__ = ["updated_weights"]


def updated_weights(
    inputs_KTI: torch.Tensor,
    grads_KTO: torch.Tensor,
    factors_K: torch.Tensor,
    weight_OI: torch.Tensor,
    exp_avg_OI: torch.Tensor,
    exp_avg_sq_OI: torch.Tensor,
    step: AdamWStep,
    weight_decay: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See :func:`mates.kernels.update_weights.reference.updated_weights`; where a GPU is there no gradient reaches memory."""
    if available(inputs_KTI, grads_KTO, factors_K, weight_OI, exp_avg_OI, exp_avg_sq_OI):
        from mates.kernels.update_weights.triton import updated_weights as fused

        return fused(inputs_KTI, grads_KTO, factors_K, weight_OI, exp_avg_OI, exp_avg_sq_OI, step, weight_decay, dtype)
    return _reference(inputs_KTI, grads_KTO, factors_K, weight_OI, exp_avg_OI, exp_avg_sq_OI, step, weight_decay, dtype)

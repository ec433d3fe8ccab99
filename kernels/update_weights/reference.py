"""Per-sample stepped weights in plain PyTorch."""

from __future__ import annotations

import torch

from mates.kernels.adamw.reference import AdamWStep, stepped_weight


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
    """The weight after one AdamW step on each sample alone, with gradient factor_k · B_kᵀA_k.

    Args:
        inputs_KTI: A, what went into the layer. grads_KTO: B, the gradient of each sample's loss by what came out; of A's dtype.
        factors_K: what clipping multiplies each sample's gradient with.
        weight_OI, exp_avg_OI, exp_avg_sq_OI: the state before the step; none is written.
        step: scalars of the step. weight_decay: λ. dtype: of the result.

    Returns:
        [K, O, I] of ``dtype``.
    """
    rows = []
    for inputs_TI, grads_TO, factor in zip(inputs_KTI, grads_KTO, factors_K, strict=True):
        grad_OI = (grads_TO.T @ inputs_TI).to(weight_OI.dtype)
        rows.append(stepped_weight(weight_OI, exp_avg_OI, exp_avg_sq_OI, grad_OI, factor, step, weight_decay).to(dtype))
    return torch.stack(rows)

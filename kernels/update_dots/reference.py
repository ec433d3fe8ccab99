"""Dots of per-sample AdamW updates in plain PyTorch."""

from __future__ import annotations

import torch

from mates.kernels.adamw.reference import AdamWStep, adam_update


def update_dots(
    inputs_KTI: torch.Tensor,
    grads_KTO: torch.Tensor,
    factors_K: torch.Tensor,
    exp_avg_OI: torch.Tensor,
    exp_avg_sq_OI: torch.Tensor,
    directions_ROI: torch.Tensor,
    step: AdamWStep,
) -> torch.Tensor:
    """⟨d_r, u_k⟩ for each sample k and direction r; u_k is :func:`mates.kernels.adamw.reference.adam_update` of factor_k · B_kᵀA_k.

    Weight decay is left out: it moves all samples' scores alike.

    Args:
        inputs_KTI: A, what went into the layer. grads_KTO: B, the gradient of each sample's loss by what came out; of A's dtype.
        factors_K: what clipping multiplies each sample's gradient with.
        exp_avg_OI, exp_avg_sq_OI: AdamW's moments before the step. directions_ROI: the directions.
        step: scalars of the step.

    Returns:
        [K, R] float32; float64 where the arguments are.
    """
    rows = []
    for inputs_TI, grads_TO, factor in zip(inputs_KTI, grads_KTO, factors_K, strict=True):
        grad_OI = (grads_TO.T @ inputs_TI).to(exp_avg_OI.dtype)
        rows.append(direction_dots(directions_ROI, adam_update(exp_avg_OI, exp_avg_sq_OI, grad_OI, factor, step)))
    return torch.stack(rows).to(exp_avg_OI.dtype)


def direction_dots(directions_R: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """⟨d_r, u⟩: directions [R, …], update […] → [R] float64. Rows are summed in the arguments' dtype, their sums in float64."""
    rows: torch.Tensor = torch.linalg.vecdot(directions_R, update)
    return rows.double().reshape(len(directions_R), -1).sum(1)

"""Dots of each sample's AdamW update of a linear layer with given directions, without gradient or update."""

from __future__ import annotations

import torch

from mates.kernels import available
from mates.kernels.adamw.reference import AdamWStep
from mates.kernels.update_dots.reference import direction_dots
from mates.kernels.update_dots.reference import update_dots as _reference

__all__ = ["direction_dots", "update_dots"]


def update_dots(
    inputs_KTI: torch.Tensor,
    grads_KTO: torch.Tensor,
    factors_K: torch.Tensor,
    exp_avg_OI: torch.Tensor,
    exp_avg_sq_OI: torch.Tensor,
    directions_ROI: torch.Tensor,
    step: AdamWStep,
) -> torch.Tensor:
    """See :func:`mates.kernels.update_dots.reference.update_dots`; where a GPU is there neither gradient nor update reaches memory."""
    if available(inputs_KTI, grads_KTO, factors_K, exp_avg_OI, exp_avg_sq_OI, directions_ROI):
        from mates.kernels.update_dots.triton import update_dots as fused

        return fused(inputs_KTI, grads_KTO, factors_K, exp_avg_OI, exp_avg_sq_OI, directions_ROI, step)
    return _reference(inputs_KTI, grads_KTO, factors_K, exp_avg_OI, exp_avg_sq_OI, directions_ROI, step)

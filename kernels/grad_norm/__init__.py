"""Squared norm of each sample's weight gradient of a linear layer, without the gradient."""

from __future__ import annotations

import torch

from mates.kernels import available
from mates.kernels.grad_norm.reference import squared_norms as _reference

__all__ = ["squared_norms"]


def squared_norms(inputs_KTI: torch.Tensor, grads_KTO: torch.Tensor) -> torch.Tensor:
    """See :func:`mates.kernels.grad_norm.reference.squared_norms`; where a GPU is there no gradient reaches memory."""
    if available(inputs_KTI, grads_KTO):
        from mates.kernels.grad_norm.triton import squared_norms as fused

        return fused(inputs_KTI, grads_KTO)
    return _reference(inputs_KTI, grads_KTO)

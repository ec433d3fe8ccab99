"""Squared gradient norms in plain PyTorch."""

from __future__ import annotations

import torch


def squared_norms(inputs_KTI: torch.Tensor, grads_KTO: torch.Tensor) -> torch.Tensor:
    """‖B_kᵀA_k‖² for each sample k: the squared norm of the weight gradient of a linear layer.

    Args:
        inputs_KTI: A, what went into the layer. grads_KTO: B, the gradient of each sample's loss by what came out; of A's dtype.

    Returns:
        [K] float32; float64 where the arguments are.
    """
    wide = torch.float64 if inputs_KTI.dtype == torch.float64 else torch.float32
    norms = torch.empty(len(inputs_KTI), dtype=wide, device=inputs_KTI.device)
    for k, (inputs_TI, grads_TO) in enumerate(zip(inputs_KTI, grads_KTO, strict=True)):
        norms[k] = torch.linalg.vector_norm((grads_TO.T @ inputs_TI).to(wide)).square()
    return norms

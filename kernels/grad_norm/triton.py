"""Squared gradient norms as one Triton kernel: 2·T·I·O operations a sample, and no gradient in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mates.kernels.gradient_tile import gradient_tile, launch, place_of_program


@triton.jit
def squared_norms_kernel(
    inputs_ptr,
    grads_ptr,
    out_ptr,  # [K, tiles]
    K,
    T,
    I,  # noqa: E741
    O,  # noqa: E741
    tiles,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The sum of squares of one tile of one sample's gradient."""
    k, tile, tile_o, tile_i = place_of_program(K, I, BLOCK_I)
    grad, _, _ = gradient_tile(inputs_ptr, grads_ptr, k, tile_o, tile_i, T, I, O, BLOCK_O, BLOCK_I, BLOCK_T, PRECISION, WIDEN)
    tl.store(out_ptr + k.to(tl.int64) * tiles + tile, tl.sum(grad * grad))


def squared_norms(inputs_KTI: torch.Tensor, grads_KTO: torch.Tensor) -> torch.Tensor:
    """See :func:`mates.kernels.grad_norm.reference.squared_norms`."""
    inputs, grads, (K, T, I, O), tiles, constants = launch(inputs_KTI, grads_KTO)  # noqa: E741
    parts = torch.empty(K, tiles, dtype=torch.float32, device=inputs.device)
    squared_norms_kernel[(K * tiles,)](inputs, grads, parts, K, T, I, O, tiles, **constants)
    return parts.double().sum(1).float()

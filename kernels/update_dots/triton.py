"""Dots of per-sample AdamW updates as one Triton kernel: gradient, clipping, update and dot of a tile, all in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mates.kernels.adamw.reference import AdamWStep
from mates.kernels.adamw.triton import adam_ratio
from mates.kernels.gradient_tile import gradient_tile, launch, place_of_program


@triton.jit
def update_dots_kernel(
    inputs_ptr,
    grads_ptr,
    factors_ptr,  # [K]
    exp_avg_ptr,
    exp_avg_sq_ptr,
    directions_ptr,  # [R, O, I]
    out_ptr,  # [K, R, tiles]
    K,
    T,
    I,  # noqa: E741
    O,  # noqa: E741
    R,
    tiles,
    beta1,
    beta2,
    root_correction2,  # √(1 − β2ᵗ)
    eps,
    scale,  # −lr / (1 − β1ᵗ)
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The dots of one tile of one sample's update."""
    k, tile, tile_o, tile_i = place_of_program(K, I, BLOCK_I)
    grad, offsets, mask = gradient_tile(inputs_ptr, grads_ptr, k, tile_o, tile_i, T, I, O, BLOCK_O, BLOCK_I, BLOCK_T, PRECISION, WIDEN)
    first = tl.load(exp_avg_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(exp_avg_sq_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    update = scale * adam_ratio(grad * tl.load(factors_ptr + k).to(tl.float32), first, second, beta1, beta2, root_correction2, eps)
    out_ptr += k.to(tl.int64) * R * tiles + tile
    for _ in range(R):
        direction = tl.load(directions_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr, tl.sum(direction * update))
        offsets += O * I
        out_ptr += tiles


def update_dots(
    inputs_KTI: torch.Tensor,
    grads_KTO: torch.Tensor,
    factors_K: torch.Tensor,
    exp_avg_OI: torch.Tensor,
    exp_avg_sq_OI: torch.Tensor,
    directions_ROI: torch.Tensor,
    step: AdamWStep,
) -> torch.Tensor:
    """See :func:`mates.kernels.update_dots.reference.update_dots`."""
    inputs, grads, (K, T, I, O), tiles, constants = launch(inputs_KTI, grads_KTO)  # noqa: E741
    R = len(directions_ROI)
    parts = torch.empty(K, R, tiles, dtype=torch.float32, device=inputs.device)
    update_dots_kernel[(K * tiles,)](
        inputs,
        grads,
        factors_K.contiguous(),
        exp_avg_OI.contiguous(),
        exp_avg_sq_OI.contiguous(),
        directions_ROI.contiguous(),
        parts,
        K,
        T,
        I,
        O,
        R,
        tiles,
        step.beta1,
        step.beta2,
        step.correction2**0.5,
        step.eps,
        -step.lr / step.correction1,
        **constants,
    )
    return parts.double().sum(2).float()

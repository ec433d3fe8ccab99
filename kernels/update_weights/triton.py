"""Per-sample stepped weights as one Triton kernel: gradient, clipping and update of a tile in registers, only the weights written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mates.kernels.adamw.reference import AdamWStep
from mates.kernels.adamw.triton import adam_ratio
from mates.kernels.gradient_tile import gradient_tile, launch, place_of_program


@triton.jit
def updated_weights_kernel(
    inputs_ptr,
    grads_ptr,
    factors_ptr,  # [K]
    weight_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    out_ptr,  # [K, O, I]
    K,
    T,
    I,  # noqa: E741
    O,  # noqa: E741
    keep,  # 1 − lr·λ
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
    """One tile of one sample's weights."""
    k, _, tile_o, tile_i = place_of_program(K, I, BLOCK_I)
    grad, offsets, mask = gradient_tile(inputs_ptr, grads_ptr, k, tile_o, tile_i, T, I, O, BLOCK_O, BLOCK_I, BLOCK_T, PRECISION, WIDEN)
    first = tl.load(exp_avg_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(exp_avg_sq_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    ratio = adam_ratio(grad * tl.load(factors_ptr + k).to(tl.float32), first, second, beta1, beta2, root_correction2, eps)
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + k.to(tl.int64) * O * I + offsets, weight * keep + scale * ratio, mask=mask)


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
    """See :func:`mates.kernels.update_weights.reference.updated_weights`."""
    inputs, grads, (K, T, I, O), tiles, constants = launch(inputs_KTI, grads_KTO)  # noqa: E741
    out = torch.empty(K, O, I, dtype=dtype, device=inputs.device)
    updated_weights_kernel[(K * tiles,)](
        inputs,
        grads,
        factors_K.contiguous(),
        weight_OI.contiguous(),
        exp_avg_OI.contiguous(),
        exp_avg_sq_OI.contiguous(),
        out,
        K,
        T,
        I,
        O,
        1 - step.lr * weight_decay,
        step.beta1,
        step.beta2,
        step.correction2**0.5,
        step.eps,
        -step.lr / step.correction1,
        **constants,
    )
    return out

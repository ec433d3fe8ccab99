"""The part that all kernels on per-sample gradients share: one tile of B_kᵀA_k, made in registers.

Programs are numbered so that those which run side by side work on the same tile of different samples: the tile's moments and
directions come from memory once and from cache for the other samples.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl

BLOCK_I, BLOCK_T, WARPS, STAGES = 64, 32, 8, 3
ALIGNED = 16  # widths that are a multiple of it are loaded in vectors


@triton.jit
def gradient_tile(
    inputs_ptr,  # A [K, T, I]
    grads_ptr,  # B [K, T, O]
    k,
    tile_o,
    tile_i,
    T,
    I,  # noqa: E741 - the legend's name
    O,  # noqa: E741
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """B_kᵀA_k at (tile_o, tile_i): [BLOCK_O, BLOCK_I] fp32, zero outside [O, I]; and the tile's offsets in [O, I] and its mask."""
    at_o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    at_i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    inputs_ptr += k.to(tl.int64) * T * I
    grads_ptr += k.to(tl.int64) * T * O
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for block in range(tl.cdiv(T, BLOCK_T)):
        at_t = block * BLOCK_T + tl.arange(0, BLOCK_T)
        inputs_TI = tl.load(inputs_ptr + at_t[:, None] * I + at_i[None, :], mask=(at_t[:, None] < T) & (at_i[None, :] < I), other=0.0)
        grads_TO = tl.load(grads_ptr + at_t[:, None] * O + at_o[None, :], mask=(at_t[:, None] < T) & (at_o[None, :] < O), other=0.0)
        if WIDEN:  # Triton's interpreter multiplies bf16 wrongly
            inputs_TI, grads_TO = inputs_TI.to(tl.float32), grads_TO.to(tl.float32)
        total = tl.dot(tl.trans(grads_TO), inputs_TI, total, input_precision=PRECISION)
    offsets = at_o[:, None].to(tl.int64) * I + at_i[None, :]
    return total, offsets, (at_o[:, None] < O) & (at_i[None, :] < I)


@triton.jit
def place_of_program(K, I, BLOCK_I: tl.constexpr):  # noqa: E741
    """Sample and tile of this program: (k, tile, tile_o, tile_i)."""
    program = tl.program_id(0)
    k, tile = program % K, program // K
    tiles_i = tl.cdiv(I, BLOCK_I)
    return k, tile, tile // tiles_i, tile % tiles_i


def launch(
    inputs_KTI: torch.Tensor, grads_KTO: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int, int, int], int, dict[str, Any]]:
    """What every kernel here is launched with: contiguous A and B, (K, T, I, O), the number of tiles, and the constants."""
    K, T, I = inputs_KTI.shape  # noqa: E741
    O = grads_KTO.shape[2]  # noqa: E741
    # a large tile's addresses would not fit into registers where each element has its own
    block_o = 128 if I % ALIGNED == 0 and O % ALIGNED == 0 else 64
    tiles = triton.cdiv(O, block_o) * triton.cdiv(I, BLOCK_I)
    constants = {
        "BLOCK_O": block_o,
        "BLOCK_I": BLOCK_I,
        "BLOCK_T": BLOCK_T,
        # three tf32 products are as good as one in fp32, and run on tensor cores
        "PRECISION": "tf32x3" if inputs_KTI.dtype == torch.float32 else "tf32",
        "WIDEN": os.environ.get("TRITON_INTERPRET") == "1",
        "num_warps": WARPS,
        "num_stages": STAGES,
    }
    return inputs_KTI.contiguous(), grads_KTO.contiguous(), (K, T, I, O), tiles, constants

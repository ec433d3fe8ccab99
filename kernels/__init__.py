"""Mathematics on tensors: no files, no configuration, no logging.

One folder an operation: ``reference.py`` is plain PyTorch and the definition, ``triton.py`` the fused kernel of the same signature,
and the folder's function picks between them by :func:`available`.
"""

from __future__ import annotations

import os

import torch


def available(*tensors: torch.Tensor) -> bool:
    """Whether a Triton kernel serves these tensors: fp32 or bf16 on a GPU, or anywhere in Triton's interpreter (TRITON_INTERPRET=1)."""
    if any(tensor.dtype not in (torch.float32, torch.bfloat16) for tensor in tensors):
        return False
    return all(tensor.is_cuda for tensor in tensors) or os.environ.get("TRITON_INTERPRET") == "1"

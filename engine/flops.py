"""Floating-point operations by formula, for the plan and the ledger.

A multiplication and an addition count as two. Matrix products are counted and nothing else: element-wise work, norms, look-ups and
softmax are a fraction of a percent at the sizes that matter. Attention is counted in full (all T × T scores), as
``torch.utils.flop_counter`` counts it, although causal kernels skip half. A backward pass is two forwards; recomputation in
attention kernels is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mates.engine.pretrain.shapes import ModelShape


def decoder_forward(shape: ModelShape, vocab_size: int, *, tokens: float, length: float, logit_tokens: float | None = None) -> float:
    """One forward pass of the language model.

    Args:
        shape: the model's shape. vocab_size: rows of its output embedding.
        tokens: tokens read, over all sequences. length: tokens of one sequence.
        logit_tokens: positions whose logits are computed; all by default.
    """
    head = shape.hidden_size * vocab_size
    blocks = shape.matmul_parameters(vocab_size) - head
    attention = 2 * shape.layers * shape.hidden_size * length  # multiply-adds a token: scores and weighted values
    return 2.0 * (tokens * (blocks + attention) + (tokens if logit_tokens is None else logit_tokens) * head)


def decoder_training(shape: ModelShape, vocab_size: int, *, tokens: float, length: float) -> float:
    """Forward and backward pass: three forwards."""
    return 3.0 * decoder_forward(shape, vocab_size, tokens=tokens, length=length)


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """What the cost of a BERT-architecture encoder depends on."""

    hidden_size: int
    layers: int
    intermediate_size: int

    def forward(self, *, tokens: float, length: float) -> float:
        """One forward pass over ``tokens`` tokens in sequences of ``length``."""
        weights = self.layers * (4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size)
        return 2.0 * tokens * (weights + 2 * self.layers * self.hidden_size * length)


def shape_of(config: Mapping[str, Any]) -> EncoderShape:
    """The shape in a transformers configuration. KeyError where it says none of its names."""

    def find(*names: str) -> int:
        return int(next((config[name] for name in names if config.get(name) is not None), None) or _unknown(names))

    return EncoderShape(
        hidden_size=find("hidden_size", "dim", "d_model"),
        layers=find("num_hidden_layers", "n_layers", "num_layers"),
        intermediate_size=find("intermediate_size", "hidden_dim", "d_ff"),
    )


def _unknown(names: tuple[str, ...]) -> int:
    raise KeyError(f"none of {', '.join(names)}")


BERT_BASE = EncoderShape(hidden_size=768, layers=12, intermediate_size=3072)

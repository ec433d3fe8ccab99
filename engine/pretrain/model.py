"""Language models: transformers' GPT-NeoX and Llama by shape, and the losses that are asked of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mates.engine.pretrain.shapes import ModelShape
from mates.engine.random import key_of


def padded_vocabulary(vocab_size: int, multiple: int) -> int:
    """Rows of the embedding: ``vocab_size`` rounded up."""
    return -(-vocab_size // multiple) * multiple


def model_config(shape: ModelShape, vocab_size: int, end_of_document: int) -> Any:
    """The transformers configuration of a shape."""
    from transformers import GPTNeoXConfig, LlamaConfig

    common = {
        "vocab_size": vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_positions,
        "tie_word_embeddings": shape.tie_embeddings,
        "bos_token_id": end_of_document,
        "eos_token_id": end_of_document,
        "use_cache": False,
    }
    if shape.family == "gpt_neox":
        return GPTNeoXConfig(**common, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25})
    return LlamaConfig(**common, num_key_value_heads=shape.kv_heads)


def build_model(config: Any, seed: int) -> nn.Module:
    """A freshly initialised fp32 model; equal configurations and seeds give equal weights. The global generator is left as it was."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(b"".join(part.to_bytes(4, "little") for part in key_of(seed, "weights")), "little") >> 1)
        model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    return model


def build_empty(config: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model whose weights take no memory, on the meta device; its buffers are real and on ``device``."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size = 1, 8
    buffers = dict(AutoModelForCausalLM.from_config(small, attn_implementation="sdpa", dtype=dtype).named_buffers())
    for name, _ in list(model.named_buffers()):
        owner, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(owner), own_name, buffers[name].to(device))
    return model


def load_exported(directory: Path, dtype: torch.dtype) -> nn.Module:
    """A model from a Hugging Face folder on disk."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa", local_files_only=True)
    return model.eval()


def next_token_loss(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of predicting each next token: windows [B, L + 1] int64 → scalar, fp32 (fp64 for an fp64 model)."""
    logits = at_least_fp32(model(input_ids=windows[:, :-1]).logits)
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def at_least_fp32(values: torch.Tensor) -> torch.Tensor:
    """bf16 to fp32; fp32 and fp64 as they are."""
    return values if values.dtype == torch.float64 else values.float()


class LabelledLoss(nn.Module):
    """Losses at label positions only: the output embedding is applied to them and to no other position.

    Sequences are padded on the right and no mask is needed: attention is causal, so no position sees the padding after it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses and hits.

        Args:
            tokens: [B, T] int64. positions: [P], flat positions (row · T + column) that carry a label. targets: [P] int64.

        Returns:
            [P] cross-entropy in nats (fp32, fp64 for an fp64 model), and [P] bool, whether the target is the likeliest token.
        """
        hidden = self.model.base_model(input_ids=tokens).last_hidden_state  # type: ignore[operator]
        logits = self.model.get_output_embeddings()(hidden.flatten(0, 1)[positions])  # type: ignore[operator]
        return nn.functional.cross_entropy(at_least_fp32(logits), targets, reduction="none"), logits.argmax(-1) == targets

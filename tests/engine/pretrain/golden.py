"""Trains two tiny models for 100 steps and prints their losses as JSON, each as the exact number that came out.

    python -P tests/engine/pretrain/golden.py

On a CPU it asks for the arithmetic that every x86-64 with AVX2 has; what it prints belongs into ``golden/DEVICE.json``.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import replace

# before PyTorch is imported: newer instructions add up in another order
os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "AVX2"}

import numpy as np
import torch

from mates.engine import distributed
from mates.engine.config import ModelConfig, PretrainConfig, Recipe
from mates.engine.pretrain.schedule import learning_rate
from mates.engine.pretrain.trainer import Trainer

STEPS, VOCAB, LENGTH, BATCH = 100, 256, 32, 8
MODELS = {
    "gpt_neox": ModelConfig(hidden_size=32, layers=2, heads=2, max_positions=64),
    "llama": ModelConfig(family="llama", hidden_size=32, layers=2, heads=4, kv_heads=2, max_positions=64, tie_embeddings=True),
}


def device_name() -> str:
    """The kind of device that losses are exact on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{platform.machine()}"


def losses(model: ModelConfig, world: distributed.World) -> list[float]:
    """Mean loss of each step; in bf16 on a GPU, in fp32 on a CPU."""
    precision = "bf16" if world.device.type == "cuda" else "fp32"
    config = PretrainConfig(
        sequence_length=LENGTH,
        batch_size=BATCH,
        micro_batch_size=4,
        stages=1,
        steps_per_stage=STEPS,
        warmup_steps=10,
        precision=precision,  # type: ignore[arg-type]
    )
    recipe = replace(Recipe(), model=model, pretrain=config, evaluate=replace(Recipe().evaluate, decay_steps=0))
    trainer = Trainer(recipe, world, vocab_size=VOCAB, end_of_document=0)
    source = np.random.Generator(np.random.PCG64(0))
    rows = (source.random((64, LENGTH + 1)) ** 3 * VOCAB).astype(np.int64)  # some tokens are common, and samples come again
    return [trainer.step(rows[np.arange(step, step + BATCH) % 64], learning_rate(config, step + 1)).loss_nats for step in range(STEPS)]


def main() -> None:
    """Print the losses of both models."""
    world = distributed.join(timeout_minutes=2, threads=1)
    print(json.dumps({"device": device_name(), "losses": {name: losses(model, world) for name, model in MODELS.items()}}))
    distributed.leave()


if __name__ == "__main__":
    main()

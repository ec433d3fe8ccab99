"""Learning rate as a function of the optimizer step."""

from __future__ import annotations

import math

from mates.engine.config import PretrainConfig


def learning_rate(config: PretrainConfig, step: int) -> float:
    """Learning rate of optimizer step ``step`` (1, 2, … over the whole run).

    WSD (Hu et al., MiniCPM, arXiv 2404.06395) without its decay, which happens in a branch: linear warm-up, then constant. Cosine:
    linear warm-up, then a half cosine to ``min_lr_share`` at the run's last step. Steps beyond the last keep its value.
    """
    if step < 1:
        raise ValueError(f"optimizer steps count from 1, got {step}")
    step = min(step, config.total_steps)
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "wsd":
        return config.lr
    progress = (step - config.warmup_steps) / (config.total_steps - config.warmup_steps)
    share = config.min_lr_share + (1 - config.min_lr_share) * (1 + math.cos(math.pi * progress)) / 2
    return config.lr * share


def decay_rate(start_lr: float, step: int, steps: int) -> float:
    """Learning rate of step 1 … ``steps`` of a decay branch: linear from ``start_lr`` to 0, which the last step does not quite reach."""
    return start_lr * (steps - step + 1) / (steps + 1)

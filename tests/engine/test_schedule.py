"""Learning-rate schedules against their definitions."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mates.engine.config import PretrainConfig
from mates.engine.pretrain.schedule import learning_rate


@st.composite
def configs(draw: st.DrawFn, schedule: Literal["wsd", "cosine"]) -> PretrainConfig:
    stages, steps = draw(st.integers(1, 4)), draw(st.integers(1, 30))
    return PretrainConfig(
        schedule=schedule,
        stages=stages,
        steps_per_stage=steps,
        warmup_steps=draw(st.integers(0, stages * steps)),
        lr=draw(st.sampled_from([1e-3, 0.5, 3e-4])),
        min_lr_share=draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
    )


def rates(config: PretrainConfig, beyond: int = 0) -> list[float]:
    return [learning_rate(config, step) for step in range(1, config.total_steps + beyond + 1)]


@given(config=configs("wsd"))
def test_wsd_warms_up_and_stays(config: PretrainConfig) -> None:
    found = rates(config, beyond=20)
    warm = [config.lr * step / config.warmup_steps for step in range(1, config.warmup_steps + 1)]
    assert found == warm + [config.lr] * (len(found) - len(warm))


@given(config=configs("cosine"))
def test_cosine_warms_up_and_falls_to_its_last_value(config: PretrainConfig) -> None:
    found, last = rates(config), config.total_steps
    warm, lowest = config.warmup_steps, config.lr * config.min_lr_share
    assert found[:warm] == [config.lr * step / warm for step in range(1, warm + 1)]
    for step in range(warm + 1, last + 1):  # cos²(x/2) = (1 + cos x) / 2
        half_angle = math.pi * (step - warm) / (last - warm) / 2
        assert found[step - 1] == pytest.approx(lowest + (config.lr - lowest) * math.cos(half_angle) ** 2, rel=1e-12, abs=1e-18)
    assert all(one >= other for one, other in itertools.pairwise(found[max(0, warm - 1) :]))
    if last > warm:
        assert found[-1] == pytest.approx(lowest, rel=1e-12, abs=1e-18)
    assert rates(config, beyond=9)[last:] == [found[-1]] * 9


def test_the_warm_up_spans_stages_once() -> None:
    config = PretrainConfig(stages=3, steps_per_stage=4, warmup_steps=6, lr=6e-3)
    assert rates(config) == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3, 5e-3] + [6e-3] * 7, rel=1e-15)


def test_cosine_as_literals() -> None:
    config = PretrainConfig(schedule="cosine", stages=2, steps_per_stage=5, warmup_steps=2, lr=1.0, min_lr_share=0.2)
    half = 0.2 + 0.8 * 0.5
    assert rates(config)[:2] == [0.5, 1.0]
    assert learning_rate(config, 6) == pytest.approx(half, rel=1e-12)
    assert learning_rate(config, 4) == pytest.approx(half + 0.4 * math.sqrt(0.5), rel=1e-12)
    assert learning_rate(config, 10) == pytest.approx(0.2, rel=1e-12)


@pytest.mark.parametrize("step", [0, -1])
def test_steps_count_from_one(step: int) -> None:
    with pytest.raises(ValueError, match=f"count from 1, got {step}"):
        learning_rate(PretrainConfig(), step)

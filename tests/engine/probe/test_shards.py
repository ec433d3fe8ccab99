"""A model in shards on two processes gives the influences of one process that has all of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import make, make_model, make_reference, make_state, part, samples, scores

from mates.engine.probe.methods import Corrected, Estimate, Exact, Frozen, Linear, Setting, Sgd, mean_step
from mates.launchers.local import run_plain

METHODS = ("exact", "linear", "centred", "frozen", "sgd", "corrected")
FAMILIES = {"gpt_neox": False, "llama": True}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("sharded") / "found.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # for cases.py
        run_plain([sys.executable, str(Path(__file__).parent / "sharded_ranks.py"), str(out)], processes=2)
    loaded: dict[str, Any] = json.loads(out.read_text())
    return loaded


@pytest.fixture(scope="module")
def whole() -> dict[str, tuple[Setting, Any]]:
    settings = {}
    for family, tied in FAMILIES.items():
        model = make_model(family, tied, torch.float64)
        state = make_state(model, 1.0)
        setting = make(model, state, [make_reference(2), make_reference(5)])
        settings[family] = (setting, setting.oracle.gradients(state.weights))
    return settings


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_influences_are_those_of_one_process(
    found: dict[str, Any], whole: dict[str, tuple[Setting, Any]], family: str, method: str
) -> None:
    setting, gradients = whole[family]
    estimates: dict[str, Callable[[], Estimate]] = {
        "exact": lambda: Exact(setting),
        "linear": lambda: Linear(setting, gradients),
        "centred": lambda: Linear(setting, setting.oracle.gradients(mean_step(setting))),
        "frozen": lambda: Frozen(setting, gradients),
        "sgd": lambda: Sgd(setting, gradients),
        "corrected": lambda: Corrected(setting, gradients, [[part(make_reference(seed), 3)] for seed in (2, 5)]),
    }
    expected = scores(setting, estimates[method](), samples()[:16])
    assert np.abs(np.array(found[f"{family} {method}"]) - expected).max() <= 1e-9 * expected.std(0).min()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_holds_half_and_nothing_stays_gathered(found: dict[str, Any], family: str) -> None:
    held, gathered = found[f"{family} held"]
    every = sum(value.numel() for value in make_model(family, FAMILIES[family], torch.float64).parameters())
    assert held <= every // 2 + 64
    assert gathered == 0

"""A model in shards on two processes gives the influences of one process that has all of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import METHODS, make, make_model, make_prober, make_reference, make_state, samples, scores

from mates.engine.probe.methods import Setting
from mates.engine.probe.prober import Prober
from mates.launchers.local import run_plain

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
def whole() -> dict[str, tuple[Setting, Prober]]:
    settings = {}
    for family, tied in FAMILIES.items():
        model = make_model(family, tied, torch.float64)
        setting = make(model, make_state(model, 1.0), [make_reference(2), make_reference(5)])
        settings[family] = (setting, make_prober(setting))
    return settings


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_influences_are_those_of_one_process(
    found: dict[str, Any], whole: dict[str, tuple[Setting, Prober]], family: str, method: str
) -> None:
    setting, prober = whole[family]
    expected = scores(setting, prober.estimate(method), samples()[:16])
    assert np.abs(np.array(found[f"{family} {method}"]) - expected).max() <= 1e-9 * expected.std(0).min()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_holds_half_and_nothing_stays_gathered(found: dict[str, Any], family: str) -> None:
    held, gathered = found[f"{family} held"]
    every = sum(value.numel() for value in make_model(family, FAMILIES[family], torch.float64).parameters())
    assert held <= every // 2 + 64
    assert gathered == 0

"""The fidelity benchmark's gate and table, on figures that are known."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest

from mates.engine.probe.prober import ESTIMATES

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from probe_fidelity import STAGES, gate, lines, parse, recipe_of


def rows() -> list[dict[str, Any]]:
    rank = {"value": 0.9, "low": 0.8, "high": 0.95}
    methods = {method: {"lambada": {"spearman": rank, "pearson": rank}} for method in (*ESTIMATES, "sgd")}
    fidelity = {"methods": methods, "reliability": {"lambada": rank}, "samples": 16}
    influences = {"baseline_loss_nats": 5.5, "mean_nats": -1e-3, "sd_nats": 2e-3, "helpful_share": 0.6}
    one = {"step": 40, "influences": {"lambada": influences}, "fidelity": fidelity}
    return [copy.deepcopy(one) for _ in range(STAGES)]


def test_the_table_names_every_method_at_every_checkpoint() -> None:
    found = list(lines(rows()))
    assert len(found) == STAGES * (1 + len(ESTIMATES) + 1)
    assert found[0] == "step 40: lambada loss 5.500 nats, influences -1.00e-03 ± 2.00e-03, oracle reliability 0.900 (0.800 to 0.950)"
    assert [line.split()[0] for line in found[1:6]] == [*ESTIMATES, "sgd"]
    assert found[1].endswith("Spearman 0.900 (0.800 to 0.950)  Pearson 0.900 (0.800 to 0.950)")


def test_a_missing_figure_closes_the_gate() -> None:
    found = rows()
    gate(found)
    found[1]["fidelity"]["methods"]["frozen"]["lambada"]["spearman"] = None
    with pytest.raises(SystemExit, match="gate: step 40, frozen, lambada: no correlation; nothing was written"):
        gate(found)


def test_every_sample_is_probed_exactly(tmp_path: Path) -> None:
    recipe = recipe_of(parse(["--run_dir", str(tmp_path), "--samples", "30"]))
    assert recipe.probe.samples == recipe.probe.fidelity_samples == 30
    assert recipe.methods == ["random"]

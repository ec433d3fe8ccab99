"""The loader benchmark on a tiny corpus: every figure is there, and the gate closes where a batch differs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core.datasets.gpt_dataset", reason="megatron-core is not installed: pip install megatron-core==0.16.1")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import loader

TINY = ["--tokens", "60000", "--length", "32", "--batch", "8", "--workers", "0,1", "--repeats", "1", "--index_samples", "10000"]


def test_every_figure_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert loader.main([*TINY, "--results", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "loader.json").read_text())
    assert set(found["rates"]) == {f"{order}, {workers} workers" for order in ("random", "file") for workers in (0, 1)}
    assert all(row[key]["median"] > 0 for row in found["rates"].values() for key in ("ours_samples_per_s", "theirs_samples_per_s", "ratio"))
    assert found["gate"]["batches_compared"] == found["samples"] // 8
    assert found["start_s"]["ours"]["n"] == found["start_s"]["theirs"]["n"] == 1
    assert str(Path.cwd()) not in json.dumps(found)
    assert len(capsys.readouterr().out.splitlines()) == 1 + 4 + 2


def test_another_batch_closes_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = loader.ours

    def wrong(*arguments: Any) -> Iterator[Any]:
        for number, (tokens, labels) in enumerate(right(*arguments)):
            tokens[3, 5] += number == 2
            yield tokens, labels

    monkeypatch.setattr(loader, "ours", wrong)
    with pytest.raises(SystemExit, match="loader: gate: batch 2 differs; nothing was written"):
        loader.main([*TINY, "--results", str(tmp_path / "results")])
    assert not (tmp_path / "results").exists()

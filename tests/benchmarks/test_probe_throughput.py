"""The probe benchmark on a few random samples: every figure is there, and the gate closes where a contestant is wrong."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import probe_throughput
from probe_throughput import CONTESTANTS, OURS, lines, parse, work

SIZES = {"length": 16, "items": 4, "subset_items": 2, "samples": 8, "one_by_one": 2, "batch": 4, "repeats": 1, "threads": 2}
TINY = ["--synthetic", *(f"--{name}={size}" for name, size in SIZES.items())]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Contestants work in this process, since starting one for each takes longer than all they do; the names of those that did."""
    done: list[str] = []

    def run(
        options: argparse.Namespace, folder: Path, name: str, samples: int, *, values: bool = False, precision: str | None = None
    ) -> dict[str, Any]:
        done.append(name)
        task = {"name": name, "samples": samples, "values": values, "folder": str(folder), "arguments": options.given}
        return work(task | {"precision": precision or options.precision})

    monkeypatch.setattr(probe_throughput, "run_child", run)
    threads = torch.get_num_threads()
    yield done
    torch.set_num_threads(threads)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_every_figure_is_there(precision: str, in_process: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert probe_throughput.main([*TINY, "--precision", precision, "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    assert path.name == ("probe_throughput_cpu_small.json" if precision == "fp32" else "probe_throughput_cpu_small_bf16.json")
    found = json.loads(path.read_text())
    assert set(found["contestants"]) == set(CONTESTANTS) <= set(in_process)
    for row in found["contestants"].values():
        assert row["probes_per_s"]["n"] == 1
        assert row["flops_per_probe"] > 0
        assert row["peak_bytes"] > 0
    assert found["contestants"]["published_memory"]["over_published_memory"]["median"] == 1
    assert found["contestants"]["training"]["over_training"]["median"] == 1
    assert found["gate"]["errors_sd"]["exact"] <= 1e-3
    assert found["gate"]["fidelity"] is None  # random tokens have none
    assert str(Path.cwd()) not in json.dumps(found)
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[2:]] == list(CONTESTANTS)


def test_one_contestant_in_a_process_of_its_own(tmp_path: Path) -> None:
    options = parse(TINY)
    probe_throughput.prepare(options, tmp_path)
    found = probe_throughput.run_child(options, tmp_path, "linear", 4, values=True)
    assert len(found["values"]) == found["samples"] == 4
    assert found["seconds"] > 0


@pytest.mark.parametrize(("wrong", "named"), [("published_memory", "exact"), ("linear", "linear")])
def test_a_wrong_influence_closes_the_gate(
    wrong: str, named: str, in_process: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = probe_throughput.run_child

    def spoiled(options: argparse.Namespace, folder: Path, name: str, samples: int, **more: Any) -> dict[str, Any]:
        found = right(options, folder, name, samples, **more)
        if name == wrong:
            found["values"][0] += 0.01 * (max(found["values"]) - min(found["values"]))
        return found

    monkeypatch.setattr(probe_throughput, "run_child", spoiled)
    with pytest.raises(SystemExit, match=f"gate: {named} is off by"):
        probe_throughput.main([*TINY, "--results", str(tmp_path / "results")])
    assert not (tmp_path / "results").exists()
    assert set(in_process) == {"vmap", "published_memory", *OURS}


def test_the_table_has_the_fidelity_where_there_is_one() -> None:
    found = json.loads((Path(probe_throughput.__file__).parent / "results" / "probe_throughput_cpu_small.json").read_text())
    by_name = {line.split()[0]: line for line in lines(found)}
    known = found["gate"]["fidelity"]["linear"]["spearman"]
    assert by_name["linear"].endswith(f"{known['value']:.3f} ({known['low']:.3f} to {known['high']:.3f})")

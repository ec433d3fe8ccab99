"""A small recipe whose training is stopped, killed and starved of disk space, and how to run it and to look at what it left."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from mates.launchers.local import console_script
from mates.preprocess import artifact
from mates.preprocess.workers import try_lock

STEPS = 60
RECIPE: dict[str, Any] = {
    "methods": ["random"],
    "corpus": {"sample_bytes": 1_500_000, "pool_share": 0.1, "holdout_share": 0.05},
    "tokenizer": {"vocab_size": 512, "train_bytes": 500_000},
    "reference": {"items": 8, "test_items": 8},
    "model": {"hidden_size": 32, "layers": 2, "heads": 2, "max_positions": 256},
    "pretrain": {
        "precision": "fp32",
        "sequence_length": 64,
        "batch_size": 4,
        "micro_batch_size": 2,
        "stages": 1,
        "steps_per_stage": STEPS,
        "warmup_steps": 4,
        "checkpoint_every": 1_000,
        "log_every": 1,
    },
    "evaluate": {"decay_steps": 0, "holdout_samples": 8},
    "launch": {"processes": 2},
}


def session_folder(factory: pytest.TempPathFactory) -> Path:
    """Where test files share the data and the undisturbed run, in whichever of the session's processes they are."""
    base = factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "training"


@cache
def write_recipe(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "small.yaml"
    with locked(folder):
        path.write_text(yaml.safe_dump(RECIPE | {"data_dir": str(folder / "data")}))
    return path


@cache
def run_undisturbed(recipe: Path) -> Path:
    run_dir = recipe.with_name("undisturbed")
    with locked(recipe.parent):  # where another has made it, all steps are skipped
        done = finish(recipe, run_dir)
    assert done.returncode == 0, done.stderr
    return run_dir


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("ab") as handle:
        assert try_lock(handle, 600)
        yield


def command(recipe: Path, run_dir: Path, *more: str) -> list[str]:
    return [console_script("mates"), "run", str(recipe), "--run_dir", str(run_dir), *more]


def finish(recipe: Path, run_dir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(recipe, run_dir, *more), capture_output=True, text=True, check=False)


def logged(run_dir: Path) -> list[int]:
    """Steps that were logged, in order; a line may be half written."""
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return [json.loads(line)["step"] for line in lines]


def fingerprint(run_dir: Path) -> str:
    """Of weights, moments and losses."""
    return artifact.verify(run_dir / "shared/stage0/checkpoint", "checkpoint").fingerprint

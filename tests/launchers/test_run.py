"""The whole loop through the command line on the embedded corpus, small."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mates.launchers.local import console_script
from mates.launchers.locks import RUN_LOCK
from mates.preprocess import artifact

RECIPE: dict[str, Any] = {
    "corpus": {"sample_bytes": 3_000_000, "pool_share": 0.1, "holdout_share": 0.05},
    "tokenizer": {"vocab_size": 512, "train_bytes": 1_000_000},
    "reference": {"items": 24, "test_items": 24},
    "model": {"hidden_size": 32, "layers": 2, "heads": 2, "max_positions": 256},
    "pretrain": {
        "precision": "fp32",
        "sequence_length": 64,
        "batch_size": 8,
        "micro_batch_size": 4,
        "stages": 2,
        "steps_per_stage": 12,
        "warmup_steps": 4,
        "checkpoint_every": 4,
    },
    "probe": {"samples": 40, "chunk_size": 4, "after_decay": True},
    "fit": {"hidden_size": 16, "layers": 1, "heads": 2, "epochs": 2},
    "score": {"chunk_size": 64},
    "evaluate": {"decay_steps": 3, "holdout_samples": 16},
    "launch": {"processes": 2},
}


def mates(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([console_script("mates"), *arguments], capture_output=True, text=True, env=environment, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embedded corpus, tokenizer, corpora and reference, shared by the runs of this file."""
    return tmp_path_factory.mktemp("run") / "data"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"data_dir": str(data_dir)}))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """Folder of an undisturbed run."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    mates("run", str(recipe), "--run_dir", str(run_dir))
    return run_dir


def fingerprints(run_dir: Path) -> dict[str, str]:
    """Fingerprint of each artifact of a run by its place; a checkpoint's is a hash of weights, moments and losses."""
    return {
        str(manifest.parent.relative_to(run_dir)): artifact.load(manifest.parent).fingerprint
        for manifest in sorted(run_dir.rglob(artifact.MANIFEST_NAME))
        if "partial" not in manifest.parts
    }


def test_every_step_left_its_artifact(finished: Path) -> None:
    expected = {"shared/stage0": ["checkpoint", "evaluation", "index"]}
    expected["random/stage1"] = expected["shared/stage0"]
    expected["mates/stage1"] = ["checkpoint", "evaluation", "index", "influence-model", "labels", "scores"]
    assert sorted(fingerprints(finished)) == sorted(f"{stage}/{name}" for stage, names in expected.items() for name in names)
    assert (finished / "report.html").stat().st_size > 10_000
    assert not list(finished.rglob("*.tmp"))
    assert not list(finished.rglob("partial"))


def test_the_export_stands_alone(finished: Path) -> None:
    """Transformers alone loads hf/, weights as in state/, tokenizer included."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mates.engine.pretrain.checkpoint import read_state

    folder = finished / "mates/stage1/checkpoint"
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", local_files_only=True)
    state, _ = read_state(folder, dtype=torch.float32, device=torch.device("cpu"))
    assert all(torch.equal(value, state.weights[name]) for name, value in model.named_parameters())
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf", local_files_only=True)
    assert tokenizer.decode(tokenizer("The sum of all parts.")["input_ids"]) == "The sum of all parts."


def test_inspect_verifies_the_run(finished: Path) -> None:
    shown = mates("inspect", str(finished)).stdout
    assert shown.count("BLAKE3 verified") == len(fingerprints(finished))


def test_selected_samples_are_candidates_of_their_stage(finished: Path) -> None:
    seen = set(np.load(finished / "shared/stage0/index/index.npy").tolist())
    assert len(seen) == 12 * 8
    for method in ("random", "mates"):
        chosen = np.load(finished / method / "stage1/index/index.npy").tolist()
        assert len(set(chosen)) == len(chosen) == 12 * 8
        assert not seen & set(chosen), "no sample is a candidate twice"


def test_a_second_run_does_nothing(finished: Path, recipe: Path) -> None:
    files = {
        path: path.stat().st_mtime_ns
        for path in finished.rglob("*")
        if path.is_file() and path.name not in ("recipe.yaml", "report.html", "ledger.json", RUN_LOCK)
    }
    mates("run", str(recipe), "--run_dir", str(finished))
    assert files == {path: path.stat().st_mtime_ns for path in files}


def test_one_scoring_rank_gives_the_scores_of_two(finished: Path, recipe: Path, tmp_path: Path) -> None:
    stage = finished / "mates/stage1"
    before = {name: (stage / name).rename(tmp_path / name) for name in ("scores", "index")}
    try:
        for verb in ("score", "select"):
            mates(verb, str(recipe), "--run_dir", str(finished), "--method", "mates", "--stage", "1")
        for name, old in before.items():
            manifest = artifact.load(stage / name)
            assert manifest.fingerprint == artifact.load(old).fingerprint
            for file in manifest.files:
                assert (stage / name / file).read_bytes() == (old / file).read_bytes()
    finally:
        for name, old in before.items():
            subprocess.run(["rm", "-rf", str(stage / name)], check=True)
            old.rename(stage / name)


def test_ledger_counts_every_step(finished: Path) -> None:
    ledger = json.loads((finished / "ledger.json").read_text())
    text = json.dumps(ledger)
    for verb in ("pretrain", "probe", "fit", "score", "select", "evaluate"):
        assert verb in text


def test_two_runs_do_not_share_a_folder(recipe: Path, tmp_path: Path) -> None:
    import fcntl

    run_dir = tmp_path / "busy"
    run_dir.mkdir()
    with (run_dir / ".run.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = mates("run", str(recipe), "--run_dir", str(run_dir), check=False)
    assert done.returncode == 1
    assert f"{run_dir}: another `mates run` is working here" in done.stderr


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until a file of the run is there."""
    while not path.exists():
        assert process.poll() is None, "the run ended before the moment to kill it came"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        "shared/stage0/partial/step-00000004/manifest.json",  # inside pretraining
        "mates/stage1/labels/parts/part-000002.parquet",  # inside the probe
        "mates/stage1/scores/scores-000001.npy",  # inside scoring
        "mates/stage1/checkpoint/deepspeed/latest",  # inside the last checkpoint's writing
    ],
)
def test_killed_and_run_again(finished: Path, recipe: Path, tmp_path: Path, moment: str) -> None:
    run_dir = tmp_path / "run"
    command = [console_script("mates"), "run", str(recipe), "--run_dir", str(run_dir)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(run_dir / moment, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    mates("run", str(recipe), "--run_dir", str(run_dir))
    assert fingerprints(run_dir) == fingerprints(finished)


@pytest.mark.slow
def test_interrupted_and_run_again(finished: Path, recipe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [console_script("mates"), "run", str(recipe), "--run_dir", str(run_dir)]
    # a shell that puts the tests in the background has them ignore SIGINT, and children inherit that
    listening = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, preexec_fn=listening)
    wait_for(run_dir / "shared/stage0/partial/step-00000004/manifest.json", process)
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does
    _, errors = process.communicate()
    assert process.returncode == 130
    assert b"the same command continues where this one stopped" in errors
    mates("run", str(recipe), "--run_dir", str(run_dir))
    assert fingerprints(run_dir) == fingerprints(finished)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))

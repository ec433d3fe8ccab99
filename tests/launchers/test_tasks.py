"""Zero-shot tasks of a run whose model no rank holds as a whole, against those of its weights in one process."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import shared
from safetensors.torch import load_file
from training import RECIPE, finish
from transformers import AutoModelForCausalLM

from mates.launchers.local import console_script
from mates.preprocess import artifact

TASKS = ["sciq", "piqa", "winogrande"]


@pytest.mark.slow
def test_two_ranks_measure_the_weights_at_the_end_of_the_branch(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install mates[eval]")
    evaluate = {"tasks": TASKS, "task_data": str(shared("eval")), "task_limit": 10, "batch_size": 4}
    changes = {
        "probe": {"after_decay": True},  # keeps the weights after the decay
        "pretrain": RECIPE["pretrain"] | {"zero_stage": 3, "steps_per_stage": 6},
        "evaluate": {"decay_steps": 2, "holdout_samples": 8, **evaluate},
    }
    recipe, run = tmp_path / "small.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(RECIPE | changes))
    done = finish(recipe, run)
    assert done.returncode == 0, done.stderr
    directory, folder = run / "shared/stage0/evaluation", tmp_path / "decayed"
    artifact.verify(directory, "evaluation")
    shutil.copytree(run / "shared/stage0/checkpoint/hf", folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (weights,) = (directory / "state").glob("weights-*.safetensors")
    model.load_state_dict(load_file(weights))
    model.save_pretrained(folder)
    options = [word for name, value in evaluate.items() for word in (f"--evaluate.{name}", json.dumps(value).strip('"'))]
    out = tmp_path / "alone.json"
    command = [console_script("mates"), "evaluate", "--export", str(folder), *options, "--launch.threads", "1", "--out", str(out)]
    subprocess.run(command, check=True)
    alone, of_run = json.loads(out.read_text()), json.loads((directory / "tasks.json").read_text())
    assert of_run == {name: alone[name] for name in of_run}
    assert "Zero-shot tasks" in (run / "report.html").read_text()

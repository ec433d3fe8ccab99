"""Scores are the same files for any number of processes and after any number of kills."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from synthetic_run import build_shared, make_recipe

from mates.engine.config import FitConfig, PretrainConfig, Recipe, ScoreConfig
from mates.engine.data.index import INDEX_FILE
from mates.engine.distributed import World
from mates.engine.influence.fit import fit_stage
from mates.engine.influence.score import score_stage
from mates.engine.layout import layout_of
from mates.launchers.local import StepFailedError, console_script, run_plain
from mates.launchers.recipe import write_recipe
from mates.preprocess import artifact

KILLS = 20


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run up to the influence model of stage 1, to be scored one sample a chunk."""
    made = make_recipe(
        tmp_path_factory.mktemp("killed"),
        fit=FitConfig(hidden_size=32, epochs=1, model="cascade"),
        score=ScoreConfig(chunk_size=1),
        pretrain=PretrainConfig(sequence_length=32, batch_size=4, micro_batch_size=4, stages=2, steps_per_stage=100, warmup_steps=5),
    )
    build_shared(made, ["mates"], ["probe"])
    fit_stage(made, World(0, 1, torch.device("cpu")), "mates", 1)
    return made


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe) -> dict[str, bytes]:
    """Every file of scores that one process made in one go."""
    score_stage(recipe, World(0, 1, torch.device("cpu")), "mates", 1)
    return taken(recipe)


def taken(recipe: Recipe) -> dict[str, bytes]:
    """The files of scores, which are then gone."""
    directory = layout_of(recipe).scores("mates", 1)
    artifact.verify(directory, "scores")
    found = {path.name: path.read_bytes() for path in directory.glob("*.npy")}
    assert {path.name for path in directory.iterdir()} == {artifact.MANIFEST_NAME, *found}
    for path in directory.iterdir():
        path.unlink()
    return found


def command(recipe: Recipe) -> list[str]:
    path = recipe.path() / "score.yaml"
    write_recipe(path, recipe)
    return [console_script("mates"), "score", "--recipe", str(path), "--method", "mates", "--stage", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_any_number_of_processes(recipe: Recipe, undisturbed: dict[str, bytes], processes: int) -> None:
    own = replace(recipe, launch=replace(recipe.launch, threads=1))
    run_plain(command(own), processes)
    assert taken(recipe) == undisturbed


@pytest.mark.slow
def test_four_processes_select_what_one_does(recipe: Recipe) -> None:
    score_stage(recipe, World(0, 1, torch.device("cpu")), "mates", 1)
    directory, found = layout_of(recipe).index("mates", 1), []
    for processes in (1, 4):
        run_plain([word if word != "score" else "select" for word in command(recipe)], processes)
        found.append(((directory / INDEX_FILE).read_bytes(), artifact.verify(directory, "selection index").fingerprint))
        artifact.unmake(directory)
    assert found[0] == found[1]
    taken(recipe)


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_twenty_kills(recipe: Recipe, undisturbed: dict[str, bytes]) -> None:
    """One rank of one, two or three is killed a moment after a new file has come; the others end, and what is there is kept."""
    source, directory = random.Random(0), layout_of(recipe).scores("mates", 1)
    killed = 0
    while killed < KILLS:
        before = set(directory.glob("*.npy")) if directory.exists() else set()
        victim = threading.Thread(target=kill_one, args=(directory, len(before), source.random() * 0.01))
        victim.start()
        with contextlib.suppress(StepFailedError):
            run_plain(command(recipe), source.choice([1, 1, 2, 3]))
            pytest.fail(f"scored to the end after {killed} kills")
        victim.join()
        killed += 1
        assert before <= set(directory.glob("*.npy")), "what was scored before is gone"
        assert not (directory / artifact.MANIFEST_NAME).exists()
    run_plain(command(recipe), 1)
    assert taken(recipe) == undisturbed


def kill_one(directory: Path, before: int, delay: float) -> None:
    """SIGKILL some rank once there are more files than before."""
    while not directory.exists() or len(list(directory.glob("*.npy"))) <= before:
        time.sleep(0.002)
    time.sleep(delay)
    ranks = [child for child in psutil.Process().children() if "score" in child.cmdline()]
    random.Random(delay).choice(ranks).kill()

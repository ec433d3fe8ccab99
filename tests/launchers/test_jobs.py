"""What jobs ask for, the scripts they are made of, and where ranks go; the scripts are run by the tests on a SLURM cluster."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import build_data, build_step, make_recipe

from mates.engine.config import FitConfig, LaunchConfig, PretrainConfig, Recipe, RecipeError, ResourcesConfig, SlurmConfig
from mates.engine.layout import layout_of
from mates.engine.loop import Step, needed_steps, run_steps
from mates.launchers.cli import main
from mates.launchers.jobs import Job, job_script, resources_of
from mates.launchers.launch import Host, launch_local, read_hosts, with_ranks
from mates.launchers.local import StepFailedError, console_script
from mates.launchers.locks import RunBusyError, run_lock
from mates.launchers.run import run_recipe
from mates.launchers.slurm import before
from mates.preprocess.artifact import MANIFEST_NAME

PRETRAIN, PREPROCESS, TOKENIZER = Step("pretrain", "mates", 1), Step("preprocess"), Step("tokenizer")
FIRST = Step("pretrain", "shared", 0)
SCORE, DSIR = Step("score", "mates", 1), Step("score", "dsir", 1)


def recipe_of(slurm: SlurmConfig | None = None, **changes: Any) -> Recipe:
    launch = LaunchConfig(processes=16, nodes=2, slurm=slurm or SlurmConfig())
    return replace(Recipe(methods=["mates", "dsir"], pretrain=PretrainConfig(batch_size=64), launch=launch), **changes)


@pytest.mark.parametrize(
    ("step", "model", "nodes", "processes", "gpus"),
    [
        (PRETRAIN, "encoder", 2, 8, 8),
        (SCORE, "encoder", 2, 8, 8),
        (SCORE, "ngram", 1, 1, 0),
        (DSIR, "encoder", 1, 1, 0),
        (Step("score", "perplexity", 1), "ngram", 2, 8, 8),
        (Step("fit", "mates", 1), "ngram", 1, 1, 0),
        (Step("fit", "mates", 1), "cascade", 2, 8, 8),
        (PREPROCESS, "encoder", 1, 1, 0),
        (Step("report"), "encoder", 1, 1, 0),
    ],
)
def test_steps_that_run_a_model_ask_for_gpus(step: Step, model: Any, nodes: int, processes: int, gpus: int) -> None:
    asked = resources_of(recipe_of(fit=FitConfig(model=model)), step)
    assert (asked.nodes, asked.processes, asked.gpus_per_node) == (nodes, processes, gpus)


def test_a_verbs_own_resources_come_first() -> None:
    slurm = SlurmConfig(
        gpu=ResourcesConfig(gpus_per_node=0, time="1:00:00", partition="h100", options=["--exclusive"]),
        cpu=ResourcesConfig(nodes=3, processes=7, memory="10G"),
        steps={"pretrain": ResourcesConfig(time="2:00:00", options=["--qos=high"]), "preprocess": ResourcesConfig(nodes=5)},
    )
    recipe = recipe_of(slurm)
    pretrain, preprocess, tokenizer = (resources_of(recipe, step) for step in (PRETRAIN, PREPROCESS, TOKENIZER))
    assert (pretrain.time, pretrain.partition, pretrain.gpus_per_node) == ("2:00:00", "h100", 0)
    assert pretrain.options == ("--exclusive", "--qos=high")
    assert (preprocess.nodes, preprocess.processes, preprocess.memory, preprocess.partition) == (5, 7, "10G", None)
    assert tokenizer.ranks == 1, "the work of one process"


def test_the_command_lines_ranks_are_the_recipes() -> None:
    recipe = with_ranks(recipe_of(), PRETRAIN, 4, 2, None)
    assert (recipe.launch.nodes, recipe.launch.processes) == (4, 8)
    assert resources_of(recipe, PRETRAIN).gpus_per_node == 2
    plain = with_ranks(recipe_of(), PRETRAIN, 4, None, 2)
    assert resources_of(plain, PRETRAIN).gpus_per_node == 0
    with pytest.raises(RecipeError, match=r"pretrain.batch_size: found 64, expected a multiple of launch.processes = 6"):
        with_ranks(recipe_of(), PRETRAIN, 3, 2, None)
    scored = resources_of(with_ranks(recipe_of(), SCORE, 3, 2, None), SCORE)  # its ranks share no batches
    assert (scored.nodes, scored.processes) == (3, 2)
    with pytest.raises(RecipeError, match="tokenizer is the work of one process"):
        with_ranks(recipe_of(), TOKENIZER, 2, None, 1)


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "deepspeed"])
@pytest.mark.parametrize("step", [PRETRAIN, PREPROCESS, TOKENIZER])
def test_scripts_are_bash(launcher: Any, step: Step, tmp_path: Path) -> None:
    slurm = SlurmConfig(launcher=launcher, account="lab", setup=["module load cuda"], cpu=ResourcesConfig(processes=4, cpus_per_process=3))
    recipe = replace(recipe_of(slurm), run_dir=str(tmp_path / "a run's"))
    script = job_script(Job(recipe, step, tmp_path / "it's.yaml", resources_of(recipe, step)))
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --account=lab\n" in script
    assert "{\nmodule load cuda\n} || {" in script
    assert ("--gpus-per-node=8" in script) == (step is PRETRAIN)
    assert ("srun --nodes=1 --ntasks=4 --ntasks-per-node=4 --cpus-per-task=3" in script) == (step is PREPROCESS)
    assert ("--mpi=pmi2" in script) == (step is PREPROCESS)
    if launcher != "srun":
        assert (f"/mates forward -- {shlex.quote(console_script(launcher))}" in script) == (step is PRETRAIN)


def test_in_a_container_commands_are_the_containers(tmp_path: Path) -> None:
    recipe = replace(recipe_of(SlurmConfig(prefix=["apptainer", "exec", "--nv", "mates.sif"])), run_dir=str(tmp_path))
    script = job_script(Job(recipe, PRETRAIN, tmp_path / "r.yaml", resources_of(recipe, PRETRAIN)))
    assert f" apptainer exec --nv mates.sif mates pretrain --recipe {tmp_path}/r.yaml" in script
    assert "export PATH=" not in script


def test_every_step_comes_after_what_it_needs() -> None:
    recipe = recipe_of(methods=["random", "mates", "dsir"], pretrain=PretrainConfig(batch_size=64, stages=3))
    seen: set[Step] = set()
    for step in run_steps(recipe):
        needed = set(before(recipe, step))
        assert needed <= seen, f"{step} would wait for jobs that come later"
        if step.method is not None:
            assert set(needed_steps(recipe, step)) <= needed
            assert Step("reference") in needed
        seen.add(step)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5_400),
        ("90:30", 5_430),
        ("1:00:00", 3_600),
        ("2-12", 216_000),
        ("2-12:30", 217_800),
        ("1-00:00:01", 86_401),
        (None, math.inf),
    ],
)
def test_time_limits_are_read_as_slurm_does(time: str | None, seconds: float) -> None:
    assert ResourcesConfig(time=time).seconds == seconds


@pytest.mark.parametrize("item", ["module load a\nexport B=1  # why", "true  # why"])
@pytest.mark.parametrize("fails", [False, True])
def test_commands_of_the_setup(item: str, fails: bool, tmp_path: Path) -> None:
    recipe = replace(
        recipe_of(SlurmConfig(setup=[item.replace("module load a", "true"), "false # so" if fails else "true"])), run_dir=str(tmp_path)
    )
    script = job_script(Job(recipe, TOKENIZER, tmp_path / "r.yaml", resources_of(recipe, TOKENIZER)))
    (tmp_path / "slurm").mkdir()
    script = script[: script.index("srun --nodes")]
    done = subprocess.run(
        ["bash"], input=script, capture_output=True, text=True, check=False, env={"SLURM_JOB_ID": "7", "PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == (2 if fails else 0), done.stderr
    assert ("mates: launch.slurm.setup failed: false # so" in done.stderr) == fails


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1\nn2\n", [Host("n1", 4), Host("n2", 4)]),
        ("# ours\nn1 slots=8\n\nn2  slots = 4 # half\n", [Host("n1", 4), Host("n2", 4)]),
        ("n1:4\nn2:16\nn3:1\n", [Host("n1", 4), Host("n2", 4)]),
    ],
)
def test_hostfiles(text: str, hosts: list[Host], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(text)
    assert read_hosts(tmp_path / "hosts", 4, 2) == hosts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n1 slots=4\nn2 slots=2\n", r"hosts: 4 ranks a node are asked for, and fewer slots are there on n2 \(2\)"),
        ("n1\n", "--nodes: found 2, but .*hosts has 1: n1"),
        ("n1\nn1\n", "hosts, line 2: n1 is there twice"),
        ("n1 gpus=4\nn2\n", "hosts, line 1: found 'n1 gpus=4', expected `name`"),
        ("# none\n", "hosts: no machine in it"),
        (None, "hosts: cannot be read as a hostfile: No such file"),
    ],
)
def test_bad_hostfiles_are_refused(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    with pytest.raises(RecipeError, match=message):  # exit code 2: the same command will not do
        read_hosts(tmp_path / "hosts", 4, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["launch", "cloud", "pretrain"], "usage: mates launch {local,deepspeed,slurm,mpi} VERB RECIPE"),
        (["launch", "slurm", "inspect"], "usage: mates launch {local,deepspeed,slurm,mpi} VERB RECIPE"),
        (["launch", "slurm", "pretrain", "--launcher", "mpirun"], "--launcher: found 'mpirun', expected one of srun, torchrun, deepspeed"),
        (["launch", "local", "pretrain", "--nodes", "2"], "--nodes: found 2, expected 1 for local"),
        (["run", "--wait"], "--wait: found True, expected --on slurm beside it"),
        (["run", "--launch.nodes", "2", "--launch.processes", "2"], "launch.nodes: found 2, expected 1 on this machine"),
        (["run", "--recipe", "time.yaml"], 'launch.slurm: time: found 43200, expected a time in quotes, such as "12:00:00"'),
        (["run", "--on", "slurm", "--launch.slurm.gpu.time", "1"], "launch.slurm.gpu.time: found '1', expected over 180 s"),
        (["run", "--on", "slurm", "--launch.slurm.gpu.time", "12h"], "launch.slurm: time: found '12h', expected minutes"),
        (["status", "no-such-folder"], "no-such-folder"),
        (["launch", "slurm", "tokenizer"], "sbatch: not on this machine's path"),
    ],
)
def test_mistakes_are_told(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path)
    Path("time.yaml").write_text("launch: {slurm: {gpu: {time: 12:00:00}}}")
    assert main(arguments) in (1, 2)
    assert message in capsys.readouterr().err


def test_status_without_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"run_dir: {tmp_path / 'run'}\n")
    assert main(["status", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list(run_steps(Recipe())))
    assert {line.split()[-1] for line in lines} == {"begun"}


def test_status_of_a_run_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is worked on here is running; what has been stopped with something saved says so."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"run_dir: {tmp_path / 'run'}\n")
    recipe = Recipe(run_dir=str(tmp_path / "run"))

    def states() -> dict[str, tuple[str, str]]:
        assert main(["status", str(path), "--json"]) == 0
        return {one["step"]: (one["state"], one["detail"]) for one in json.loads(capsys.readouterr().out)}

    step = Step("pretrain", "shared", 0)
    with run_lock(tmp_path / "run") as note:
        note(step)
        assert {name for name, state in states().items() if state == ("running", "")} == {str(step)}
        note(Step("tokenizer"))
        assert states()["tokenizer"] == ("running", "")
    assert states()["tokenizer"] == ("not begun", "")
    for number in (8, 16):
        saved = layout_of(recipe).partial_checkpoints("shared", 0) / f"step-{number:08d}"
        saved.mkdir(parents=True)
    (saved.parent / "step-00000008" / MANIFEST_NAME).write_text("{}")  # the other one was not finished
    assert states()[str(step)] == ("stopped", f"8/{recipe.pretrain.steps_per_stage} steps saved")
    with run_lock(tmp_path / "run") as note:
        note(step)
        assert states()[str(step)] == ("running", f"8/{recipe.pretrain.steps_per_stage} steps saved")
        with pytest.raises(RunBusyError, match="another `mates run` is working here"), run_lock(tmp_path / "run"):
            pass


@pytest.mark.parametrize("begin", [run_recipe, lambda recipe: launch_local(recipe, FIRST, resources_of(recipe, FIRST))])
def test_a_step_that_left_nothing_has_failed(begin: Callable[[Recipe], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the deepspeed launcher ends with 0 where a part of it is killed."""
    recipe = make_recipe(tmp_path, methods=["random"])
    build_data(recipe)
    build_step(recipe, replace(FIRST, verb="select"))
    monkeypatch.setattr("mates.launchers.local.run_with_deepspeed", lambda _command, _processes: None)
    with pytest.raises(StepFailedError, match=r"pretrain shared stage 0: its processes ended, and \S+checkpoint is not whole"):
        begin(recipe)

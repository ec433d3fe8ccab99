"""Every way to start ranks on two nodes: they find each other, and do what one machine would have done."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from slurm.cluster import Cluster, Command
from synthetic_run import build_data, build_shared, build_step, make_recipe

from mates.engine.config import FitConfig, LaunchConfig, PretrainConfig, Recipe, ResourcesConfig, ScoreConfig, SlurmConfig
from mates.engine.distributed import World
from mates.engine.influence.fit import fit_stage
from mates.engine.layout import layout_of
from mates.engine.loop import Step
from mates.launchers.local import console_script, run_plain, run_with_deepspeed
from mates.launchers.recipe import write_recipe
from mates.preprocess import artifact

SLURM = SlurmConfig(gpu=ResourcesConfig(gpus_per_node=0))
TWO_NODES = ("--nodes", "2", "--processes-per-node", "1")
STEPS = {
    "pretrain-2": (["pretrain", "--method", "shared", "--stage", "0"], ["--pretrain.zero_stage", "2"], "shared/stage0/checkpoint"),
    "pretrain-3": (["pretrain", "--method", "shared", "--stage", "0"], ["--pretrain.zero_stage", "3"], "shared/stage0/checkpoint"),
    "score": (["score", "--method", "mates", "--stage", "1"], [], "mates/stage1/scores"),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run up to the index of stage 0, and with all that scoring stage 1 needs."""
    made = make_recipe(
        tmp_path_factory.mktemp("launch"),
        fit=FitConfig(hidden_size=32, epochs=1),
        score=ScoreConfig(chunk_size=8),
        pretrain=PretrainConfig(
            precision="fp32", sequence_length=32, batch_size=4, micro_batch_size=2, stages=2, steps_per_stage=25, warmup_steps=5
        ),
        launch=LaunchConfig(processes=2, threads=1, timeout_minutes=1, slurm=SLURM),
    )
    build_shared(made, ["mates"], ["probe"])
    fit_stage(made, World(0, 1, torch.device("cpu")), "mates", 1)
    return made


def prepared(recipe: Recipe, name: str, folder: Path) -> tuple[Path, Path]:
    """A run in which only one step is to be done, and its recipe."""
    run = folder / "run"
    shutil.copytree(recipe.path(), run, dirs_exist_ok=True)
    if name.startswith("pretrain"):
        shutil.rmtree(run / "shared/stage0/checkpoint")
    path = folder / "recipe.yaml"
    write_recipe(path, replace(recipe, run_dir=str(run)))
    return run, path


@pytest.fixture(scope="module")
def expected(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What two ranks of this machine make of each step."""
    found = {}
    for name, (step, more, result) in STEPS.items():
        run, path = prepared(recipe, name, tmp_path_factory.mktemp(name))
        command = [console_script("mates"), step[0], "--recipe", str(path), *step[1:], *more]
        (run_with_deepspeed if step[0] == "pretrain" else run_plain)(command, 2)
        found[name] = artifact.verify(run / result).fingerprint
    return found


WAYS = {
    "srun": ("ctl", "slurm", ["--wait"]),
    "torchrun in srun": ("ctl", "slurm", ["--launcher", "torchrun", "--wait"]),
    "deepspeed in srun": ("ctl", "slurm", ["--launcher", "deepspeed", "--wait"]),
    "deepspeed over pdsh": ("n1", "deepspeed", []),
    "mpirun": ("n1", "mpi", []),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("way", WAYS)
def test_two_nodes_do_what_one_machine_does(
    recipe: Recipe, expected: dict[str, str], cluster: Cluster, tmp_path: Path, way: str, name: str
) -> None:
    host, mode, options = WAYS[way]
    (verb, *step), more, result = STEPS[name]
    run, path = prepared(recipe, name, tmp_path)
    if mode != "slurm":
        hostfile = tmp_path / "hostfile"
        hostfile.write_text("n1 slots=2  # the first\n\nn2:2\n")
        options = [*options, "--hostfile", str(hostfile)]
    done = cluster.run(host, ["mates", "launch", mode, verb, str(path), *step, *more, *TWO_NODES, *options], timeout=200, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{[file.read_text() for file in run.glob('slurm/*.log')]}"
    assert artifact.verify(run / result).fingerprint == expected[name]
    assert not cluster.processes(r"mates|deepspeed|torchrun|srun|mpirun|hydra")
    if verb == "pretrain":
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert {line["ranks"] for line in lines} == {2}


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "deepspeed"])
def test_a_host_name_that_is_a_loopback_alias(
    recipe: Recipe, expected: dict[str, str], make_cluster: Callable[..., Cluster], tmp_path: Path, launcher: str
) -> None:
    run, path = prepared(recipe, "pretrain-2", tmp_path)
    cluster = make_cluster(hosts_alias=True)
    step = ["mates", "launch", "slurm", "pretrain", str(path), *TWO_NODES, "--launcher", launcher, "--wait"]
    done = cluster.run("ctl", step, timeout=200, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert artifact.verify(run / "shared/stage0/checkpoint").fingerprint == expected["pretrain-2"]


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "deepspeed"])
def test_several_ranks_on_each_node(recipe: Recipe, cluster: Cluster, tmp_path: Path, launcher: str) -> None:
    run, path = prepared(recipe, "pretrain-2", tmp_path)
    options = ["--nodes", "2", "--processes-per-node", "2", "--launcher", launcher, "--pretrain.micro_batch_size", "1", "--wait"]
    done = cluster.run("ctl", ["mates", "launch", "slurm", "pretrain", str(path), *options], timeout=200, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{[file.read_text() for file in run.glob('slurm/*.log')]}"
    (line, *_) = (run / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["ranks"] == 4


def test_a_stop_inside_an_allocation_is_handed_on(cluster: Cluster, tmp_path: Path) -> None:
    run, path = long_run(tmp_path)
    step = [
        "mates",
        "launch",
        "slurm",
        "pretrain",
        str(path),
        "--method",
        "shared",
        "--stage",
        "0",
        "--pretrain.log_every",
        "1",
        *TWO_NODES,
    ]
    with cluster.start("ctl", ["salloc", "--nodes=2", "--ntasks-per-node=2", *step]) as launched:
        wait_for_steps(run, launched)
        (process,) = [item for item in cluster.processes("mates launch slurm pretrain") if "salloc" not in item.command]
        os.kill(process.pid, signal.SIGTERM)
        output, errors = launched.communicate(timeout=60)
    assert launched.returncode == 75, f"{output}\n{errors}"
    assert list(run.glob("shared/stage0/partial/step-*/manifest.json"))
    assert not (run / "shared/stage0/checkpoint/manifest.json").exists()


def test_in_an_allocation_a_step_runs_at_once(recipe: Recipe, expected: dict[str, str], cluster: Cluster, tmp_path: Path) -> None:
    run, path = prepared(recipe, "score", tmp_path)
    step = ["mates", "launch", "slurm", "score", str(path), "--method", "mates", "--stage", "1", *TWO_NODES]
    done = cluster.run("ctl", ["salloc", "--nodes=2", "--ntasks-per-node=1", *step], timeout=200, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert artifact.verify(run / "mates/stage1/scores").fingerprint == expected["score"]
    assert len(cluster.jobs()) == 1


@pytest.mark.parametrize("mode", ["slurm", "mpi"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_on_two_nodes_write_the_corpus_of_one_process(
    make_cluster: Callable[..., Cluster], tmp_path: Path, mode: str, ranks: int
) -> None:
    recipe = make_recipe(tmp_path / "alone", launch=LaunchConfig(slurm=SLURM))
    build_data(recipe)
    other = replace(recipe, run_dir=str(tmp_path / "ranks"))
    shutil.copytree(layout_of(recipe).tokenizer, layout_of(other).tokenizer)
    write_recipe(tmp_path / "recipe.yaml", other)
    options = ["--wait"]
    if mode == "mpi":
        (tmp_path / "hostfile").write_text("n1\nn2\n")
        options = ["--hostfile", str(tmp_path / "hostfile")]
    cluster = make_cluster()
    command = ["mates", "launch", mode, "preprocess", str(tmp_path / "recipe.yaml"), "--nodes", "2"]
    host = "n1" if mode == "mpi" else "ctl"
    done = cluster.run(host, [*command, "--processes-per-node", str(ranks // 2), *options], timeout=200, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    names = sorted(str(path.relative_to(layout_of(recipe).data)) for path in layout_of(recipe).data.glob("corpus/**/*") if path.is_file())
    assert len(names) > 8
    for name in names:
        if not name.endswith("manifest.json"):  # it says how long the work took
            assert (layout_of(other).data / name).read_bytes() == (layout_of(recipe).data / name).read_bytes(), name


@pytest.mark.timeout(2_000)
def test_a_whole_run_is_the_local_one(cluster: Cluster, tmp_path: Path) -> None:
    """Preprocess, n-gram models and selection on one node each, all others on both; two methods side by side."""
    launch = LaunchConfig(processes=2, threads=1, slurm=SLURM)
    pretrain = PretrainConfig(
        precision="fp32", sequence_length=32, batch_size=4, micro_batch_size=2, stages=2, steps_per_stage=10, warmup_steps=5
    )
    recipe = make_recipe(tmp_path, fit=FitConfig(model="ngram"), pretrain=pretrain, launch=launch)
    write_recipe(tmp_path / "local.yaml", recipe)
    write_recipe(tmp_path / "slurm.yaml", replace(recipe, launch=replace(launch, nodes=2), run_dir=str(tmp_path / "slurm")))
    alone = cluster.run("ctl", ["mates", "run", str(tmp_path / "local.yaml")], timeout=800)
    assert "run: done" in alone.stdout
    done = cluster.run("ctl", ["mates", "run", str(tmp_path / "slurm.yaml"), "--on", "slurm", "--wait"], timeout=800, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert (tmp_path / "slurm/report.html").exists()
    stage1 = [f"{method}/stage1/{kind}" for method in ("random", "mates") for kind in ("index", "checkpoint")]
    for result in ("shared/stage0/checkpoint", *stage1):
        mine, theirs = (artifact.verify(folder / result).fingerprint for folder in (tmp_path / "slurm", recipe.path()))
        assert mine == theirs, result
    told = json.loads(cluster.run("ctl", ["mates", "status", str(tmp_path / "slurm"), "--json"]).stdout)
    assert {item["state"] for item in told} == {"done"}
    assert len(told) == 16
    again = cluster.run("ctl", ["mates", "run", str(tmp_path / "slurm.yaml"), "--on", "slurm", "--wait"], timeout=300)
    assert "all steps are done" in again.stdout
    assert "submitted" not in again.stdout


@pytest.mark.parametrize("mode", ["deepspeed", "mpi"])
def test_a_request_to_stop_reaches_ranks_on_other_machines(cluster: Cluster, tmp_path: Path, mode: str) -> None:
    run, path = long_run(tmp_path)
    (tmp_path / "hostfile").write_text("n1\nn2\n")
    step = ["pretrain", str(path), "--method", "shared", "--stage", "0", "--pretrain.log_every", "1"]
    with cluster.start("n1", ["mates", "launch", mode, *step, *TWO_NODES, "--hostfile", str(tmp_path / "hostfile")]) as launched:
        wait_for_steps(run, launched)
        launched.send_signal(signal.SIGTERM)
        output, errors = launched.communicate(timeout=60)
    assert launched.returncode == 75, f"{output}\n{errors}"
    assert not cluster.processes("mates pretrain")
    assert list(run.glob("shared/stage0/partial/step-*/manifest.json"))
    assert not (run / "shared/stage0/checkpoint/manifest.json").exists()


def long_run(folder: Path) -> tuple[Path, Path]:
    """A run up to the index of a stage of many steps, and its recipe."""
    pretrain = PretrainConfig(
        precision="fp32", sequence_length=32, batch_size=4, micro_batch_size=2, stages=1, steps_per_stage=700, warmup_steps=5
    )
    long = make_recipe(folder, pretrain=pretrain, launch=LaunchConfig(processes=2, threads=1, slurm=SLURM))
    build_data(long)
    build_step(long, Step("select", "shared", 0))
    write_recipe(folder / "recipe.yaml", long)
    return long.path(), folder / "recipe.yaml"


def wait_for_steps(run: Path, launched: Command) -> None:
    """Wait for the first steps."""
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists():
        assert launched.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)

"""Faults in the middle of training under SLURM: the step ends in time, goes back to the queue by itself and comes to the same weights."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from slurm.cluster import Cluster
from synthetic_run import build_data, build_step, make_recipe

from mates.engine.config import LaunchConfig, PretrainConfig, Recipe, ResourcesConfig, SlurmConfig
from mates.engine.loop import Step
from mates.engine.pretrain.vigilance import STOPPED
from mates.launchers.recipe import write_recipe
from mates.launchers.slurm import Submitted, attempts_of, submitted_jobs
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError

STEPS, EVERY = 100, 5
SILENCE = 6.0
"""Seconds of launch.timeout_minutes."""
BOUND = 120.0
"""Seconds in which each change must come: a job that a fault has hit ends, a job in the queue begins and is done."""
RANK = r"^\S*python\S* \S*/mates pretrain"
LEFT = r"/mates \w+ --recipe|^(\S*/)?srun|^slurmstepd"
"""What runs on a node while a job does."""
PRETRAIN = Step("pretrain", "shared", 0)
HIT = 3 * EVERY
"""The step at which something happens."""
HOOK = """
import os, signal
if "SLURM_STEP_ID" in os.environ and os.environ["SLURM_PROCID"] == "1" and os.environ.get("SLURM_RESTART_COUNT", "0") in {attempts}:
    from mates.engine.pretrain.trainer import Trainer

    class Hooked:
        steps, step = 0, Trainer.step

    def step(self, *arguments, **options):
        Hooked.steps += 1
        if Hooked.steps == {hit}:
            {code}
        return Hooked.step(self, *arguments, **options)

    Trainer.step = step
"""
RAISES = "raise ZeroDivisionError('made up')"
Act = Callable[["Training"], None]


@pytest.fixture(scope="session")
def times() -> Iterator[dict[str, dict[str, float]]]:
    """Seconds by fault: until all ranks had ended, until the job was in the queue again, and until it was done."""
    found: dict[str, dict[str, float]] = {}
    yield found
    print(json.dumps(found, indent=2))
    if path := os.environ.get("MATES_FAULT_TIMES"):
        Path(path).write_text(json.dumps(found, indent=2))


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Training of two ranks on two nodes; its data and its selection are there."""
    folder = tmp_path_factory.mktemp("faults")
    made = make_recipe(
        folder,
        data_dir=str(folder / "data"),
        methods=["random"],
        pretrain=PretrainConfig(
            precision="fp32",
            sequence_length=32,
            batch_size=4,
            micro_batch_size=2,
            stages=1,
            steps_per_stage=STEPS,
            warmup_steps=4,
            checkpoint_every=EVERY,
            log_every=1,
        ),
        launch=LaunchConfig(
            processes=2, nodes=2, threads=1, timeout_minutes=SILENCE / 60, slurm=SlurmConfig(gpu=ResourcesConfig(gpus_per_node=0))
        ),
    )
    build_data(made)
    build_step(made, replace(PRETRAIN, verb="select"))
    return made


class Training:
    """A job that trains, in a run folder of its own."""

    def __init__(self, cluster: Cluster, recipe: Recipe, folder: Path) -> None:
        self.cluster, self.run_dir = cluster, folder / "run"
        shutil.copytree(recipe.path(), self.run_dir)
        self.recipe = folder / "recipe.yaml"
        write_recipe(self.recipe, replace(recipe, run_dir=str(self.run_dir)))

    def mates(self, *words: str, env: Mapping[str, str] | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.cluster.run("ctl", ["mates", *words], env=env, check=check)

    def hook(self, code: str, *attempts: str) -> dict[str, str]:
        """An environment in which rank 1 runs some code before a step of these attempts, which are counted from 0."""
        folder = self.recipe.with_name("hook")
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(HOOK.format(attempts=attempts, hit=HIT, code=code))
        return {"PYTHONPATH": str(folder)}

    def begin(self, env: Mapping[str, str] | None = None) -> None:
        """Submit the job."""
        self.mates("launch", "slurm", "pretrain", str(self.recipe), env=env)

    @property
    def job(self) -> Submitted:
        return submitted_jobs(self.run_dir)["pretrain-shared-0"]

    def state(self) -> str:
        return self.cluster.job(self.job.job)["JobState"]

    def wait(self, is_time: Callable[[], bool], what: str) -> float:
        """Poll, and return the seconds that it took."""
        begun = time.monotonic()
        while not is_time():
            assert time.monotonic() - begun < BOUND, f"{what}: {self.cluster.job(self.job.job)}\n{self.log()}\n{self.cluster.logs()}"
            time.sleep(0.05)
        return time.monotonic() - begun

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: bool(done := self.logged()) and done[-1] >= step, f"step {step}")

    def wait_for_state(self, *states: str) -> float:
        return self.wait(lambda: self.state() in states, f"to be {states}")

    def log(self) -> str:
        return self.job.log.read_text() if self.job.log.exists() else ""

    def ranks(self, node: str = "") -> list[int]:
        return [process.pid for process in self.cluster.processes(RANK) if process.host.startswith(node)]

    def events(self) -> list[tuple[str, str]]:
        return [(item["event"], item["detail"]) for item in attempts_of(self.job) if item["event"] != "begun"]

    def logged(self) -> list[int]:
        """Steps that were logged, in order; a line may be half written."""
        path = self.run_dir / "metrics.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().split("\n")[:-1]] if path.exists() else []

    def saved(self) -> int:
        """The step of the newest checkpoint that is whole; 0 where there is none."""
        found = [0]
        for folder in (self.run_dir / "shared/stage0/partial").glob("step-*"):
            try:
                found.append(int(artifact.verify(folder).info["stage_step"]))
            except ArtifactError:
                continue
        return max(found)

    def fingerprint(self) -> str:
        """Of weights, moments and losses."""
        return artifact.verify(self.run_dir / "shared/stage0/checkpoint", "checkpoint").fingerprint


@pytest.fixture(scope="session")
def undisturbed(can_cluster: None, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Fingerprint of what the training comes to."""
    with Cluster() as cluster:
        training = Training(cluster, recipe, tmp_path_factory.mktemp("undisturbed"))
        training.begin()
        training.wait_for_state("COMPLETED")
    assert training.logged() == list(range(1, STEPS + 1))
    return training.fingerprint()


@pytest.fixture
def training(cluster: Cluster, recipe: Recipe, tmp_path: Path) -> Training:
    return Training(cluster, recipe, tmp_path)


# --- faults --------------------------------------------------------------------------------------------------------


def signalled(node: str, number: signal.Signals) -> Act:
    """A signal to the rank of a node."""

    def act(training: Training) -> None:
        (pid,) = training.ranks(node)
        os.kill(pid, number)

    return act


def asked(*command: str) -> Act:
    """A command of SLURM about the job."""

    def act(training: Training) -> None:
        training.cluster.run("ctl", [*command, str(training.job.job)])

    return act


class Fault(NamedTuple):
    """What happens, and what is to come of it."""

    exit_code: str | None
    """Of the ranks; None where the script that would note it is lost too."""
    act: Act = lambda training: None
    heal: Act = lambda training: None
    """What ends the fault when the job is in the queue again."""
    code: str = ""
    """What rank 1 does by itself in the first attempt."""


def crash(node: str, exit_code: str | None) -> Fault:
    return Fault(exit_code, lambda training: training.cluster.kill_node(node), lambda training: training.cluster.start_node(node))


def cut(node: str, exit_code: str | None) -> Fault:
    return Fault(exit_code, lambda training: training.cluster.network(node, False), lambda training: training.cluster.network(node, True))


FAULTS = {
    "SIGKILL of rank 0": Fault("137", signalled("n1", signal.SIGKILL)),
    "SIGKILL of rank 1": Fault("137", signalled("n2", signal.SIGKILL)),
    "SIGSTOP of rank 0": Fault("1", signalled("n1", signal.SIGSTOP)),
    "SIGSTOP of rank 1": Fault("1", signalled("n2", signal.SIGSTOP)),
    "exception on rank 1": Fault("1", code=RAISES),
    "early exit of rank 1": Fault("1", code="os._exit(0)"),
    "crash of node 1": crash("n1", None),  # where the script runs
    "crash of node 2": crash("n2", "1"),
    "cut of node 1": cut("n1", None),
    "cut of node 2": cut("n2", "1"),
    "requeue": Fault(str(STOPPED), asked("scontrol", "requeue")),
    "time limit": Fault(str(STOPPED), asked("scancel", "--batch", "--signal=USR2")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_training_goes_on_after(fault: str, training: Training, undisturbed: str, times: dict[str, dict[str, float]]) -> None:
    exit_code, act, heal, code = FAULTS[fault]
    training.begin(training.hook(code, "0") if code else {})
    training.wait_for_step(HIT - 1)
    act(training)
    begun = time.monotonic()
    training.wait(lambda: not training.ranks(), "no rank left")
    seconds = times[fault] = {"ranks ended": time.monotonic() - begun}
    training.wait_for_state("PENDING")
    seconds["in the queue"] = time.monotonic() - begun
    before, saved = training.logged(), training.saved()
    assert exit_code in (None, *(detail for _, detail in training.events())), training.events()
    if exit_code == str(STOPPED):
        assert saved == before[-1], "a step was lost that could be saved"
    heal(training)
    training.wait_for_state("COMPLETED", "FAILED", "CANCELLED")
    seconds["done"] = time.monotonic() - begun
    assert training.state() == "COMPLETED", training.log()
    assert training.logged() == [*before, *range(saved + 1, STEPS + 1)], "a step was repeated or lost"
    assert training.fingerprint() == undisturbed
    assert training.cluster.job(training.job.job)["Restarts"] == "1"
    training.wait(lambda: not training.cluster.processes(LEFT), "nothing left")


# --- jobs that end for good ----------------------------------------------------------------------------------------

CHAIN = ["pretrain shared stage 0", "evaluate shared stage 0", "report"]
WAITS = "signal.pause()"  # for the signal that asks it to stop; then the step is taken


def states(training: Training) -> dict[str, str]:
    """What `mates status` says of the steps that had something to do."""
    shown = json.loads(training.mates("status", str(training.run_dir), "--json").stdout)
    return {item["step"]: item["state"] for item in shown if item["step"] in CHAIN}


def test_a_step_that_fails_for_good_is_told_and_goes_on_later(cluster: Cluster, recipe: Recipe, undisturbed: str, tmp_path: Path) -> None:
    slurm = replace(recipe.launch.slurm, retries=0)
    training = Training(cluster, replace(recipe, launch=replace(recipe.launch, slurm=slurm)), tmp_path)
    command = ["run", str(training.recipe), "--on", "slurm", "--wait"]
    failed = training.mates(*command, env=training.hook(RAISES, "0"), check=False)
    assert failed.returncode == 1
    assert states(training) == dict(zip(CHAIN, ["failed", "cancelled", "cancelled"], strict=True))
    for said in (failed.stderr, training.mates("status", str(training.run_dir)).stdout):
        assert re.search(
            r"^pretrain shared stage 0 +failed +job 1 +failed; attempts: 1, the last with exit code \d+ at ", said, re.MULTILINE
        )
        assert "ZeroDivisionError: made up" in said
    assert set(cluster.jobs().values()) == {"FAILED", "CANCELLED"}
    done = training.mates(*command, check=False)
    assert done.returncode == 0, done.stderr
    assert states(training) == dict.fromkeys(CHAIN, "done")
    assert training.fingerprint() == undisturbed


@pytest.mark.parametrize("way", ["mates cancel", "scancel"])
def test_what_is_cancelled_stays_so_until_it_is_run_again(
    way: str, cluster: Cluster, recipe: Recipe, undisturbed: str, tmp_path: Path
) -> None:
    training = Training(cluster, replace(recipe, launch=replace(recipe.launch, timeout_minutes=5)), tmp_path)  # rank 0 waits for rank 1
    command = ["run", str(training.recipe), "--on", "slurm"]
    training.mates(*command, env=training.hook(WAITS, "0"))
    for refused in (command, ["run", str(training.recipe), "--launch.nodes", "1"], ["launch", "slurm", "pretrain", str(training.recipe)]):
        done = training.mates(*refused, check=False)
        assert done.returncode == 1
        assert "in SLURM's queue" in done.stderr
    training.wait_for_step(HIT - 1)
    assert states(training) == dict(zip(CHAIN, ["running", "waiting", "waiting"], strict=True))
    if way == "mates cancel":
        assert "jobs cancelled: 3" in training.mates("cancel", str(training.run_dir)).stdout
    else:
        training.cluster.run("ctl", ["scancel", str(training.job.job)])
    training.wait(lambda: set(training.cluster.jobs().values()) == {"CANCELLED"}, "all cancelled")
    training.wait(lambda: not training.cluster.processes(LEFT), "nothing left")  # nor a script that could send the job back
    assert set(training.cluster.jobs().values()) == {"CANCELLED"}
    assert states(training) == dict.fromkeys(CHAIN, "cancelled")
    assert "no jobs of this run" in training.mates("cancel", str(training.run_dir)).stdout
    done = training.mates(*command, "--wait", check=False)
    assert done.returncode == 0, done.stderr
    assert training.logged() == list(range(1, STEPS + 1)), "a step was repeated or lost"
    assert training.fingerprint() == undisturbed


# --- mistakes ------------------------------------------------------------------------------------------------------


class Mistake(NamedTuple):
    """A command that must fail, the machines of its hostfile, and what it must say."""

    command: tuple[str, ...]
    hosts: str
    said: str


ON_BOTH = ("srun", "--nodes=2", "env")
MISTAKES = {
    "separate jobs": Mistake((*ON_BOTH, "RANK=0", "WORLD_SIZE=1", "mates", "pretrain"), "", "srun promised 2 ranks, this process finds 1"),
    "other ranks": Mistake(
        (*ON_BOTH, "MATES_WORLD_SIZE=4", "mates", "pretrain"), "", "the launcher promised 4 ranks, this process finds 2"
    ),
    "no GPUs": Mistake(("mates", "launch", "slurm", "pretrain", "--gpus-per-node=2"), "", "set launch.slurm.gpu.gpus_per_node, to 0 where"),
    "unknown host": Mistake(("mates", "launch", "deepspeed", "pretrain"), "n1\nn9\n", "no such machine: n9 ("),
    "no ssh": Mistake(
        ("mates", "launch", "deepspeed", "pretrain"), "n1\nn2\n", "ssh without a password is needed to start ranks, and fails: n1: "
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told(mistake: str, make_cluster: Callable[..., Cluster], recipe: Recipe, tmp_path: Path) -> None:
    cluster = make_cluster(ssh=mistake != "no ssh")
    training = Training(cluster, recipe, tmp_path)
    command, hosts, said = MISTAKES[mistake]
    (tmp_path / "hosts").write_text(hosts)
    more = ["--hostfile", str(tmp_path / "hosts")] if hosts else []
    done = cluster.run("ctl", [*command, "--recipe", str(training.recipe), *more], check=False, timeout=BOUND)
    assert done.returncode == 1, done.stderr
    assert said in done.stderr
    assert not training.logged()

"""A run that is asked to stop saves, ends with the exit code 75 and goes on where it was; one that meets a bad step saves and says so."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
from training import STEPS, command, fingerprint, finish, logged, run_undisturbed, session_folder, write_recipe

from mates.preprocess import artifact


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(session_folder(tmp_path_factory))


@pytest.fixture(scope="module")
def undisturbed(recipe: Path) -> Path:
    return run_undisturbed(recipe)


def asked_to_stop(recipe: Path, run_dir: Path, step: int, number: signal.Signals, to: str, *more: str) -> subprocess.CompletedProcess[str]:
    """A run that gets a signal after a step, and after one of its own: before that it may not listen yet."""
    before = len(logged(run_dir))
    with subprocess.Popen(
        command(recipe, run_dir, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while process.poll() is None and (not (done := logged(run_dir)[before:]) or done[-1] < step):
            time.sleep(0.005)
        if to == "group":
            os.killpg(process.pid, number)  # what a scheduler does
        else:
            process.send_signal(number)
        output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def stopped_and_continued(recipe: Path, run_dir: Path, moments: Sequence[tuple[int, signal.Signals, str]], steps: int = STEPS) -> None:
    more = ("--pretrain.steps_per_stage", str(steps))
    for step, number, to in moments:
        done = asked_to_stop(recipe, run_dir, step, number, to, *more)
        assert done.returncode == 75, done.stderr
        assert "stopped, as asked; the same command continues" in done.stderr
        last = logged(run_dir)[-1]
        (whole,) = [path for path in (run_dir / "shared/stage0/partial").iterdir() if path.name == f"step-{last:08d}"]
        artifact.verify(whole)
    assert finish(recipe, run_dir, *more).returncode == 0
    assert logged(run_dir) == list(range(1, steps + 1)), "a step was repeated or left out"


def test_signals_stop_a_run_that_then_continues(recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    moments = [(5, signal.SIGTERM, "run"), (30, signal.SIGUSR2, "group")]
    stopped_and_continued(recipe, tmp_path / "run", moments)
    assert fingerprint(tmp_path / "run") == fingerprint(undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_goes_on_with_other_processes_and_another_zero_stage(recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    """2 ranks, then 1, then 2; ZeRO-2, then 3. The samples of each step are the same, and the losses but for the order of sums."""
    run_dir = tmp_path / "run"
    assert asked_to_stop(recipe, run_dir, 10, signal.SIGUSR2, "run").returncode == 75
    assert asked_to_stop(recipe, run_dir, 30, signal.SIGUSR2, "run", "--launch.processes", "1").returncode == 75
    done = finish(recipe, run_dir, "--pretrain.zero_stage", "3")
    assert done.returncode == 0, done.stderr
    assert "saved by 1 ranks with ZeRO-2; converting for 2 with ZeRO-3" in done.stdout
    assert logged(run_dir) == list(range(1, STEPS + 1))
    losses, expected = (np.load(folder / "shared/stage0/checkpoint/losses.npy") for folder in (run_dir, undisturbed))
    assert losses == pytest.approx(expected, rel=1e-3)
    assert not list(run_dir.glob("**/.*universal*"))


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_twenty_stops_change_nothing(recipe: Path, tmp_path: Path) -> None:
    many = 6 * STEPS  # a signal takes some steps to arrive, and twenty of them must find a run that is not done
    assert finish(recipe, tmp_path / "undisturbed", "--pretrain.steps_per_stage", str(many)).returncode == 0
    steps = sorted(random.Random(0).sample(range(1, 4 * STEPS), 20))
    moments = [(step, (signal.SIGUSR2, signal.SIGTERM)[number % 2], "run") for number, step in enumerate(steps)]
    stopped_and_continued(recipe, tmp_path / "run", moments, many)
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "undisturbed")


def test_a_signal_during_the_data_steps_ends_the_run_at_once(recipe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with subprocess.Popen(
        [*command(recipe, run_dir), "--data_dir", str(tmp_path / "data")], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        while not (tmp_path / "data").exists():
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
    assert process.returncode == 75
    assert "stopped, as asked" in errors


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_falls_silent_is_named(recipe: Path, tmp_path: Path, rank: int) -> None:
    run_dir, limit = tmp_path / "run", 6
    command_line = command(recipe, run_dir, "--launch.timeout_minutes", str(limit / 60), "--pretrain.steps_per_stage", "1000")
    with subprocess.Popen(command_line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not logged(run_dir):
            assert process.poll() is None
            time.sleep(0.01)
        (pid,) = [child.pid for child in psutil.Process(process.pid).children(recursive=True) if child.environ().get("RANK") == str(rank)]
        os.kill(pid, signal.SIGSTOP)
        _, errors = process.communicate()
    assert f"rank {rank} ({socket.gethostname()}, process {pid}): not heard of for {limit} s" in errors
    assert process.returncode == 1
    assert not psutil.pid_exists(pid)


def test_a_bad_step_stops_training_and_can_be_passed_over(recipe: Path, tmp_path: Path) -> None:
    """Without learning losses only go up and down, and with so narrow a limit some are spikes, from the 33rd step on."""
    run_dir, narrow = tmp_path / "run", ("--pretrain.lr", "1e-9", "--pretrain.spike_sd", "0.3")
    done = finish(recipe, run_dir, *narrow)
    assert done.returncode == 1
    assert done.stderr.count("nats would be believed; weights are those after step") == 1
    bad = int(done.stderr.split("pretrain shared stage 0: step ")[1].split(":")[0])
    assert 32 < bad <= STEPS
    artifact.verify(run_dir / f"shared/stage0/partial/step-{bad - 1:08d}")
    skipping = finish(recipe, run_dir, *narrow, "--pretrain.on_bad_step", "skip")
    assert skipping.returncode == 0, skipping.stderr
    info = artifact.load(run_dir / "shared/stage0/checkpoint").info
    assert info["skipped"][0] == bad
    assert info["step"] == STEPS == info["updates"] + len(info["skipped"])
    assert info["optimizer"]["t"] == info["updates"]
    assert f"step {bad} is passed over" in skipping.stdout

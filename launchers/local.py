"""Starting the ranks of a step on this machine: through the deepspeed launcher, or as plain processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mates.engine.distributed import PARENT, PROMISED_WORLD_SIZE, free_port, process_identity


class StepFailedError(RuntimeError):
    """A step's processes ended with an error. Their own message stands above."""


def console_script(name: str) -> str:
    """Path of a command of this environment."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise StepFailedError(f"the command {name!r} is not installed beside {sys.executable}")
    return found


def step_environment(processes: int) -> dict[str, str]:
    """Environment of a step's processes."""
    identity = process_identity(os.getpid())
    environment = dict(os.environ) | {
        PROMISED_WORLD_SIZE: str(processes),
        "PYTHONSAFEPATH": "1",  # our kernels/ folder must not stand in for Hugging Face's package of that name
        "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore"),
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu"),
        # threads that spin while they wait make a step many times slower as soon as anything else runs on the machine
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "TRANSFORMERS_VERBOSITY": os.environ.get("TRANSFORMERS_VERBOSITY", "error"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # the environment's own ninja first: two versions on the path make DeepSpeed rebuild its operators at every start
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    if identity:
        environment[PARENT] = identity
    return environment


def run_with_deepspeed(command: Sequence[str], processes: int) -> None:
    """Run ``command`` as ``processes`` ranks of the deepspeed launcher. StepFailedError where one fails."""
    launcher = [
        console_script("deepspeed"),
        "--num_gpus",
        str(processes),
        "--master_port",
        str(free_port()),
        "--quiet",
    ]
    _wait([_start([*launcher, "--no_python", "--no_local_rank", *command], step_environment(processes))])


def run_plain(command: Sequence[str], processes: int) -> None:
    """Run ``command`` as ``processes`` ranks that find each other on this machine. StepFailedError where one fails."""
    environment = step_environment(processes) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in range(processes):
        own = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
        }
        ranks.append(_start(command, environment | own))
    _wait(ranks)


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(list(command), env=dict(environment))


def _wait(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Wait for all; when one fails, or this process is interrupted, end the others."""
    try:
        running = list(ranks)
        while running:
            for rank in list(running):
                code = rank.poll()
                if code is None:
                    continue
                running.remove(rank)
                if code != 0:
                    raise StepFailedError(_describe(rank, code))
            time.sleep(0.05)
    finally:
        _end(ranks)


def _describe(rank: subprocess.Popen[bytes], code: int) -> str:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"process {rank.pid} {how}"


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    alive = [rank for rank in ranks if rank.poll() is None]
    for rank in alive:
        rank.terminate()
    deadline = time.monotonic() + 10
    for rank in alive:
        try:
            rank.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()

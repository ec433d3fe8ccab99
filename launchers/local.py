"""Starting the ranks of a step on this machine: through the deepspeed launcher, as plain processes, or by any launcher's command."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import psutil
import torch

from mates.engine.config import Recipe
from mates.engine.distributed import PARENT, process_identity
from mates.engine.layout import layout_of
from mates.engine.pretrain.vigilance import STOP_SIGNALS, StopRequestedError
from mates.engine.ranks import PROMISED_WORLD_SIZE, free_port
from mates.preprocess.artifact import MANIFEST_NAME

if TYPE_CHECKING:
    from mates.engine.loop import Step


class StopForwarding:
    """What SIGTERM and SIGUSR2 do to the process that started the ranks: they are passed on, as SIGUSR2, until the ranks have ended."""

    def __init__(self) -> None:
        self.is_asked = self.is_waiting = False

    def listen(self) -> None:
        """Take the signals from now on. Of the main thread only."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True
        if not self.is_waiting:
            self.stop()

    def stop(self) -> None:
        """StopRequestedError where somebody asked."""
        if self.is_asked:
            raise StopRequestedError("stopped, as asked; the same command continues where this one stopped")


STOPPING = StopForwarding()
KEEP_MEMORY = ":".join(f"glibc.malloc.{name}" for name in ("mmap_max=0", "trim_threshold=17179869184", "top_pad=67108864", "hugetlb=1"))
"""For ranks on CPUs: freed memory is kept for the next tensor, in large pages. By default glibc maps every tensor of more than 32 MiB anew,
and its pages are faulted in again: with 32 × 128 tokens and a vocabulary of 4,096 that was a quarter of a training step."""
RANK_VARIABLES = {"RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"}
"""Which of them a process has only where it is a rank."""


class StepFailedError(RuntimeError):
    """A step's processes ended with an error. Their own message stands above."""


def console_script(name: str) -> str:
    """Path of a command of this environment."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise StepFailedError(f"the command {name!r} is not installed beside {sys.executable}")
    return found


def step_environment(processes: int, *, follows: bool = True) -> dict[str, str]:
    """Environment of a step's processes; ``follows``: they are on this machine and end when this process is gone."""
    identity = process_identity(os.getpid()) if follows else None
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
    if environment["DS_ACCELERATOR"] == "cpu":
        environment.setdefault("GLIBC_TUNABLES", KEEP_MEMORY)
    if identity:
        environment[PARENT] = identity
    return environment


def run_with_deepspeed(command: Sequence[str], processes: int) -> None:
    """Run ``command`` as ``processes`` ranks of the deepspeed launcher. StepFailedError where one fails."""
    if os.environ.get("CUDA_VISIBLE_DEVICES"):  # given a number of GPUs, the launcher takes the machine's first ones instead
        run_plain(command, processes)
        return
    launcher = [
        console_script("deepspeed"),
        "--hostfile",
        os.devnull,  # a container's /job/hostfile would send the ranks to other machines
        "--num_gpus",
        str(processes),
        "--master_port",
        str(free_port()),
        "--quiet",
    ]
    _wait([_start([*launcher, "--no_python", "--no_local_rank", *command], step_environment(processes))])


def run_ranks(recipe: Recipe, step: Step, command: Sequence[str], processes: int) -> None:
    """Run a step's ``command`` as ``processes`` ranks on this machine.

    Raises:
        StepFailedError: a rank failed, or they ended and a stage's artifact is not there: the deepspeed launcher is silent about a part of
            itself that was killed.
    """
    if step.verb == "pretrain":
        run_with_deepspeed(command, processes)
    else:
        run_plain(command, processes)
    if step.method is not None and step.stage is not None:
        artifact = layout_of(recipe).of_step(step.verb, step.method, step.stage)
        if not (artifact / MANIFEST_NAME).is_file():
            raise StepFailedError(f"{step}: its processes ended, and {artifact} is not whole; the same command continues")


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


def run_command(
    command: Sequence[str], environment: Mapping[str, str], ask: Callable[[], None] | None = None, *, handles_stops: bool = False
) -> None:
    """Run a launcher's command and wait for it.

    Args:
        command, environment: of the launcher.
        ask: hands a request to stop to ranks on other machines.
        handles_stops: the command itself hands SIGUSR2 on to its ranks.

    Raises:
        StepFailedError: it fails. StopRequestedError: it has ended since somebody asked.
    """
    if not handles_stops:
        _wait([_start(command, environment)], ask)
        return
    started = subprocess.Popen(list(command), env=dict(environment))
    _wait([started], partial(started.send_signal, signal.SIGUSR2))


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    # launchers between this process and the ranks would die of a signal that is sent to the whole process group
    return subprocess.Popen(list(command), env=dict(environment), preexec_fn=_ignore_stops)


def _ignore_stops() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _wait(ranks: list[subprocess.Popen[bytes]], ask: Callable[[], None] | None = None) -> None:
    """Wait for all; when one fails, or this process is interrupted, end the others.

    Raises:
        StepFailedError: one failed. StopRequestedError: they have ended before their work, since somebody asked.
    """
    STOPPING.is_waiting = True
    last_asked = -math.inf
    is_done = True
    try:
        running = list(ranks)
        while running:
            if STOPPING.is_asked and time.monotonic() - last_asked >= 1:  # again, for a rank that was only starting
                last_asked = time.monotonic()
                _ask_ranks()
                if ask is not None:
                    ask()
            for rank in list(running):
                code = rank.poll()
                if code is None:
                    continue
                running.remove(rank)
                is_done &= code == 0
                if code != 0 and not STOPPING.is_asked:
                    raise StepFailedError(_describe(rank, code))
            time.sleep(0.05)
    finally:
        STOPPING.is_waiting = False
        _end(ranks)
    if is_done:  # asked too late: the step is whole, and the next one is not begun
        return
    STOPPING.stop()


def _ask_ranks() -> None:
    """SIGUSR2 to all ranks below this process; not to what ranks have started, which has their variables too."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            parent = process.parent()
            if RANK_VARIABLES & process.environ().keys() and not (parent and RANK_VARIABLES & parent.environ().keys()):
                process.send_signal(signal.SIGUSR2)


def _describe(rank: subprocess.Popen[bytes], code: int) -> str:
    if code < 0:
        return f"process {rank.pid} was killed by {signal.Signals(-code).name}"
    if 256 - code in (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS):  # how the deepspeed launcher says it of a rank
        return f"a rank was killed by {signal.Signals(256 - code).name} (its launcher, process {rank.pid}, ended with exit code {code})"
    return f"process {rank.pid} ended with exit code {code}"


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

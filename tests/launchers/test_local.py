"""Processes on one machine: found ranks, failures, and not outliving the run that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mates.engine.distributed import PARENT, process_identity
from mates.engine.ranks import PROMISED_WORLD_SIZE
from mates.launchers.local import StepFailedError, console_script, run_plain, run_with_deepspeed

SUM_OF_RANKS = """
import sys, torch
from pathlib import Path
from mates.engine import distributed
world = distributed.join(timeout_minutes=1, threads=1)
total = world.total(torch.tensor([float(world.rank + 1)])).item()
agreed = world.same(lambda: f"from rank {world.rank}")
Path(sys.argv[1], str(world.rank)).write_text(f"{world.size} {total} {agreed}")
distributed.leave()
"""


def test_plain_ranks_find_each_other(tmp_path: Path) -> None:
    run_plain([sys.executable, "-P", "-c", SUM_OF_RANKS, str(tmp_path)], processes=3)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys("012", "3 6.0 from rank 0")


def test_deepspeed_ranks_find_each_other(tmp_path: Path) -> None:
    run_with_deepspeed([sys.executable, "-P", "-c", SUM_OF_RANKS, str(tmp_path)], processes=2)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys("01", "2 3.0 from rank 0")


def test_ranks_of_training_see_the_devices_that_are_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deepspeed launcher would have given them the first ones."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    script = "import os, sys; open(os.path.join(sys.argv[1], os.environ['RANK']), 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    run_with_deepspeed([sys.executable, "-c", script, str(tmp_path)], processes=2)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "3,1", "1": "3,1"}


def test_an_exception_on_rank_0_reaches_all_ranks(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from mates.engine import distributed
world = distributed.join(timeout_minutes=1, threads=1)
try:
    world.same(lambda: 1 / 0)
except ZeroDivisionError:
    Path(sys.argv[1], str(world.rank)).touch()
distributed.leave()
"""
    run_plain([sys.executable, "-P", "-c", script, str(tmp_path)], processes=2)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def test_one_failing_rank_ends_the_others() -> None:
    script = "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(600)"
    start = time.monotonic()
    with pytest.raises(StepFailedError, match="ended with exit code 3"):
        run_plain([sys.executable, "-c", script], processes=2)
    assert time.monotonic() - start < 60, "the other rank sleeps for ten minutes"


def test_a_killed_rank_is_named_with_its_signal() -> None:
    script = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(StepFailedError, match="was killed by SIGKILL"):
        run_plain([sys.executable, "-c", script], processes=1)


def test_another_number_of_ranks_than_promised(tmp_path: Path) -> None:
    environment = os.environ | {PROMISED_WORLD_SIZE: "4", "PYTHONSAFEPATH": "1"}
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"run_dir: {tmp_path / 'run'}\n")
    done = subprocess.run([console_script("mates"), "pretrain", str(recipe)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the launcher promised 4 ranks, this process finds 1" in done.stderr


def test_ranks_do_not_outlive_the_run(tmp_path: Path) -> None:
    """The ranks of a parent that is killed by SIGKILL end by themselves."""
    rank = f"""
import os, time
from pathlib import Path
from mates.engine import distributed
distributed.join(timeout_minutes=1, threads=1)
Path({str(tmp_path)!r}, "pid.tmp").write_text(str(os.getpid()))
Path({str(tmp_path)!r}, "pid.tmp").rename(Path({str(tmp_path)!r}, "pid"))
time.sleep(600)
"""
    parent = f"import sys; from mates.launchers.local import run_plain; run_plain([sys.executable, '-P', '-c', {rank!r}], processes=1)"
    environment = {key: value for key, value in os.environ.items() if key != PARENT}
    process = subprocess.Popen([sys.executable, "-P", "-c", parent], env=environment)
    deadline = time.monotonic() + 120
    while not (tmp_path / "pid").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child = int((tmp_path / "pid").read_text())
    assert process_identity(child) is not None
    process.send_signal(signal.SIGKILL)
    process.wait()
    while process_identity(child) is not None:
        assert time.monotonic() < deadline, "the rank is still there"
        time.sleep(0.05)

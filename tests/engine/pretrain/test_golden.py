"""Losses of 100 steps are those that were written down, to the last bit: no change of the code may move them unseen."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_losses_are_the_golden_ones() -> None:
    """Where they are to change, write the output of ``golden.py`` into the file and say in the commit why."""
    golden = HERE / "golden" / f"cpu-{platform.machine()}.json"
    if not golden.exists():
        pytest.skip(f"no golden losses for this kind of CPU ({platform.machine()})")
    done = subprocess.run([sys.executable, "-P", str(HERE / "golden.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected, found = json.loads(golden.read_text()), json.loads(done.stdout.splitlines()[-1])
    for name, losses in expected["losses"].items():
        assert len(losses) == 100
        assert losses[-1] < losses[0] - 1, "a model that does not learn proves nothing"
        assert found["losses"][name] == losses

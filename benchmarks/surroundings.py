"""What a result depends on besides the code under test: machine, versions and commit. Every benchmark records it."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
PACKAGES = ("torch", "deepspeed", "transformers", "numpy")


def surroundings() -> dict[str, Any]:
    """Machine, versions and commit, as JSON."""
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    return {"machine": machine(), "versions": versions, "git": git_state()}


def machine() -> dict[str, Any]:
    """Processor, its cores, the instructions that PyTorch's kernels use (a name like "AMD EPYC" covers several), and accelerators."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    cpu = names[0] if names else platform.processor() or platform.machine()
    return {"cpu": cpu, "cores": os.cpu_count(), "instructions": torch.backends.cpu.get_cpu_capability(), "gpus": gpus}


def git_state() -> dict[str, Any] | None:
    """The commit of the code, and whether files other than results differ from it; None outside a repository."""
    try:
        return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def without_paths(value: Any) -> Any:
    """The same JSON with absolute paths cut to their last part: the rest says something about one machine only."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value

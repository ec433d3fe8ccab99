"""Kernels compiled for GPUs that are not here, and what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TENSOR_CORE = re.compile(r"\b(wgmma\.mma_async|mma\.sync)")


@dataclass(frozen=True)
class Compiled:
    """``spilled`` bytes of a thread's registers in memory, ``shared`` bytes of shared memory, and the PTX."""

    ptx: str
    spilled: int
    shared: int

    @property
    def uses_tensor_cores(self) -> bool:
        return TENSOR_CORE.search(self.ptx) is not None


def compiled(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int,
    *,
    aligned: Sequence[str] = (),
    **options: int,
) -> Compiled:
    """Compile for sm_80 or sm_90; arguments named in ``constants`` are compile-time, those in ``aligned`` multiples of 16."""
    triton = pytest.importorskip("triton", reason="triton is published for Linux only")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict(signature) | dict.fromkeys(constants, "constexpr")
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, types, dict(constants), attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert f".target sm_{capability}" in made.asm["ptx"]
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        shown = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    (stack, local) = re.search(r"STACK:(\d+).*?LOCAL:(\d+)", shown).groups()  # type: ignore[union-attr]
    return Compiled(made.asm["ptx"], int(stack) + int(local), made.metadata.shared)

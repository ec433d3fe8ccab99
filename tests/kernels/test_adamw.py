"""The AdamW update: against torch.optim.AdamW in fp64, in Triton's interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mates.kernels.adamw.reference import AdamWStep, stepped_weight

STEP = AdamWStep(t=8, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8)
DECAY = 0.1


Five = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def tensors(n: int, dtype: torch.dtype, seed: int) -> Five:
    generator = torch.Generator().manual_seed(seed)
    weight, first, grad = (torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(3))
    second = torch.rand(n, generator=generator, dtype=torch.float64) * 1e-2
    factor = torch.tensor(0.37, dtype=torch.float64)
    return weight.to(dtype), (first * 0.1).to(dtype), second.to(dtype), grad.to(dtype), factor.to(dtype)


def literal_step(weight: torch.Tensor, first: torch.Tensor, second: torch.Tensor, grad: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([parameter], lr=STEP.lr, betas=(STEP.beta1, STEP.beta2), eps=STEP.eps, weight_decay=DECAY)
    optimizer.state[parameter] = {
        "step": torch.tensor(float(STEP.t - 1)),
        "exp_avg": first.clone(),
        "exp_avg_sq": second.clone(),
    }
    parameter.grad = grad * factor
    optimizer.step()
    return parameter.detach()


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def test_reference_is_torchs_adamw_bit_for_bit() -> None:
    for dtype in (torch.float64, torch.float32):
        values = tensors(1001, dtype, seed=0)
        assert torch.equal(stepped_weight(*values, STEP, DECAY), literal_step(*values))


def test_inputs_are_not_written() -> None:
    values = tensors(64, torch.float32, seed=1)
    before = [value.clone() for value in values]
    stepped_weight(*values, STEP, DECAY)
    assert all(torch.equal(value, old) for value, old in zip(values, before, strict=True))


INTERPRETED = """
import torch
from tests.kernels.test_adamw import DECAY, STEP, error, literal_step, tensors
from mates.kernels.adamw.triton import stepped_weight
torch.empty_like = lambda like: torch.full_like(like, float("nan"))  # what is not written must show
for n in (1, 63, 1024, 1025, 4097):
    values = tensors(n, torch.float32, seed=n)
    exact = literal_step(*(value.double() for value in values))
    own, torchs = error(stepped_weight(*values, STEP, DECAY), exact), error(literal_step(*values), exact)
    assert own <= 2 * torchs, (n, own, torchs)
    again = [stepped_weight(*values, STEP, DECAY) for _ in range(3)]
    assert all(torch.equal(again[0], other) for other in again)
print("passed")
"""


def test_kernel_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is published for Linux only")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "passed", done.stderr


@pytest.mark.parametrize("capability", [80, 90])
def test_kernel_compiles_without_spills(capability: int) -> None:
    triton = pytest.importorskip("triton", reason="triton is published for Linux only")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mates.kernels.adamw.triton import BLOCK, stepped_weight_kernel

    pointers = {f"{name}_ptr": "*fp32" for name in ("weight", "exp_avg", "exp_avg_sq", "grad", "factor", "out")}
    scalars = dict.fromkeys(("keep", "beta1", "beta2", "root_correction2", "eps", "scale"), "fp32")
    source = ASTSource(stepped_weight_kernel, {**pointers, "n": "i64", **scalars, "BLOCK": "constexpr"}, {"BLOCK": BLOCK})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    assert ".local" not in compiled.asm["ptx"]
    assert len(compiled.asm["cubin"]) > 0

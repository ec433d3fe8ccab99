"""The kernels on per-sample gradients: against fp64, in Triton's interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import compiled

from mates.kernels.adamw.reference import AdamWStep
from mates.kernels.grad_norm.reference import squared_norms
from mates.kernels.update_dots.reference import update_dots
from mates.kernels.update_weights.reference import updated_weights

STEP = AdamWStep(t=8, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8)
DECAY, REFERENCES = 0.1, 3
SHAPES = [(1, 1, 5, 3), (3, 63, 67, 130), (3, 1024, 65, 33), (3, 1, 129, 64), (1, 1024, 31, 257), (16, 63, 1, 1), (1, 63, 1030, 130)]
"""(K, T, I, O)."""


def case(K: int, T: int, I: int, O: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:  # noqa: E741
    """Arguments of all three ops, in the magnitudes of training."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "inputs_KTI": normal(K, T, I).to(dtype),
        "grads_KTO": (normal(K, T, O) / T).to(dtype),
        "factors_K": torch.rand(K, generator=generator),
        "weight_OI": normal(O, I) * 0.02,
        "exp_avg_OI": normal(O, I) * 1e-3,
        "exp_avg_sq_OI": torch.rand(O, I, generator=generator) * 1e-5,
        "directions_ROI": normal(REFERENCES, O, I) * 1e-3,
    }


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def outputs(ops: Any, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All three ops; ``ops`` is (squared_norms, update_dots, updated_weights)."""
    a, b, f = (arguments[name] for name in ("inputs_KTI", "grads_KTO", "factors_K"))
    w, m, v, d = (arguments[name] for name in ("weight_OI", "exp_avg_OI", "exp_avg_sq_OI", "directions_ROI"))
    return {
        "squared_norms": ops[0](a, b),
        "update_dots": ops[1](a, b, f, m, v, d, STEP),
        "updated_weights": ops[2](a, b, f, w, m, v, STEP, DECAY, w.dtype),
    }


REFERENCE = (squared_norms, update_dots, updated_weights)


def errors(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """‖found − exact‖ / ‖exact‖ by op. nan where something was not written."""
    return {name: float((found[name].double() - exact[name]).norm() / exact[name].norm()) for name in exact}


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_references_are_written_out_gradients(shape: tuple[int, int, int, int]) -> None:
    arguments = wide(case(*shape, torch.float32))
    found = outputs(REFERENCE, arguments)
    for k, factor in enumerate(arguments["factors_K"]):
        weight = torch.nn.Parameter(arguments["weight_OI"].clone())
        grad = torch.einsum("ti,to->oi", arguments["inputs_KTI"][k], arguments["grads_KTO"][k])
        assert float(found["squared_norms"][k]) == pytest.approx(float((grad * grad).sum()), rel=1e-12)
        optimizer = torch.optim.AdamW([weight], lr=STEP.lr, betas=(STEP.beta1, STEP.beta2), eps=STEP.eps, weight_decay=DECAY)
        moments = {"exp_avg": arguments["exp_avg_OI"].clone(), "exp_avg_sq": arguments["exp_avg_sq_OI"].clone()}
        optimizer.state[weight] = {"step": torch.tensor(float(STEP.t - 1)), **moments}
        weight.grad = grad * factor
        optimizer.step()
        assert torch.allclose(found["updated_weights"][k], weight.detach(), rtol=1e-14, atol=0)
        moved = weight.detach() - arguments["weight_OI"] * (1 - STEP.lr * DECAY)
        dots = (arguments["directions_ROI"] * moved).sum((1, 2))
        assert torch.allclose(found["update_dots"][k], dots, rtol=1e-9, atol=1e-16)


INTERPRETED = """
import torch
from mates.kernels.grad_norm.triton import squared_norms
from mates.kernels.update_dots.triton import update_dots
from mates.kernels.update_weights.triton import updated_weights
from test_sample_gradients import REFERENCE, SHAPES, case, errors, outputs, wide
empty = torch.empty
torch.empty = lambda *shape, **more: empty(*shape, **more).fill_(float("nan"))  # what is not written must show
for dtype in (torch.float32, torch.bfloat16):
    for K, T, I, O in SHAPES:
        own, theirs = [], []
        for seed in range(8 if K * I * O < 3_000 else 1):  # the rounding of a few numbers is a matter of luck
            arguments = case(K, T, I, O, dtype, seed)
            exact = outputs(REFERENCE, wide(arguments))
            found = outputs((squared_norms, update_dots, updated_weights), arguments)
            own.append(errors(found, exact))
            theirs.append(errors(outputs(REFERENCE, arguments), exact))
        for op in found:
            mine, torchs = (sum(one[op] for one in several) / len(several) for several in (own, theirs))
            assert mine <= 2 * max(torchs, 2**-24), (op, K, T, I, O, dtype, mine, torchs)
        if T < 1024:
            again = outputs((squared_norms, update_dots, updated_weights), arguments)
            assert all(torch.equal(found[op], again[op]) for op in found), (K, T, I, O, dtype)
print("passed")
"""


@pytest.mark.timeout(600)
def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is published for Linux only")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-P", "-c", INTERPRETED], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "passed", done.stderr


def signatures(dtype: str) -> dict[str, tuple[Any, dict[str, str]]]:
    """Kernels with the types of their arguments."""
    from mates.kernels.grad_norm.triton import squared_norms_kernel
    from mates.kernels.update_dots.triton import update_dots_kernel
    from mates.kernels.update_weights.triton import updated_weights_kernel

    operands = {"inputs_ptr": f"*{dtype}", "grads_ptr": f"*{dtype}"}
    moments = {"exp_avg_ptr": "*fp32", "exp_avg_sq_ptr": "*fp32"}
    sizes = dict.fromkeys(("K", "T", "I", "O"), "i32")
    scalars = dict.fromkeys(("beta1", "beta2", "root_correction2", "eps", "scale"), "fp32")
    factors = {"factors_ptr": "*fp32"}
    return {
        "squared_norms": (squared_norms_kernel, operands | {"out_ptr": "*fp32"} | sizes | {"tiles": "i32"}),
        "update_dots": (
            update_dots_kernel,
            operands | factors | moments | {"directions_ptr": "*fp32", "out_ptr": "*fp32"} | sizes | {"R": "i32", "tiles": "i32"} | scalars,
        ),
        "updated_weights": (
            updated_weights_kernel,
            operands | factors | {"weight_ptr": "*fp32"} | moments | {"out_ptr": f"*{dtype}"} | sizes | {"keep": "fp32"} | scalars,
        ),
    }


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("op", ["squared_norms", "update_dots", "updated_weights"])
@pytest.mark.parametrize("width", [1024, 1001])
def test_kernels_compile_without_spills_and_use_tensor_cores(op: str, dtype: str, capability: int, width: int) -> None:
    pytest.importorskip("triton", reason="triton is published for Linux only")
    from mates.kernels.gradient_tile import launch

    operands = torch.zeros(1, 1, width, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    *_, constants = launch(operands, operands)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    kernel, signature = signatures(dtype)[op]
    pointers = [name for name in signature if name.endswith("_ptr")]
    aligned = [*pointers, "I", "O"] if width % 16 == 0 else pointers
    made = compiled(kernel, signature, constants, capability, aligned=aligned, **options)
    assert made.spilled == 0
    assert made.uses_tensor_cores
    assert made.shared <= 163 * 1024  # what an A100 has for one program

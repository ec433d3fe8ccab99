"""Everything that is checked and measured on a GPU, in parts of a few minutes each.

    python benchmarks/gpu_suite.py --part NAME [--results DIR]      (--list names the parts)

A part first gates on correctness: where that fails nothing is timed and the exit code is 1. What it finds goes to
``gpu_NAME.json`` with machine, versions and commit. Times are medians of CUDA-event measurements after a warm-up, and ratios come
from one run. ``benchmarks/results/GPU_TODO.md`` lists the parts that have not been measured yet.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import GateError
from surroundings import REPOSITORY, surroundings

Part = Callable[[], dict[str, Any]]


def gate(condition: bool, message: str) -> None:
    """Stop the part unless ``condition`` holds."""
    if not condition:
        raise GateError(message)


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """‖found − exact‖ / ‖exact‖ in fp64."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def median_ms(work: Callable[[], Any]) -> float:
    """Median milliseconds of a call."""
    from triton.testing import do_bench

    return float(do_bench(work, warmup=200, rep=1000, return_mode="median"))


def adamw() -> dict[str, Any]:
    """The fused out-of-place AdamW update against PyTorch's operations: error, determinism, time, share of the copy bandwidth."""
    from mates.kernels.adamw.reference import AdamWStep
    from mates.kernels.adamw.reference import stepped_weight as plain
    from mates.kernels.adamw.triton import stepped_weight as fused

    step, rows = AdamWStep(t=1000, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8), {}
    generator = torch.Generator("cuda").manual_seed(0)
    for n in (1, 1025, 1_000_003, 50304 * 1024, 4 * 50304 * 1024):
        weight, first, grad = (torch.randn(n, device="cuda", generator=generator) for _ in range(3))
        second = torch.rand(n, device="cuda", generator=generator) * 1e-2
        factor = torch.tensor(0.37, device="cuda")
        wide = [value.double() for value in (weight, first, second, grad, factor)]
        exact = plain(wide[0], wide[1], wide[2], wide[3], wide[4], step, 0.1)
        own_update = partial(fused, weight, first, second, grad, factor, step, 0.1)
        plain_update = partial(plain, weight, first, second, grad, factor, step, 0.1)
        found = own_update()
        gate(bool(torch.isfinite(found).all()), f"adamw: {n} weights: not all written")
        own, torchs = relative_error(found, exact), relative_error(plain_update(), exact)
        gate(own <= 2 * torchs + 1e-12, f"adamw: {n} weights: error {own:.2e}, PyTorch's own is {torchs:.2e}")
        gate(
            all(torch.equal(found, own_update()) for _ in range(100)),
            f"adamw: {n} weights: 100 launches differ",
        )
        del exact, wide
        if n < 10**6:
            continue
        own_ms, plain_ms = median_ms(own_update), median_ms(plain_update)
        copy_ms = median_ms(partial(torch.empty_like(weight).copy_, weight))
        rows[str(n)] = {
            "ms": own_ms,
            "pytorch_ms": plain_ms,
            "speedup": plain_ms / own_ms,
            "share_of_copy_bandwidth": (20 * n / own_ms) / (8 * n / copy_ms),
            "relative_error": own,
            "pytorch_relative_error": torchs,
        }
    return rows


def sample_gradients() -> dict[str, Any]:
    """The kernels on per-sample gradients: error, determinism, time and share of the matmul rate against PyTorch's operations."""
    from mates.kernels.adamw.reference import AdamWStep
    from mates.kernels.grad_norm import reference as norm_reference
    from mates.kernels.grad_norm import triton as norm_triton
    from mates.kernels.update_dots import reference as dots_reference
    from mates.kernels.update_dots import triton as dots_triton
    from mates.kernels.update_weights import reference as weights_reference
    from mates.kernels.update_weights import triton as weights_triton

    torch.backends.cuda.matmul.allow_tf32 = False
    step, rows = AdamWStep(t=1000, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8), {}
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", generator=generator)

    small = [(k, t, i, o) for k in (1, 3, 16) for t in (1, 63, 1024) for i, o in ((67, 130), (257, 31), (1030, 515))]
    large = [(8, 1024, 1024, 4096), (8, 1024, 4096, 1024), (8, 1024, 1024, 3072)]  # layers of Pythia-410M
    for dtype in (torch.float32, torch.bfloat16):
        for K, T, I, O in small + large:  # noqa: E741
            a, b = normal(K, T, I).to(dtype), (normal(K, T, O) / T).to(dtype)
            factors, weight = torch.rand(K, device="cuda", generator=generator), normal(O, I) * 0.02
            first, second = normal(O, I) * 1e-3, torch.rand(O, I, device="cuda", generator=generator) * 1e-5
            directions = normal(2, O, I) * 1e-3

            e = [value.double() for value in (a, b, factors, weight, first, second, directions)]
            ops: dict[str, tuple[Any, Any, torch.Tensor]] = {
                "squared_norms": (
                    partial(norm_triton.squared_norms, a, b),
                    partial(norm_reference.squared_norms, a, b),
                    norm_reference.squared_norms(e[0], e[1]),
                ),
                "update_dots": (
                    partial(dots_triton.update_dots, a, b, factors, first, second, directions, step),
                    partial(dots_reference.update_dots, a, b, factors, first, second, directions, step),
                    dots_reference.update_dots(e[0], e[1], e[2], e[4], e[5], e[6], step),
                ),
                "updated_weights": (
                    partial(weights_triton.updated_weights, a, b, factors, weight, first, second, step, 0.1, torch.float32),
                    partial(weights_reference.updated_weights, a, b, factors, weight, first, second, step, 0.1, torch.float32),
                    weights_reference.updated_weights(e[0], e[1], e[2], e[3], e[4], e[5], step, 0.1, torch.float64),
                ),
            }
            is_large = (K, T, I, O) in large
            if is_large:
                whole = torch.randn(4096, 4096, device="cuda").to(dtype)
                matmul_rate = 2 * 4096**3 / median_ms(partial(torch.matmul, whole, whole))
            for name, (fused, plain, exact) in ops.items():
                found = fused()
                own, torchs = relative_error(found, exact), relative_error(plain(), exact)
                place = f"{name} {dtype} K{K} T{T} I{I} O{O}"
                gate(own <= 2 * max(torchs, 2**-24), f"{place}: error {own:.2e}, PyTorch's own is {torchs:.2e}")
                launches = 100 if not is_large else 10
                gate(all(torch.equal(found, fused()) for _ in range(launches)), f"{place}: {launches} launches differ")
                if is_large:
                    ms, plain_ms = median_ms(fused), median_ms(plain)
                    rows[place] = {
                        "ms": ms,
                        "pytorch_ms": plain_ms,
                        "speedup": plain_ms / ms,
                        "share_of_matmul_rate": 2 * K * T * I * O / ms / matmul_rate,
                        "relative_error": own,
                        "pytorch_relative_error": torchs,
                    }
    return rows


def exact_probe() -> dict[str, Any]:
    """Exact and linear probes of a small model on the GPU in fp32 against the CPU in fp64, and their rates."""
    import time

    from mates.engine.config import ModelConfig
    from mates.engine.pretrain.checkpoint import OptimizerState
    from mates.engine.pretrain.model import build_model, model_config
    from mates.engine.pretrain.shapes import resolve_shape
    from mates.engine.probe.methods import make_setting
    from mates.engine.probe.prober import Prober
    from mates.engine.reference.batches import LabelBatch

    torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 1024, (8, 64), generator=generator)
    positions = torch.arange(7, tokens.numel(), 8)
    targets = torch.randint(0, 1024, (len(positions),), generator=generator)
    windows = torch.randint(0, 1024, (16, 129), generator=generator).numpy()
    config = model_config(resolve_shape(ModelConfig(hidden_size=256, layers=4, heads=8)), 1024, 0)
    influences: dict[tuple[str, str], torch.Tensor] = {}
    rates = {}
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        model = build_model(config, seed=0).to(device=device, dtype=dtype)
        weights = {name: value.detach().clone() for name, value in model.named_parameters()}
        first, second = ({name: torch.full_like(value, fill) for name, value in weights.items()} for fill in (1e-3, 1e-4))
        decay = {name: 0.1 if value.ndim >= 2 else 0.0 for name, value in weights.items()}
        state = OptimizerState(weights, first, second, decay, 7, 1e-3, 0.9, 0.95, 1e-8, 1.0)
        batch = LabelBatch(tokens.to(device), positions.to(device), targets.to(device), positions.to(device) // 64)
        prober = Prober(make_setting(model, state, [[batch]], [torch.from_numpy(windows[:4]).to(device)]), [[batch]], 4)
        for method in ("exact", "linear"):
            prober.probe(windows[:4], [method])
            start = time.perf_counter()
            influences[device, method] = torch.from_numpy(prober.probe(windows, [method]).influences[method][:, 0])
            rates[method] = len(windows) / (time.perf_counter() - start)
    found = {}
    for method, bound in (("exact", 1e-3), ("linear", 1e-5)):
        exact = influences["cpu", method]
        error = float((influences["cuda", method] - exact).abs().max() / exact.std())
        gate(error <= bound, f"{method} probe: the GPU in fp32 differs from fp64 by {error:.2e} SD")
        found[method] = {"error_sd": error, "probes_per_second": rates[method]}
    return found


def probe_throughput(preset: str, precision: str) -> dict[str, Any]:
    """Probes a second by every method and by the published way, of a Pythia shape at 1,024 tokens with 1,024 reference items."""
    import probe_throughput as benchmark

    options = benchmark.parse(
        f"--device cuda --preset {preset} --samples 32 --one_by_one 4 --batch 8 --reference_batch_tokens 65536".split()
        + f"--precision {precision} --repeats {1 if preset == 'pythia-1b' else 3}".split()
    )
    with tempfile.TemporaryDirectory() as folder:
        return dict(benchmark.measure(options, Path(folder)))


def pretrain_throughput(preset: str, micro_batch: int) -> dict[str, Any]:
    """Tokens a second, MFU and memory of our trainer and of others' loops, of a Pythia shape at 1,024 tokens."""
    import pretrain_throughput as benchmark

    size = f"--micro_batch {micro_batch} --batch {2 * micro_batch} --steps 12 --repeats 2"
    contestants = "mates mates_compiled torch transformers litgpt"
    options = vars(benchmark.parse(f"--device cuda --precision bf16 --preset {preset} {size} --contestants {contestants}".split()))
    options.pop("results")
    return dict(benchmark.measure(options))


def golden() -> dict[str, Any]:
    """Losses of 100 steps of two tiny models in bf16, twice the same; compared with those written down for this kind of GPU, if any."""
    import subprocess

    folder = REPOSITORY / "tests/engine/pretrain"
    command = [sys.executable, "-P", str(folder / "golden.py")]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1] for _ in range(2)]
    gate(runs[0] == runs[1], "golden: two runs differ")
    found: dict[str, Any] = json.loads(runs[0])
    written = folder / "golden" / f"{found['device']}.json"
    gate(not written.exists() or json.loads(written.read_text()) == found, f"golden: losses differ from {written.name}")
    return found


def scoring() -> dict[str, Any]:
    """Scoring 1,024-token samples with a BERT-base in bf16: agreement with fp32, samples a second, share of the matmul rate."""
    import time

    import numpy as np

    from mates.engine.config import FitConfig, ScoreConfig
    from mates.engine.influence.encoder import EncoderModel, new_encoder
    from mates.engine.influence.inputs import CorpusIds
    from mates.engine.influence.model import Samples, predict
    from mates.engine.pretrain.meter import matmul_tflops

    device = torch.device("cuda")
    config = FitConfig(hidden_size=768, layers=12, heads=12, chunk_tokens=512, max_chunks=2)
    torch.manual_seed(0)
    module = new_encoder(config, 50_304).to(device).eval()
    torch.nn.init.normal_(module.head.weight)

    class Drawn:
        length = 1024
        tokens = np.random.default_rng(0).integers(0, 50_304, (4096, 1025)).astype(np.uint16)

        def stored(self, ids: Any) -> Any:
            return self.tokens[ids]

    samples, found = Samples(Drawn(), np.arange(4096)), {}  # type: ignore[arg-type]
    exact = predict(EncoderModel(module, CorpusIds(config, 50_304), config, ScoreConfig(), device), samples[:512])[:, 0]
    peak = matmul_tflops(device, torch.bfloat16) * 1e12
    for batch_tokens in (32_768, 131_072):
        score = ScoreConfig(precision="bf16", batch_tokens=batch_tokens)
        model = EncoderModel(module, CorpusIds(config, 50_304), config, score, device)
        own = predict(model, samples[:512])[:, 0]
        gate(float(np.corrcoef(own, exact)[0, 1]) > 0.99, "scoring: bf16 scores do not follow those in fp32")
        rates = []
        for _ in range(3):
            started = time.perf_counter()
            predict(model, samples)
            rates.append(len(samples) / (time.perf_counter() - started))
        rate = sorted(rates)[1]
        found[str(batch_tokens)] = {
            "samples_per_s": rate,
            "share_of_matmul_rate": rate * model.forward_flops(1, 1024) / peak,
            "largest_difference_sd": float(np.abs(own - exact).max() / exact.std()),
        }
    return found | {"matmul_tflops": peak / 1e12}


def quickstart() -> dict[str, Any]:
    """The quickstart's whole loop on one GPU through NCCL; its evaluations, and the seconds of each step."""
    from dataclasses import replace

    from mates.engine.evaluate.report import write_report
    from mates.engine.layout import layout_of
    from mates.launchers.recipe import load_recipe
    from mates.launchers.run import run_recipe
    from mates.preprocess import artifact

    recipe = load_recipe(REPOSITORY / "launchers/recipes/quickstart.yaml")
    with tempfile.TemporaryDirectory() as folder:
        recipe = replace(recipe, run_dir=folder, launch=replace(recipe.launch, processes=1))
        run_recipe(recipe)
        write_report(recipe)
        last = recipe.pretrain.stages - 1
        metrics = {method: dict(artifact.verify(layout_of(recipe).evaluation(method, last)).info) for method in recipe.methods}
        seconds = {
            str(manifest.parent.relative_to(folder)): artifact.load(manifest.parent).cost.seconds
            for manifest in sorted(Path(folder).rglob(artifact.MANIFEST_NAME))
        }
    gate(all(value["holdout_loss_nats"] < 7.0 for value in metrics.values()), f"quickstart: held-out losses {metrics}")
    return {"metrics": metrics, "seconds": seconds}


def flops_to_accuracy(minutes: float = 8.0) -> dict[str, Any]:
    """random, mates and mates-static of the gpu tier, one seed; in turns of eight minutes, the same command until all are measured."""
    import flops_to_accuracy as benchmark
    from pieces import PieceError, unpack

    from mates.engine.pretrain.vigilance import STOPPED

    out, packed = REPOSITORY / "runs" / "flops_to_accuracy_gpu", REPOSITORY / "runs" / "flops_to_accuracy_gpu_pieces"
    if packed.is_dir() and not (out / "data").exists():
        try:
            unpack(packed, out / "data")
        except PieceError as error:
            raise GateError(str(error)) from error
    with tempfile.TemporaryDirectory() as results:
        options = ["--arms", "random,mates,mates-static", "--seeds", "1", "--budget-minutes", str(minutes), "--out", str(out)]
        code = benchmark.main(["--tier", "gpu", *options, "--results", results])
        gate(code != STOPPED, "flops-to-accuracy: not all runs are complete; the same command goes on")
        gate(code == 0, f"flops-to-accuracy: exit code {code}")
        found: dict[str, Any] = json.loads((Path(results) / "flops_to_accuracy_gpu.json").read_text())
    return found


PARTS: dict[str, Part] = {
    "adamw": adamw,
    "sample-gradients": sample_gradients,
    "exact-probe": exact_probe,
    **{
        f"throughput-{size}{suffix}": partial(probe_throughput, f"pythia-{size}", precision)
        for size in ("70m", "410m", "1b")
        for suffix, precision in (("", "fp32"), ("-bf16", "bf16"))
    },
    "golden": golden,
    **{
        f"pretrain-{size}": partial(pretrain_throughput, f"pythia-{size}", micro_batch)
        for size, micro_batch in (("70m", 32), ("160m", 32), ("410m", 16), ("1b", 8))
    },
    "scoring": scoring,
    "quickstart": quickstart,
    "flops-to-accuracy": flops_to_accuracy,
}


def main() -> int:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=sorted(PARTS))
    parser.add_argument("--list", action="store_true", help="name the parts")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks/results", help="folder of the JSON")
    options = parser.parse_args()
    if options.list or options.part is None:
        for name, part in PARTS.items():
            print(f"{name:<20} {(getattr(part, 'func', part).__doc__ or '').splitlines()[0]}")
        return 0 if options.list else 2
    if not torch.cuda.is_available():
        print("gpu_suite: no CUDA GPU here; nothing was measured", file=sys.stderr)
        return 2
    try:
        found = PARTS[options.part]()
    except GateError as error:
        print(f"gpu_suite: {error}", file=sys.stderr)
        return 1
    options.results.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"part": options.part, "found": found, **surroundings()}, indent=2, sort_keys=True)
    (options.results / f"gpu_{options.part}.json").write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

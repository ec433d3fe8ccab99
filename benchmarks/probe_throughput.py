"""Claim: probes by taps and fused updates are many times cheaper than the published way, and exact ones are exact.

    python benchmarks/probe_throughput.py [--device cpu] [--preset pythia-410m] [--length 1024] [--items 1024] [--synthetic] ...

Contestants, each in a process of its own on the same checkpoint, samples and reference:

- published_disk: one sample at a time; the checkpoint is read again for every sample (from the file cache); plain AdamW step; reference
  in padded batches of 32 with logits at all positions. The way of the published code.
- published_memory: the same with weights and moments restored from memory.
- vmap: per-sample gradients of a batch by torch.func, then AdamW update and dot with the reference gradient: what ``linear`` computes.
- exact, linear, centred, frozen, corrected: ours.
- training: plain forward and backward of the same batch, the yardstick.

On the CPU a small model is trained first on web text of the shared data folder beside the checkout, so that fidelity can be given beside
the rates; with ``--synthetic`` (and on a GPU by default) tokens and moments are drawn at random and there is no fidelity. Gates before any
figure, all in fp32: exact equals published_memory to 1e-3 of the influences' SD, vmap equals linear to 1e-3 SD. Rates are medians over
``--repeats`` turns of all contestants; ratios are of the same turn. FLOP/s are by formula (8·N·T for linear), and are given as a share
of the rate of a large matrix product in the same dtype measured in the same run.

With ``--precision bf16`` ours and the yardstick make gradients from bf16 matrix products; the published ways, vmap and the reference losses
of exact influences stay in fp32, and fidelity is that of bf16 influences to exact ones in fp32.

Writes ``probe_throughput_DEVICE_PRESET[_bf16].json`` into ``--results``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import spread
from surroundings import REPOSITORY, SHARED_DATA, surroundings, without_paths
from torch import nn

from mates.engine.config import ModelConfig
from mates.engine.flops import decoder_forward, decoder_training
from mates.engine.pretrain.checkpoint import OptimizerState
from mates.engine.pretrain.meter import matmul_rates
from mates.engine.pretrain.model import build_model, model_config, next_token_loss
from mates.engine.pretrain.shapes import resolve_shape
from mates.engine.probe.fidelity import fidelity_of
from mates.engine.probe.methods import make_setting
from mates.engine.probe.prober import Prober
from mates.engine.probe.taps import autocast
from mates.engine.reference.batches import LabelBatch, label_batches
from mates.engine.reference.task import IGNORED, Passage, Reference, pack
from mates.preprocess.artifact import write_json

CLAIM = "Probes by taps and fused updates are many times cheaper than the published way, and exact ones are exact."
OURS = ("exact", "linear", "centred", "frozen", "corrected")
ONE_BY_ONE = ("published_disk", "published_memory", "exact")
CONTESTANTS = ("published_disk", "published_memory", "vmap", *OURS, "training")
BETAS, EPS, LR, DECAY, CLIP = (0.9, 0.95), 1e-8, 1e-3, 0.1, 1.0
PUBLISHED_BATCH = 32
EXACT_BOUND = LINEAR_BOUND = 1e-3  # SD

Json = dict[str, Any]


# --- the checkpoint, the samples and the reference -----------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """What all contestants share, loaded from the prepared folder."""

    options: argparse.Namespace
    device: torch.device
    model: nn.Module
    state: OptimizerState
    windows: np.ndarray[Any, np.dtype[np.int64]]
    reference: Reference


def config_of(options: argparse.Namespace) -> ModelConfig:
    """The model's section of a recipe."""
    if options.preset:
        return ModelConfig(preset=options.preset)
    return ModelConfig(hidden_size=128, layers=4, heads=4, max_positions=options.length)


def prepare(options: argparse.Namespace, folder: Path) -> None:
    """Write weights, moments, samples and reference."""
    torch.manual_seed(0)
    tokens, reference, vocab = synthetic(options) if options.synthetic else real(options, folder)
    model = build_model(model_config(resolve_shape(config_of(options)), vocab, 0), seed=0).to(options.device)
    windows = np.stack([tokens[i * options.length : (i + 1) * options.length + 1] for i in range((len(tokens) - 1) // options.length)])
    held, rest = windows[: options.samples], windows[options.samples :]
    moments = random_moments(model) if options.synthetic else trained(model, rest, options)
    torch.save({"weights": dict(model.state_dict()), "moments": moments}, folder / "checkpoint.pt")
    np.savez(folder / "data.npz", windows=held, vocab=vocab, **{name: getattr(reference, name) for name in ("tokens", "labels", "offsets")})


def synthetic(options: argparse.Namespace) -> tuple[Any, Reference, int]:
    """Random tokens, and a reference of LAMBADA's lengths (about 90 tokens an item, one or two labels)."""
    source = np.random.default_rng(0)
    vocab = 50_304
    lengths = source.integers(60, 121, options.items)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    inputs = source.integers(0, vocab, offsets[-1]).astype(np.int32)
    labels = np.full(offsets[-1], IGNORED, np.int32)
    ends = offsets[1:] - 1
    labels[ends] = source.integers(0, vocab, len(ends))
    labels[ends[::2] - 1] = inputs[ends[::2]]
    tokens = source.integers(0, vocab, options.samples * options.length + 1)
    return tokens, Reference("synthetic", None, inputs, labels, offsets), vocab  # type: ignore[arg-type]


def real(options: argparse.Namespace, folder: Path) -> tuple[Any, Reference, int]:
    """Web text by a tokenizer of 4,096 entries, and LAMBADA."""
    from mates.preprocess.inputs import find_inputs
    from mates.preprocess.readers import ReadOptions, read_texts
    from mates.preprocess.tokenizer import make_tokenizer, open_tokenizer

    needed = (options.samples + options.steps * options.batch) * options.length + 1
    texts: list[str] = []
    size = 0
    for file in find_inputs([str(options.text)]):
        for text in read_texts(file, ReadOptions(metadata_fields=())):
            texts.append(text)
            size += len(text)
            if size > 5 * needed:
                break
    order = np.random.default_rng(0).permutation(len(texts))
    texts = [texts[number] for number in order]
    where = folder / "tokenizer"
    make_tokenizer(where, path=None, kind="bpe", vocab_size=4096, train_bytes=5_000_000, end_of_document=None, texts=texts, inputs={})
    tokenizer, _ = open_tokenizer(where)
    tokens = np.concatenate([np.append(ids, tokenizer.end_of_document) for ids in tokenizer.encode_batch(texts)])[:needed].astype(np.int64)
    rows = [json.loads(line)["text"].strip().rpartition(" ") for line in options.lambada.read_text().splitlines()[: options.items]]
    packed = pack([Passage(context, " " + word, "train") for context, _, word in rows], tokenizer, options.length)
    return tokens, Reference("lambada", None, *packed), tokenizer.vocab_size  # type: ignore[arg-type]


def random_moments(model: nn.Module) -> Json:
    """Moments of plausible size."""
    named = dict(model.named_parameters())
    return {
        "exp_avg": {name: torch.randn_like(value) * 1e-4 for name, value in named.items()},
        "exp_avg_sq": {name: torch.rand_like(value) * 1e-7 for name, value in named.items()},
        "t": 1_000,
    }


def trained(model: nn.Module, windows: Any, options: argparse.Namespace) -> Json:
    """Train the model in place and give the moments."""
    named = dict(model.named_parameters())
    optimizer = plain_optimizer(named)
    for step in range(options.steps):
        batch = torch.from_numpy(windows[step * options.batch : (step + 1) * options.batch]).to(options.device)
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / 20)
        loss = next_token_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    print(f"trained {options.steps} steps, loss {float(loss):.3f}", file=sys.stderr)
    return {kind: {name: optimizer.state[value][kind] for name, value in named.items()} for kind in ("exp_avg", "exp_avg_sq")} | {
        "t": options.steps
    }


def plain_optimizer(named: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    """AdamW with decay for matrices only."""
    groups = [
        {"params": [value for value in named.values() if value.ndim >= 2], "weight_decay": DECAY},
        {"params": [value for value in named.values() if value.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)


def load(options: argparse.Namespace, folder: Path) -> World:
    """The prepared folder."""
    device = torch.device(options.device)
    with np.load(folder / "data.npz", allow_pickle=False) as arrays:
        data = {name: arrays[name] for name in arrays.files}
    saved = torch.load(folder / "checkpoint.pt", map_location=device, weights_only=True)
    model = build_model(model_config(resolve_shape(config_of(options)), int(data["vocab"]), 0), seed=0).to(device)
    model.load_state_dict(saved["weights"])
    names = dict(model.named_parameters())
    state = OptimizerState(
        {name: value.detach().clone() for name, value in names.items()},
        saved["moments"]["exp_avg"],
        saved["moments"]["exp_avg_sq"],
        {name: DECAY if value.ndim >= 2 else 0.0 for name, value in names.items()},
        saved["moments"]["t"],
        LR,
        *BETAS,
        EPS,
        CLIP,
    )
    reference = Reference("reference", None, data["tokens"], data["labels"], data["offsets"])  # type: ignore[arg-type]
    return World(options, device, model.eval(), state, data["windows"], reference)


# --- contestants ---------------------------------------------------------------------------------------------------


def published(world: World, restore: Callable[[], None], windows: Any) -> list[float]:
    """Influences one at a time; ``restore`` puts the checkpoint back into the world's model and the optimizer."""
    model, batches = world.model, padded(world.reference, world.device)
    named = dict(model.named_parameters())

    def reference_loss() -> float:
        total = labels = 0.0
        with torch.no_grad():
            for tokens, targets in batches:
                logits = model(input_ids=tokens).logits
                total += float(nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"))
                labels += int((targets != IGNORED).sum())
        return total / labels

    restore()
    before, values = reference_loss(), []
    for window in windows:
        restore()
        optimizer = plain_optimizer(named)
        for name, value in named.items():
            optimizer.state[value] = {
                "step": torch.tensor(float(world.state.t)),
                "exp_avg": world.state.exp_avg[name].clone(),
                "exp_avg_sq": world.state.exp_avg_sq[name].clone(),
            }
        optimizer.zero_grad()
        next_token_loss(model, torch.from_numpy(window[None]).to(world.device)).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        values.append(reference_loss() - before)
    restore()
    return values


def padded(reference: Reference, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and labels in batches of 32 in the order given."""
    batches = []
    for start in range(0, reference.items, PUBLISHED_BATCH):
        spans = [slice(*reference.offsets[item : item + 2]) for item in range(start, min(start + PUBLISHED_BATCH, reference.items))]
        width = max(span.stop - span.start for span in spans)
        tokens, labels = np.zeros((len(spans), width), np.int64), np.full((len(spans), width), IGNORED, np.int64)
        for row, span in enumerate(spans):
            tokens[row, : span.stop - span.start], labels[row, : span.stop - span.start] = reference.tokens[span], reference.labels[span]
        batches.append((torch.from_numpy(tokens).to(device), torch.from_numpy(labels).to(device)))
    return batches


def contestant(world: World, name: str, folder: Path) -> Callable[[Any], list[float] | None]:
    """A function of samples [n, T + 1] that gives their influences, made ready."""
    if name in ("published_disk", "published_memory"):

        def restore() -> None:
            if name == "published_disk":
                saved = torch.load(folder / "checkpoint.pt", map_location=world.device, weights_only=True)
                world.model.load_state_dict(saved["weights"])
                for kind in ("exp_avg", "exp_avg_sq"):
                    getattr(world.state, kind).update(saved["moments"][kind])
            else:
                world.model.load_state_dict(world.state.weights, strict=False)

        return lambda windows: published(world, restore, windows)
    if name == "training":

        def train(windows: Any) -> None:
            with autocast(world.model, products(world)):
                loss = next_token_loss(world.model, torch.from_numpy(windows).to(world.device))
            loss.backward()  # type: ignore[no-untyped-call]
            world.model.zero_grad(set_to_none=True)

        return train
    if name == "vmap":
        return by_vmap(world)
    prober = our_prober(world)
    prober.estimate(name)
    return lambda windows: prober.probe(windows, [name]).influences[name][:, 0].tolist()


def products(world: World) -> torch.dtype | None:
    """What gradients are multiplied in, where it is not fp32."""
    return torch.bfloat16 if world.options.precision == "bf16" else None


def our_prober(world: World) -> Prober:
    """Ours, at this checkpoint."""
    options = world.options
    budget = options.reference_batch_tokens
    subset = np.random.default_rng(1).permutation(world.reference.items)[: options.subset_items]
    batches = label_batches(world.reference, batch_tokens=budget, device=world.device)
    known = torch.from_numpy(world.windows[: options.batch]).to(world.device)
    setting = make_setting(world.model, world.state, [batches], [known], products=products(world))
    few: list[LabelBatch] = label_batches(world.reference, batch_tokens=budget, device=world.device, items=subset)
    return Prober(setting, [few], options.batch)


def by_vmap(world: World) -> Callable[[Any], list[float]]:
    """Linear influences from torch.func's per-sample gradients."""
    from torch.func import functional_call, grad, vmap

    from mates.engine.probe.gradients import step_of
    from mates.kernels.adamw.reference import adam_update

    model, state = world.model, world.state
    step = step_of(state)
    batches = label_batches(world.reference, batch_tokens=world.options.reference_batch_tokens, device=world.device)
    setting = make_setting(model, state, [batches], [])
    gradients = setting.oracle.gradients(state.weights)
    decay = sum(float(-LR * state.weight_decay[name] * (stack[0] * state.weights[name]).sum()) for name, stack in gradients.items())
    weights = {name: value.detach() for name, value in state.weights.items()}

    def loss(weights: Json, window: torch.Tensor) -> torch.Tensor:
        logits = functional_call(model, weights, (), {"input_ids": window[None, :-1]}).logits
        return nn.functional.cross_entropy(logits[0], window[1:])

    each = vmap(grad(loss), in_dims=(None, 0))

    def probe(windows: Any) -> list[float]:
        grads = each(weights, torch.from_numpy(windows).to(world.device))
        norms = torch.stack([value.flatten(1).double().square().sum(1) for value in grads.values()]).sum(0).sqrt()
        values = []
        for k, factor in enumerate(torch.clamp(CLIP / (norms + 1e-6), max=1.0)):
            dots = []
            for name, value in grads.items():
                update = adam_update(state.exp_avg[name], state.exp_avg_sq[name], value[k], factor, step)
                dots.append((gradients[name][0] * update).sum(-1).double().sum())
            values.append(float(torch.stack(dots).sum()) + decay)
        return values

    return probe


def work(task: Json) -> Json:
    """One contestant in this process: its influences of all samples asked for, and its seconds."""
    options, folder = parse(task["arguments"]), Path(task["folder"])
    options.precision = task["precision"]
    torch.set_num_threads(options.threads or os.cpu_count() or 1)
    torch.backends.cuda.matmul.allow_tf32 = False
    world = load(options, folder)
    if task["name"] == "matmul":
        return {"flops_per_s": matmul_rate(world.device, products(world) or torch.float32)}
    run = contestant(world, task["name"], folder)
    windows = world.windows[: task["samples"]]
    size = options.batch
    batches = [windows[start : start + size] for start in range(0, len(windows), size)]
    if not task["values"]:
        run(batches[0][:1] if task["name"] in ONE_BY_ONE else batches[0])  # warm
    _synchronise(world.device)
    start = time.perf_counter()
    values = [run(batch) for batch in batches]
    _synchronise(world.device)
    seconds = time.perf_counter() - start
    memory = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    flat = None if values[0] is None else [value for batch in values for value in batch or ()]
    return {"seconds": seconds, "samples": len(windows), "values": flat, "peak_bytes": memory}


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the median of ten."""
    return statistics.median(matmul_rates(device, dtype, size=8192 if device.type == "cuda" else 2048, repeats=10))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# --- measurement ---------------------------------------------------------------------------------------------------


def run_child(
    options: argparse.Namespace, folder: Path, name: str, samples: int, *, values: bool = False, precision: str | None = None
) -> Json:
    """A contestant in a process of its own, in the options' precision where no other is given. SystemExit 1 where it fails."""
    task = {"name": name, "samples": samples, "values": values, "folder": str(folder), "arguments": options.given}
    task["precision"] = precision or options.precision
    done = subprocess.run([sys.executable, __file__, "--child", json.dumps(task)], stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(f"probe_throughput: {name} ended with {done.returncode}; nothing was written")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def gate(options: argparse.Namespace, folder: Path) -> Json:
    """Fidelity to exact influences; SystemExit 1 where contestants disagree about what is the same."""

    def influences(name: str, samples: int, precision: str) -> Any:
        return np.array(run_child(options, folder, name, samples, values=True, precision=precision)["values"])

    found = {name: influences(name, options.samples, "fp32") for name in ("vmap", *OURS)}
    few = min(options.samples, options.one_by_one)
    literal = influences("published_memory", few, "fp32")
    spread = found["exact"].std()
    errors = {
        "exact": float(np.abs(found["exact"][:few] - literal).max() / spread),
        "linear": float(np.abs(found["linear"] - found["vmap"]).max() / found["linear"].std()),
    }
    for name, bound in (("exact", EXACT_BOUND), ("linear", LINEAR_BOUND)):
        if not errors[name] <= bound:
            sys.exit(f"probe_throughput: gate: {name} is off by {errors[name]:.2e} SD, allowed {bound:.0e}; nothing was written")
    measured = found if options.precision == "fp32" else {name: influences(name, options.samples, options.precision) for name in OURS}
    known = {name: values for name, values in measured.items() if name != "vmap" and values is not found["exact"]}
    fidelity = {name: fidelity_of(values, found["exact"], 0).as_json() for name, values in known.items()}
    return {"errors_sd": errors, "fidelity": None if options.synthetic else fidelity, "samples": options.samples}


def measure(options: argparse.Namespace, folder: Path) -> Json:
    """Everything, as JSON."""
    prepare(options, folder)
    gated = gate(options, folder)
    rates: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    peaks: dict[str, int] = {}
    matmul = []
    for turn in range(options.repeats):
        print(f"turn {turn + 1} of {options.repeats}", file=sys.stderr)
        for name in CONTESTANTS:
            samples = options.one_by_one if name in ONE_BY_ONE else options.samples
            run = run_child(options, folder, name, samples)
            rates[name].append(run["samples"] / run["seconds"])
            peaks[name] = max(peaks.get(name, 0), run["peak_bytes"])
        matmul.append(run_child(options, folder, "matmul", 1)["flops_per_s"])
    flops = flops_of(options, folder)
    rate = statistics.median(matmul)
    return surroundings() | {
        "claim": CLAIM,
        "settings": {name: value for name, value in vars(options).items() if name != "given"},
        "gate": gated,
        "matmul_flops_per_s": rate,
        "contestants": {
            name: {
                "probes_per_s": spread(values),
                "over_published_memory": spread([one / other for one, other in zip(values, rates["published_memory"], strict=True)]),
                "over_training": spread([one / other for one, other in zip(values, rates["training"], strict=True)]),
                "flops_per_probe": flops[name],
                "share_of_matmul_rate": statistics.median(values) * flops[name] / rate,
                "peak_bytes": peaks[name],
            }
            for name, values in rates.items()
        },
    }


def flops_of(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """FLOPs of a probe by formula."""
    with np.load(folder / "data.npz", allow_pickle=False) as arrays:
        vocab, tokens, labels = int(arrays["vocab"]), len(arrays["tokens"]), int((arrays["labels"] != IGNORED).sum())
    shape = resolve_shape(config_of(options))
    step = decoder_training(shape, vocab, tokens=options.length, length=options.length)
    forward = decoder_forward(shape, vocab, tokens=tokens, length=tokens / options.items, logit_tokens=labels)
    pass_ = 2.0 * shape.matmul_parameters(vocab) * options.length
    part = forward * options.subset_items / options.items
    every = decoder_forward(shape, vocab, tokens=tokens, length=tokens / options.items)
    estimate = step + pass_
    return {
        "published_disk": step + every,
        "published_memory": step + every,
        "vmap": step,
        "exact": step + forward,
        "linear": estimate,
        "centred": estimate,
        "frozen": estimate,
        "corrected": estimate + part,
        "training": step,
    }


def lines(found: Json) -> Iterator[str]:
    """The table for a terminal."""
    gated = found["gate"]
    exact, linear = (gated["errors_sd"][name] for name in ("exact", "linear"))
    yield f"exact is off the literal step by {exact:.1e} SD, linear off vmap's by {linear:.1e} SD"
    yield "contestant        probes/s   over published_memory   over training   matmul rate   peak GiB   Spearman (95%)"
    for name, row in found["contestants"].items():
        rank = (gated["fidelity"] or {}).get(name, {}).get("spearman")
        shown = f"{rank['value']:.3f} ({rank['low']:.3f} to {rank['high']:.3f})" if rank else ""
        over, training = row["over_published_memory"], row["over_training"]["median"]
        ratio = f"{over['median']:8.2f} ({over['range'][0]:.2f}-{over['range'][1]:.2f})"
        share, peak = 100 * row["share_of_matmul_rate"], row["peak_bytes"] / 2**30
        yield f"{name.ljust(17)} {row['probes_per_s']['median']:8.3f}   {ratio}   {training:10.3f}   {share:8.0f}%   {peak:8.2f}   {shown}"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; what was given is kept for child processes."""
    parser = argparse.ArgumentParser(description=CLAIM, allow_abbrev=False)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where everything runs")
    add("--preset", help="a known shape (default a GPT-NeoX of width 128 with 4 layers)")
    add("--length", type=int, default=1024, help="tokens of a sample")
    add("--items", type=int, default=1024, help="items of the reference")
    add("--subset_items", type=int, default=16, help="items that corrected is exact on")
    add("--samples", type=int, default=24, help="samples probed in a turn by methods that take batches, and in the gate")
    add("--one_by_one", type=int, default=4, help="samples probed in a turn by exact and the published way")
    add("--batch", type=int, default=4, help="samples in one pass")
    add("--steps", type=int, default=100, help="training steps before probing")
    add("--reference_batch_tokens", type=int, default=8192, help="padded tokens in one pass over the reference")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the products that gradients are made of")
    add("--repeats", type=int, default=3, help="turns")
    add("--threads", type=int, default=0, help="threads on the CPU; 0 takes all cores")
    add("--synthetic", action=argparse.BooleanOptionalAction, help="random tokens and moments; by default on a GPU")
    add("--text", type=Path, default=SHARED_DATA / "web" / "cc_weborganizer.jsonl.zst", help="documents to train on")
    add("--lambada", type=Path, default=SHARED_DATA / "lambada" / "lambada_test.jsonl", help="passages in LAMBADA's form")
    add("--results", type=Path, default=REPOSITORY / "benchmarks" / "results", help="where the JSON goes")
    options = parser.parse_args(arguments)
    if options.synthetic is None:
        options.synthetic = options.device == "cuda"
    options.given = arguments
    return options


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["--child"]:
        print(json.dumps(work(json.loads(given[1]))))
        return 0
    options = parse(given)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    precision = "" if options.precision == "fp32" else f"_{options.precision}"
    name = f"probe_throughput_{options.device}_{options.preset or 'small'}{precision}.json"
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in found["settings"].items()}
    write_json(options.results / name, without_paths(found | {"settings": settings}))
    print("\n".join(lines(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

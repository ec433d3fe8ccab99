"""Claim: the trainer is at least as fast as the field's own loops on the same model, batch and optimizer; on a GPU 1.3 times a plain
transformers Trainer.

    python benchmarks/pretrain_throughput.py [--device cpu] [--preset pythia-14m] [--length 1024] [--batch 8] [--micro_batch 4] ...

Contestants, each in a process of its own, on the same tokens (drawn at random: speed does not depend on them):

- mates: ours, with ``--zero`` and ``--fused_loss``; mates_compiled: the same with torch.compile.
- torch: a plain loop with PyTorch's AdamW and clipping, gradients accumulated, bf16 by autocast.
- transformers: ``transformers.Trainer`` with its defaults (needs the package accelerate; left out where it is not installed).
- litgpt: the plain loop around litgpt's GPT of the same shape (left out where litgpt is not installed).

Gate: losses of the first steps of mates_compiled, torch and transformers, from the same weights, are ours to 1e-4 (bf16: 1e-2) relative.
Every contestant takes ``--repeats`` turns; a turn's figure is the median time of its steps after the first two, ratios are of the same
turn. MFU counts the model's FLOPs by formula against the rate of a large matrix product in the same dtype, measured in the same run.

Writes ``pretrain_throughput_DEVICE_PRESET.json`` into ``--results``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import GateError, spread
from surroundings import REPOSITORY, surroundings
from torch import nn

from mates.engine import distributed
from mates.engine.config import EvaluateConfig, ModelConfig, PretrainConfig, Recipe
from mates.engine.flops import decoder_training
from mates.engine.pretrain.meter import matmul_tflops
from mates.engine.pretrain.model import build_model, model_config, next_token_loss
from mates.engine.pretrain.shapes import resolve_shape
from mates.engine.pretrain.trainer import Trainer, weight_decay_of
from mates.preprocess.artifact import write_json

CLAIM = "The trainer is at least as fast as the field's own loops on the same model, batch and optimizer."
NEEDS = {"transformers": "accelerate", "litgpt": "litgpt"}
WARM_UP = 2
GATED = 3
VOCAB = 50_304
Json = dict[str, Any]
Steps = Iterator[float]


def recipe_of(options: Json, **changes: Any) -> Recipe:
    """The recipe of our trainer."""
    config = PretrainConfig(
        sequence_length=options["length"],
        batch_size=options["batch"],
        micro_batch_size=options["micro_batch"],
        steps_per_stage=max(options["steps"], 20),
        precision=options["precision"],
        zero_stage=options["zero"],
        fused_loss=options["fused_loss"],
        activation_checkpointing=options["activation_checkpointing"],
        **changes,
    )
    return replace(Recipe(), model=ModelConfig(preset=options["preset"]), pretrain=config, evaluate=EvaluateConfig(decay_steps=0))


def batches(options: Json) -> list[np.ndarray[Any, np.dtype[np.uint16]]]:
    """The windows [B, L + 1] of each step."""
    source = np.random.default_rng(0)
    shape = (options["batch"], options["length"] + 1)
    return [source.integers(0, VOCAB, shape, dtype=np.uint16) for _ in range(options["steps"])]


def dtype_of(options: Json) -> torch.dtype:
    """Of matrix products."""
    return torch.bfloat16 if options["precision"] == "bf16" else torch.float32


def mates_steps(options: Json, **changes: Any) -> Steps:
    """Ours."""
    world = distributed.join(timeout_minutes=10, threads=options["threads"])
    trainer = Trainer(recipe_of(options, **changes), world, vocab_size=VOCAB, end_of_document=0)
    for windows in batches(options):
        yield trainer.step(windows, trainer.config.lr).loss_nats
    distributed.leave()


def initial_model(options: Json) -> nn.Module:
    """transformers' model with our initial weights."""
    recipe = recipe_of(options)
    model = build_model(model_config(resolve_shape(recipe.model), VOCAB, 0), recipe.seed)
    if options["activation_checkpointing"]:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    return model.to(options["device"])


def plain_steps(options: Json, model: nn.Module, loss_of: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> Steps:
    """A plain loop."""
    config, device = recipe_of(options).pretrain, options["device"]
    size = config.micro_batch_size
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        groups.setdefault(weight_decay_of(parameter, config), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    model.train()
    for windows in batches(options):
        micro = [torch.from_numpy(windows[start : start + size]) for start in range(0, len(windows), size)]
        total = torch.zeros((), device=device)
        for part in micro:
            with torch.autocast(device, torch.bfloat16, enabled=options["precision"] == "bf16"):
                loss = loss_of(model, part.to(device).long()) / len(micro)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield float(total)


def litgpt_steps(options: Json) -> Steps:
    """The plain loop with litgpt's model of the same shape and its own initial weights."""
    from litgpt.config import Config
    from litgpt.model import GPT

    config = Config.from_name(options["preset"], block_size=options["length"])
    model = GPT(config).to(options["device"])

    def loss(module: nn.Module, windows: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(module(windows[:, :-1]).float().flatten(0, 1), windows[:, 1:].flatten())

    return plain_steps(options, model, loss)


def transformers_seconds(options: Json) -> Json:
    """``transformers.Trainer``, which has the loop to itself: times and losses are taken down as it goes."""
    from torch.utils.data import Dataset, SequentialSampler
    from transformers import Trainer as Peer
    from transformers import TrainerCallback, TrainingArguments

    config, rows = recipe_of(options).pretrain, np.concatenate(batches(options))
    ends, losses = [time.perf_counter()], [0.0]

    class Rows(Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, number: int) -> Json:
            window = torch.from_numpy(rows[number].astype(np.int64))
            return {"input_ids": window[:-1], "labels": window[:-1], "shift_labels": window[1:]}

    class InOrder(Peer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(Rows())

        def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*arguments, **named)
            losses[-1] += float(loss)  # its share of the step's mean
            return loss

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())
            losses.append(0.0)

    with tempfile.TemporaryDirectory() as folder:
        peer = InOrder(
            model=initial_model(options),
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=config.micro_batch_size,
                gradient_accumulation_steps=config.batch_size // config.micro_batch_size,
                max_steps=options["steps"],
                learning_rate=config.lr,
                lr_scheduler_type="constant",
                weight_decay=config.weight_decay,
                adam_beta1=config.beta1,
                adam_beta2=config.beta2,
                max_grad_norm=config.clip_norm,
                bf16=options["precision"] == "bf16",
                use_cpu=options["device"] == "cpu",
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
            ),
            train_dataset=Rows(),
            callbacks=[Clock()],
        )
        peer.train()
    return {"seconds": np.diff(ends).tolist(), "losses": losses[:-1]}


def timed(steps: Steps) -> Json:
    """Seconds and loss of each step; reading a loss waits for the device."""
    losses, ends = [], [time.perf_counter()]
    for loss in steps:
        losses.append(loss)
        ends.append(time.perf_counter())
    return {"seconds": np.diff(ends).tolist(), "losses": losses}


def work(options: Json) -> Json:
    """One turn of one contestant, in this process."""
    torch.set_num_threads(options["threads"])
    contestants: dict[str, Callable[[], Json]] = {
        "mates": lambda: timed(mates_steps(options)),
        "mates_compiled": lambda: timed(mates_steps(options, compile=True)),
        "torch": lambda: timed(plain_steps(options, initial_model(options), next_token_loss)),
        "transformers": lambda: transformers_seconds(options),
        "litgpt": lambda: timed(litgpt_steps(options)),
        "matmul": lambda: {"tflops": matmul_tflops(torch.device(options["device"]), dtype_of(options))},
    }
    found = contestants[options["contestant"]]()
    on_gpu = options["device"] == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found | {"peak_bytes": peak}


def in_child(options: Json, contestant: str) -> Json:
    """The same in a process of its own."""
    command = [sys.executable, "-P", __file__, "--child", json.dumps(options | {"contestant": contestant})]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    if done.returncode:
        raise RuntimeError(f"{contestant}: {done.stderr[-3000:]}")
    found: Json = json.loads(done.stdout.splitlines()[-1])
    return found


def environment() -> dict[str, str]:
    """Of children: the benchmarks folder can be imported from, and no launcher's variables are passed on."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"PYTHONPATH": str(Path(__file__).parent)}


def gate(losses: dict[str, list[float]], tolerance: float) -> dict[str, float]:
    """The largest relative gap of each contestant's first losses to ours.

    Raises:
        GateError: a contestant trains something else.
    """
    gaps = {}
    for name, found in losses.items():
        gaps[name] = max(abs(a - b) / b for a, b in zip(found[:GATED], losses["mates"][:GATED], strict=True))
        if name != "litgpt" and not gaps[name] <= tolerance:  # whose initial weights are its own
            raise GateError(f"{name}: losses {found[:GATED]}, ours are {losses['mates'][:GATED]}")
    return gaps


def measure(options: Json) -> Json:
    """All turns of all contestants."""
    missing = [name for name in options["contestants"] if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None]
    names = [name for name in options["contestants"] if name not in missing]
    turns: dict[str, list[Json]] = {name: [] for name in names}
    peaks = []
    for turn in range(options["repeats"]):
        peaks.append(in_child(options, "matmul")["tflops"])
        for name in names if turn % 2 == 0 else names[::-1]:
            turns[name].append(in_child(options, name))
    gaps = gate({name: rows[0]["losses"] for name, rows in turns.items()}, 1e-2 if options["precision"] == "bf16" else 1e-4)
    step_seconds = {name: [statistics.median(row["seconds"][WARM_UP:]) for row in rows] for name, rows in turns.items()}
    tokens = options["batch"] * options["length"]
    flops = decoder_training(resolve_shape(ModelConfig(preset=options["preset"])), VOCAB, tokens=tokens, length=options["length"])
    rows = {
        name: {
            "tokens_per_s": spread([tokens / value for value in seconds]),
            "mfu": spread([flops / value / peak / 1e12 for value, peak in zip(seconds, peaks, strict=True)]),
            "mates_is_times_faster": spread([value / own for value, own in zip(seconds, step_seconds["mates"], strict=True)]),
            "peak_bytes": max(row["peak_bytes"] for row in turns[name]),
            "first_losses_off": gaps[name],
        }
        for name, seconds in step_seconds.items()
    }
    return {
        "claim": CLAIM,
        "settings": options,
        "left_out": missing,
        "matmul_tflops": spread(peaks),
        "contestants": rows,
        **surroundings(),
    }


def lines(found: Json) -> Iterator[str]:
    """The table for a terminal."""
    yield f"matrix products run at {found['matmul_tflops']['median']:.3g} TFLOP/s"
    yield "contestant        tokens/s      MFU   mates is … times as fast   peak GiB"
    for name, row in found["contestants"].items():
        ratio = row["mates_is_times_faster"]
        over = f"{ratio['median']:6.2f} ({ratio['range'][0]:.2f}-{ratio['range'][1]:.2f})"
        share = 100 * row["mfu"]["median"]
        yield f"{name.ljust(15)} {row['tokens_per_s']['median']:10,.0f}   {share:5.1f}%   {over:>24}   {row['peak_bytes'] / 2**30:8.2f}"
    if found["left_out"]:
        needed = ", ".join(f"{name} (pip install {NEEDS[name]})" for name in found["left_out"])
        yield f"left out, for want of a package: {needed}"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=CLAIM, allow_abbrev=False)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where everything runs")
    add("--preset", default="pythia-14m", help="a Pythia shape")
    add("--length", type=int, default=1024, help="tokens of a sample")
    add("--batch", type=int, default=8, help="samples of an optimizer step")
    add("--micro_batch", type=int, default=4, help="samples in one pass")
    add("--steps", type=int, default=8, help="optimizer steps of a turn, two of which warm up")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of matrix products")
    add("--zero", type=int, choices=(0, 1, 2, 3), default=2, help="our ZeRO stage")
    add("--fused_loss", choices=("auto", "always", "never"), default="auto", help="our pretrain.fused_loss")
    add("--activation_checkpointing", action="store_true", help="all contestants but litgpt recompute activations")
    add("--contestants", nargs="+", default=["mates", "torch", "transformers", "litgpt"], help="who takes part; mates always")
    add("--repeats", type=int, default=3, help="turns")
    add("--threads", type=int, default=os.cpu_count(), help="threads on the CPU")
    add("--results", type=Path, default=REPOSITORY / "benchmarks" / "results", help="where the JSON goes")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["--child"]:
        print(json.dumps(work(json.loads(given[1]))))
        return 0
    options = vars(parse(given))
    results = options.pop("results")
    options["contestants"] = list(dict.fromkeys(["mates", *options["contestants"]]))
    assert options["steps"] > max(WARM_UP, GATED)
    assert math.gcd(options["batch"], options["micro_batch"]) == options["micro_batch"], "the batch is made of whole micro-batches"
    found = measure(options)
    write_json(results / f"pretrain_throughput_{options['device']}_{options['preset']}.json", found)
    print("\n".join(lines(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs on each of two ranks: every ZeRO stage against a plain loop, and stopping against not stopping. Writes JSON on rank 0.

ranks.py FOLDER [STEPS]        with a number of steps only these comparisons, without the other cases
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

os.environ["TRITON_INTERPRET"] = "1"  # the loss in pieces is made of kernels

from mates.engine import distributed
from mates.engine.config import LaunchConfig, ModelConfig, PretrainConfig, Recipe
from mates.engine.evaluate.stage import reference_metrics
from mates.engine.pretrain import checkpoint
from mates.engine.pretrain.model import build_model, model_config, next_token_loss
from mates.engine.pretrain.shapes import resolve_shape
from mates.engine.pretrain.trainer import Trainer, weight_decay_of
from mates.engine.reference.batches import LabelBatch
from mates.preprocess.artifact import Cost, Request

VOCAB, LENGTH, BATCH = 256, 32, 8
STEPS = int(sys.argv[2]) if len(sys.argv) > 2 else 6
RECIPE = Recipe(
    model=ModelConfig(hidden_size=32, layers=2, heads=2, max_positions=64),
    pretrain=PretrainConfig(sequence_length=LENGTH, batch_size=BATCH, micro_batch_size=2, lr=1e-3, warmup_steps=1, steps_per_stage=STEPS),
    evaluate=replace(Recipe().evaluate, decay_steps=2),
    launch=LaunchConfig(processes=2),
)


def recipe(zero_stage: int, precision: str, **changes: Any) -> Recipe:
    return replace(RECIPE, pretrain=replace(RECIPE.pretrain, zero_stage=zero_stage, precision=precision, **changes))  # type: ignore[arg-type]


def batches() -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(0).integers(0, VOCAB, (STEPS, BATCH, LENGTH + 1))


def share(batch: np.ndarray[Any, np.dtype[np.int64]], trainer: Trainer) -> np.ndarray[Any, np.dtype[np.int64]]:
    """This rank's part of a global batch."""
    size = len(batch) // trainer.world.size
    return batch[trainer.world.rank * size : (trainer.world.rank + 1) * size]


def train(trainer: Trainer, first: int, last: int) -> list[float]:
    return [trainer.step(share(batches()[step], trainer), lr=1e-3 / (step + 1)).loss_nats for step in range(first, last)]


def new(zero_stage: int, precision: str, world: distributed.World, **changes: Any) -> Trainer:
    return Trainer(recipe(zero_stage, precision, **changes), world, vocab_size=VOCAB, end_of_document=0)


def digest(trainer: Trainer) -> str:
    """A hash of weights and moments."""
    value = hashlib.sha256()
    for name, *tensors in trainer.full_state():
        value.update(name.encode())
        for tensor in tensors:
            value.update(tensor.numpy().tobytes())
    return value.hexdigest()


def plain_loop() -> tuple[list[float], dict[str, torch.Tensor]]:
    """A single process, torch's own AdamW and clipping, the whole batch at once."""
    config = RECIPE.pretrain
    model = build_model(model_config(resolve_shape(RECIPE.model), VOCAB, 0), RECIPE.seed)
    groups = [{"params": [p], "weight_decay": weight_decay_of(p, config)} for p in model.parameters()]
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps)
    losses = []
    for step, batch in enumerate(batches()):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 / (step + 1)
        optimizer.zero_grad()
        loss = next_token_loss(model, torch.from_numpy(batch))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: value.detach() for name, value in model.named_parameters()}


def reference_batches() -> list[LabelBatch]:
    """Three batches for two ranks, of different sizes; an item may have several labels."""
    source, batches = np.random.default_rng(1), []
    for number, rows in enumerate((4, 2, 3)):
        positions = np.arange(number, rows * LENGTH, 7)
        batches.append(
            LabelBatch(
                torch.from_numpy(source.integers(0, VOCAB, (rows, LENGTH))),
                torch.from_numpy(positions),
                torch.from_numpy(source.integers(0, VOCAB, len(positions))),
                torch.from_numpy(100 * number + positions // LENGTH),
            )
        )
    return batches


def passage_batches() -> list[LabelBatch]:
    """The same with labels at every position, other ones where the items' own labels are not."""
    source, batches = np.random.default_rng(2), []
    for answer in reference_batches():
        rows = len(answer.tokens)
        targets = torch.from_numpy(source.integers(0, VOCAB, rows * LENGTH))
        targets[answer.positions] = answer.targets
        batches.append(LabelBatch(answer.tokens, torch.arange(rows * LENGTH), targets, torch.arange(rows * LENGTH) // LENGTH))
    return batches


def plain_reference(weights: dict[str, torch.Tensor]) -> dict[str, float]:
    """Loss and accuracy over all batches, from full logits of one model."""
    model = build_model(model_config(resolve_shape(RECIPE.model), VOCAB, 0), RECIPE.seed).eval()
    model.load_state_dict(weights)
    losses, everything, right, items = [], [], 0, 0
    with torch.no_grad():
        for batch, passage in zip(reference_batches(), passage_batches(), strict=True):
            logits = model(input_ids=batch.tokens).logits.flatten(0, 1)
            everything.append(torch.nn.functional.cross_entropy(logits, passage.targets, reduction="none"))
            logits = logits[batch.positions]
            losses.append(torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none"))
            for item in set(batch.items.tolist()):
                own = batch.items == item
                items, right = items + 1, right + bool((logits[own].argmax(-1) == batch.targets[own]).all())
    return {
        "task.loss_nats": float(torch.cat(losses).mean()),
        "task.accuracy": right / items,
        "task.passage_loss_nats": float(torch.cat(everything).mean()),
    }


def case(zero_stage: int, precision: str, folder: Path, world: distributed.World) -> dict[str, Any]:
    whole = new(zero_stage, precision, world)
    losses = train(whole, 0, STEPS)
    half = new(zero_stage, precision, world)
    before = train(half, 0, STEPS // 2)
    request = Request(directory=folder / f"{zero_stage}-{precision}", kind="checkpoint", settings={}, inputs={})
    progress = checkpoint.Progress(step=STEPS // 2, stage_step=STEPS // 2, seconds=0.0, updates=STEPS // 2)
    checkpoint.save_stage(checkpoint.Saving(request, half, progress=progress, losses=np.array(before), cost=Cost()), next_lr=1e-4)
    saved = digest(half)
    state, _ = checkpoint.read_state(request.directory, dtype=torch.float32, device=torch.device("cpu"))
    read = hashlib.sha256()
    for name in dict(half.engine.module.named_parameters()):
        read.update(name.encode())
        for tensor in (state.weights[name], state.exp_avg[name], state.exp_avg_sq[name]):
            read.update(tensor.numpy().tobytes())
    resumed = new(zero_stage, precision, world)
    checkpoint.load(request.directory, resumed, "checkpoint")
    after = train(resumed, STEPS // 2, STEPS)
    weights = {name: value for name, value, *_ in whole.full_state()}
    reference = reference_metrics(whole, "task", reference_batches(), passage_batches())
    result: dict[str, Any] = {
        "losses": losses,
        "resumed_losses": before + after,
        "digest": digest(whole),
        "resumed_digest": digest(resumed),
        "saved_digest": saved,
        "state_is_saved": saved == read.hexdigest(),
        "reference": reference,
    }
    if precision == "fp32":
        expected = plain_loop()
        result["plain_losses"] = expected[0]
        result["plain_reference"] = plain_reference(expected[1])
        # over all weights: a key's bias has no gradient but rounding (softmax ignores shifts), which AdamW makes full-sized steps of
        gaps = torch.cat([(weights[name] - value).flatten() for name, value in expected[1].items()])
        result["weight_error"] = float(gaps.norm() / torch.cat([value.flatten() for value in expected[1].values()]).norm())
    return result


VARIANTS: dict[str, tuple[dict[str, Any], list[tuple[int, str]]]] = {
    "fused_loss": ({"fused_loss": "always"}, [(0, "bf16"), (2, "fp32"), (3, "bf16")]),
    "activation_checkpointing": ({"activation_checkpointing": True}, [(2, "fp32"), (3, "bf16")]),
}
MOVES = ((0, 3), (1, 0), (2, 3), (3, 2))
"""Changes of the ZeRO stage that are tried where there is little time."""
OFFLOADED = [(1, "fp32"), (2, "bf16"), (3, "bf16")]


def offloaded(zero_stage: int, precision: str, folder: Path, world: distributed.World) -> dict[str, Any]:
    """The same training with the optimizer on the host, saved on the way while training goes on."""
    whole = new(zero_stage, precision, world, offload_optimizer=True)
    losses = train(whole, 0, STEPS // 2)
    progress = checkpoint.Progress(step=STEPS // 2, stage_step=STEPS // 2, seconds=0.0, updates=STEPS // 2)
    request = Request(directory=folder / f"offloaded-{zero_stage}", kind="partial checkpoint", settings={}, inputs={})
    saving = checkpoint.Saving(request, whole, progress=progress, losses=np.array(losses), cost=Cost())
    losses += train(whole, STEPS // 2, STEPS)
    saving.finish()
    resumed = new(zero_stage, precision, world, offload_optimizer=True)
    checkpoint.load(request.directory, resumed, "partial checkpoint")
    again = train(resumed, STEPS // 2, STEPS)
    return {"losses": losses, "resumed": again, "same": digest(whole) == digest(resumed)}


def reshaped(source: int, target: int, precision: str, folder: Path, world: distributed.World) -> dict[str, Any]:
    """Training continued under another ZeRO stage."""
    trainer = new(target, precision, world)
    checkpoint.load(folder / f"{source}-{precision}", trainer, "checkpoint")
    loaded = digest(trainer)
    decays = [group["weight_decay"] for group in trainer.engine.optimizer.param_groups]
    losses = train(trainer, STEPS // 2, STEPS // 2 + 3)
    return {"losses": losses, "loaded": loaded, "weight_decays": decays, "updates": trainer.updates}


def refused(zero_stage: int, precision: str, world: distributed.World) -> dict[str, Any]:
    """Training with bad steps among good ones, and training with the good ones alone."""
    tried, good = (new(zero_stage, precision, world) for _ in range(2))
    found: dict[str, Any] = {}
    train(tried, 0, 2)
    train(good, 0, 2)
    before = digest(tried)
    batch = share(batches()[2], tried)
    poison = world.rank == 1
    # a loss above the limit; a loss that is not finite on one rank, in its first micro-batch; a gradient that is not
    found["limit"] = tried.step(batch, lr=1e-3, limit=1.0).refused
    with hooked(tried, poison, "first"):
        found["loss"] = tried.step(batch, lr=1e-3).refused
    with hooked(tried, poison, "gradient"):
        result = tried.step(batch, lr=1e-3)
        found["gradient"] = result.refused
    found["untouched"] = digest(tried) == before
    found["after"], found["expected"] = train(tried, 2, STEPS), train(good, 2, STEPS)
    found["same"] = digest(tried) == digest(good)
    found["updates"] = tried.updates
    found["stops"] = [tried.step(batch, lr=1e-3, is_to_stop=poison).is_to_stop, tried.step(batch, lr=1e-3).is_to_stop]
    return found


@contextmanager
def hooked(trainer: Trainer, poison: bool, kind: str) -> Iterator[None]:
    """On the poisoned rank, logits (of the first micro-batch) or their gradients are not finite."""
    calls = 0

    def spoil(module: Any, arguments: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        if kind == "gradient":
            output.logits.register_hook(lambda grads: grads * float("inf"))
        elif calls == 1:
            output.logits = output.logits * float("nan")
        return output

    handle = trainer.engine.module.register_forward_hook(spoil) if poison else None
    yield
    if handle:
        handle.remove()


def main() -> None:
    """Run all cases."""
    world = distributed.join(timeout_minutes=2, threads=1)
    cases = [(stage, precision) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]
    folder = Path(sys.argv[1])
    results = {f"{stage} {precision}": case(stage, precision, folder, world) for stage, precision in cases}
    is_short = len(sys.argv) == 2
    for (source, precision), target in product(cases, range(4)):
        if source != target and (not is_short or (source, target) in MOVES):
            found = reshaped(source, target, precision, folder, world)
            results[f"{source} {precision}"].setdefault("reshaped", {})[target] = found
    if is_short:
        for stage, precision in cases:
            results[f"{stage} {precision}"]["refused"] = refused(stage, precision, world)
        for name, (changes, where) in VARIANTS.items():
            for stage, precision in where:
                losses = train(new(stage, precision, world, **changes), 0, 2)
                results[f"{stage} {precision}"].setdefault("variants", {})[name] = losses
        for stage, precision in OFFLOADED:
            results[f"{stage} {precision}"]["offloaded"] = offloaded(stage, precision, folder, world)
    else:
        for stage in (0, 2):
            results[f"{stage} fp32"]["compiled"] = train(new(stage, "fp32", world, compile=True), 0, 4)
    if world.first:
        (folder / "results.json").write_text(json.dumps(results))
    distributed.leave()


if __name__ == "__main__":
    main()

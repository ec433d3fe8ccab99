"""The evaluate step: a decay branch from a stage's checkpoint, measured and thrown away."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mates.engine.config import EvaluateConfig, Recipe
from mates.engine.data.corpus import Corpus, open_corpus
from mates.engine.data.index import read_index
from mates.engine.data.loader import Batches
from mates.engine.distributed import World
from mates.engine.evaluate.by_field import DocumentValues
from mates.engine.evaluate.task_data import find_files
from mates.engine.evaluate.zero_shot import TASKS_FILE, evaluate_tasks
from mates.engine.flops import decoder_forward
from mates.engine.layout import layout_of
from mates.engine.pretrain import checkpoint
from mates.engine.pretrain.model import LabelledLoss, next_token_loss, padded_vocabulary, token_losses
from mates.engine.pretrain.schedule import decay_rate, learning_rate
from mates.engine.pretrain.shapes import resolve_shape
from mates.engine.pretrain.stage import new_trainer, open_train_corpus, training_flops
from mates.engine.pretrain.trainer import Trainer
from mates.engine.pretrain.vigilance import BadStepError
from mates.engine.progress import Progress, say
from mates.engine.random import KeyedPermutation
from mates.engine.reference.batches import LabelBatch, label_batches
from mates.engine.reference.task import open_reference
from mates.preprocess import artifact
from mates.preprocess.artifact import Cost, Manifest, Request
from mates.preprocess.inputs import InputError
from mates.preprocess.tokenizer import tokenizer_files

METRICS_FILE = "metrics.json"
DECAYED = "decayed"  # the decayed weights as a Hugging Face folder, while tasks are measured


def evaluate_request(recipe: Recipe, method: str, stage: int) -> Request:
    """The evaluation of the checkpoint of ``stage``."""
    layout, config = layout_of(recipe), recipe.evaluate
    test = artifact.load(layout.reference("test"), "reference")
    inputs = {
        "checkpoint": artifact.load(layout.checkpoint(method, stage), "checkpoint").fingerprint,
        "holdout": artifact.load(layout.corpus("holdout"), "corpus").fingerprint,
        f"reference.{test.settings['name']}": test.fingerprint,
    }
    settings: dict[str, Any] = {"decay_steps": config.decay_steps, "holdout_samples": config.holdout_samples, "stage": stage}
    if recipe.probe.after_decay:
        settings["state"] = True  # the end of the branch is kept for the probe
    if config.passages:  # what is not asked for is not named: evaluations from before it could be are still found
        settings["passages"] = True
    if config.by is not None:
        settings["by"] = config.by
    if config.tasks:
        settings["tasks"] = {"names": list(config.tasks), "limit": config.task_limit, "seed": recipe.corpus.split_seed}
        inputs["tasks"] = _tasks_fingerprint(config, layout.evaluation(method, stage))
    return Request(directory=layout.evaluation(method, stage), kind="evaluation", settings=settings, inputs=inputs)


def _tasks_fingerprint(config: EvaluateConfig, done: Path) -> str:
    """Of the tasks' files. Where they are gone that of a finished evaluation is believed, so that its report can be written anywhere.

    Raises:
        InputError: no files, and no evaluation that has read any.
    """
    try:
        folder = Path(config.task_data or "")
        return artifact.fingerprint_of([[name, [artifact.digest_of(path) for path in find_files(name, folder)]] for name in config.tasks])
    except InputError:
        evaluated = artifact.finished(done, "evaluation")
        if evaluated is None or "tasks" not in evaluated.inputs:
            raise
        return evaluated.inputs["tasks"]


def evaluate_stage(recipe: Recipe, world: World, method: str, stage: int) -> Manifest:
    """Evaluate the checkpoint of ``stage``: held-out reference loss and accuracy, held-out language-model loss, zero-shot tasks."""
    request: Request = world.same(lambda: evaluate_request(recipe, method, stage))
    done: Manifest | None = world.same(request.find)
    if done:
        return done
    start = time.perf_counter()
    layout, config = layout_of(recipe), recipe.evaluate
    corpus = open_train_corpus(recipe)
    holdout = open_corpus(layout.corpus("holdout"), recipe.pretrain.sequence_length)
    test = open_reference(layout.reference("test"))
    untracked = replace(recipe, launch=replace(recipe.launch, trackers=[]))  # a branch that is thrown away is no training to be seen
    trainer = new_trainer(untracked, world, corpus)
    trained = int(checkpoint.load(layout.checkpoint(method, stage), trainer, "checkpoint", request.directory).info["step"])
    index = np.asarray(read_index(layout.index(method, stage), corpus.fingerprint).ids)
    branch_start = time.perf_counter()
    _decay(recipe, trainer, corpus, index, trained, f"evaluate {method} stage {stage}")
    branch_seconds = time.perf_counter() - branch_start
    # a probe takes a step of training, not of decay
    next_lr = learning_rate(recipe.pretrain, trained + 1)
    world.same(lambda: shutil.rmtree(request.directory, ignore_errors=True))  # what an interrupted attempt left
    optimizer = checkpoint.export_state(request.directory, trainer, next_lr)[0] if recipe.probe.after_decay else None
    ids = holdout_ids(recipe, holdout.samples)
    budget = config.batch_size * recipe.pretrain.sequence_length
    measured = [test, test.over_passages()] if config.passages else [test]
    metrics: dict[str, Any] = {
        **(
            {"holdout_loss_nats": holdout_loss(trainer, holdout, ids, config.batch_size)}
            if config.by is None
            else holdout_losses_by(trainer, holdout, ids, config.batch_size, DocumentValues(holdout, config.by))
        ),
        **reference_metrics(trainer, test.name, *(label_batches(one, batch_tokens=budget, device=world.device) for one in measured)),
        "holdout_samples": len(ids),
        "reference_items": test.items,
    }
    tasks = None
    if config.tasks:
        with _as_folder(recipe, trainer, layout.checkpoint(method, stage), request.directory / DECAYED) as folder:
            tasks = evaluate_tasks(folder, world, config, recipe.corpus.split_seed)
    if world.first:
        whole = metrics.get(f"{test.name}.passage_loss_nats")
        say(
            f"evaluate {method} stage {stage}: held-out loss {metrics['holdout_loss_nats']:.4f} nats, {test.name} loss "
            f"{metrics[f'{test.name}.loss_nats']:.4f} nats, accuracy {100 * metrics[f'{test.name}.accuracy']:.1f}%"
            + ("" if whole is None else f", of whole passages {whole:.4f} nats")
        )
    cost = Cost(
        flops=evaluation_flops(
            recipe,
            corpus.info("tokenizer")["vocab_size"],
            len(ids),
            test.sizes,
        ),
        seconds=time.perf_counter() - start,
        tokens=config.decay_steps * recipe.pretrain.tokens_per_step + len(ids) * recipe.pretrain.sequence_length + len(test.tokens),
    )
    if tasks:
        cost = replace(cost, flops=cost.flops + tasks.cost.flops, tokens=cost.tokens + tasks.cost.tokens)

    def commit() -> Manifest:
        artifact.write_json(request.directory / METRICS_FILE, metrics)
        if tasks:
            artifact.write_json(request.directory / TASKS_FILE, tasks.found)
        kept = {"optimizer": optimizer, "branch": {"seconds": branch_seconds}} if optimizer else {}
        return request.commit(info=metrics | kept, cost=cost)

    result: Manifest = world.same(commit)
    return result


@contextmanager
def _as_folder(recipe: Recipe, trainer: Trainer, kept: Path, folder: Path) -> Iterator[Path]:
    """The trainer's weights as a Hugging Face folder that all ranks see: the export of the checkpoint ``kept`` where there was no decay,
    otherwise ``folder``, which is removed afterwards."""
    if recipe.evaluate.decay_steps == 0:
        yield kept / checkpoint.EXPORT
        return
    world = trainer.world
    weights = {name: values[0] for name, *values in trainer.full_state() if world.first}
    files = tokenizer_files(layout_of(recipe).tokenizer)
    world.same_after_long(lambda: checkpoint.write_export(folder, trainer, weights, files))
    yield folder
    world.same(lambda: shutil.rmtree(folder))


def evaluation_flops(recipe: Recipe, vocab_size: int, holdout_samples: int, reference: tuple[int, int, int]) -> float:
    """FLOPs of a decay branch and its measurements; ``reference`` is (items, tokens, label tokens)."""
    shape, rows = resolve_shape(recipe.model), padded_vocabulary(vocab_size, recipe.model.vocab_multiple)
    length, (items, tokens, labels) = recipe.pretrain.sequence_length, reference
    if recipe.evaluate.passages:
        labels = tokens
    decay = training_flops(recipe, vocab_size, recipe.evaluate.decay_steps * recipe.pretrain.batch_size)
    held_out = decoder_forward(shape, rows, tokens=holdout_samples * length, length=length)
    return decay + held_out + decoder_forward(shape, rows, tokens=tokens, length=tokens / items, logit_tokens=labels)


def _decay(recipe: Recipe, trainer: Trainer, corpus: Corpus, index: npt.NDArray[np.int64], trained: int, label: str) -> None:
    """Train on the stage's last samples again, with the learning rate going to 0 from that of step ``trained``."""
    steps, batch = recipe.evaluate.decay_steps, recipe.pretrain.batch_size
    start_lr = learning_rate(recipe.pretrain, trained)
    again = index[len(index) - steps * batch :]
    world = trainer.world
    batches = Batches(corpus, again, batch, rank=world.rank, ranks=world.size)
    with Progress(f"{label} decay", steps, "step", enabled=world.first) as progress, batches:
        for step, windows in enumerate(batches, 1):
            result = trainer.step(windows, decay_rate(start_lr, step, steps))
            if result.refused:
                raise BadStepError(
                    f"{label}: step {step} of the decay branch: {result.refused}; the checkpoint does not bear more training"
                )
            progress.add(1, f"loss {result.loss_nats:.4f}")


def holdout_ids(recipe: Recipe, samples: int) -> npt.NDArray[np.int64]:
    """Ids of the holdout samples that are measured: the same at every stage, and for every seed of a run on the same corpora."""
    return KeyedPermutation(samples, recipe.corpus.split_seed, "holdout")(np.arange(min(samples, recipe.evaluate.holdout_samples)))


def holdout_loss(trainer: Trainer, holdout: Corpus, ids: npt.NDArray[np.int64], batch_size: int) -> float:
    """Mean loss in nats a token over holdout samples."""
    groups = [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]

    def loss(group: npt.NDArray[np.int64]) -> list[float]:
        windows = torch.from_numpy(holdout.windows(group)).to(trainer.world.device)
        return [float(next_token_loss(trainer.engine, windows)) * len(group)]

    return _sums(trainer, groups, loss, 1)[0] / len(ids)


def holdout_losses_by(
    trainer: Trainer, holdout: Corpus, ids: npt.NDArray[np.int64], batch_size: int, values: DocumentValues
) -> dict[str, Any]:
    """Mean loss in nats a token over holdout samples, and of the tokens of the documents of each value of a field."""
    groups = [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]
    count = len(values.names)

    def sums(group: npt.NDArray[np.int64]) -> list[float]:
        windows = torch.from_numpy(holdout.windows(group)).to(trainer.world.device)
        losses = token_losses(trainer.engine, windows).double().cpu().numpy().ravel()
        codes = values.of_targets(group).ravel()
        return [*np.bincount(codes, losses, count).tolist(), *np.bincount(codes, minlength=count).tolist()]

    found = np.array(_sums(trainer, groups, sums, 2 * count))
    losses, tokens = found[:count], found[count:]
    met = [number for number in range(count) if tokens[number]]
    return {
        "holdout_loss_nats": float(losses.sum() / tokens.sum()),
        "holdout_by": {
            "field": values.field,
            "loss_nats": {values.names[number]: float(losses[number] / tokens[number]) for number in met},
            "tokens": {values.names[number]: int(tokens[number]) for number in met},
        },
    }


def reference_metrics(
    trainer: Trainer, name: str, answers: Sequence[LabelBatch], passages: Sequence[LabelBatch] | None = None
) -> dict[str, float]:
    """Mean loss in nats a label token, and the share of items all of whose label tokens are the model's likeliest.

    Args:
        trainer: whose model is measured. name: of the task. answers: its items.
        passages: the same batches with all tokens as labels; their mean loss is measured as well.
    """
    labelled = LabelledLoss(trainer.engine.module)

    def measure(pair: tuple[LabelBatch, LabelBatch]) -> list[float]:
        answer, passage = pair
        losses, hits = labelled(passage.tokens, passage.positions, passage.targets)
        everything = [float(losses.double().sum()), float(len(losses))]
        asked = torch.isin(passage.positions, answer.positions)
        losses, hits = losses[asked], hits[asked]
        missed = torch.unique(answer.items[~hits])
        right = len(torch.unique(answer.items)) - len(missed)
        return [float(losses.double().sum()), float(len(losses)), float(right), float(len(answer.tokens)), *everything]

    pairs = list(zip(answers, answers if passages is None else passages, strict=True))
    loss, labels, right, items, passage_loss, tokens = _sums(trainer, pairs, measure, 6)
    found = {f"{name}.loss_nats": loss / labels, f"{name}.accuracy": right / items}
    return found | ({} if passages is None else {f"{name}.passage_loss_nats": passage_loss / tokens})


def _sums(trainer: Trainer, work: Sequence[Any], measure: Callable[[Any], list[float]], width: int) -> list[float]:
    """Sums of measures over units of work shared out to ranks.

    With ZeRO-3 every forward pass is a collective, so all ranks make equally many: one that has run out repeats its first unit
    and leaves it out of the sum.
    """
    world, totals = trainer.world, torch.zeros(width, dtype=torch.float64)
    trainer.engine.module.eval()
    with torch.no_grad():
        for turn in range(math.ceil(len(work) / world.size)):
            number = turn * world.size + world.rank
            values = measure(work[number] if number < len(work) else work[0])
            if number < len(work):
                totals += torch.tensor(values, dtype=torch.float64)
    summed: list[float] = world.total(totals.to(world.device)).tolist()
    return summed

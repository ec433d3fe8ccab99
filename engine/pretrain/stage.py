"""One stage of pretraining: from the checkpoint before it, over its selection index, to its own checkpoint."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mates.engine.config import Recipe
from mates.engine.data.corpus import Corpus, open_corpus
from mates.engine.data.index import read_index
from mates.engine.data.loader import Batches
from mates.engine.distributed import World
from mates.engine.flops import decoder_training
from mates.engine.layout import layout_of
from mates.engine.pretrain import checkpoint
from mates.engine.pretrain.meter import Meter
from mates.engine.pretrain.model import padded_vocabulary, weights_fingerprint
from mates.engine.pretrain.schedule import learning_rate
from mates.engine.pretrain.shapes import resolve_shape
from mates.engine.pretrain.trainer import StepResult, Trainer
from mates.engine.pretrain.vigilance import BadStepError, SpikeWatch, StopRequestedError, StopSignals
from mates.engine.progress import Progress, say
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, ArtifactMismatchError, Cost, Manifest, Request
from mates.preprocess.tokenizer import tokenizer_files

NOT_IDENTITY = (
    "micro_batch_size",
    "zero_stage",
    "activation_checkpointing",
    "offload_optimizer",
    "compile",
    "fused_loss",
    "on_bad_step",
    "spike_sd",
    "checkpoint_every",
    "keep_checkpoints",
    "async_checkpoints",
    "log_every",
    "stages",
)


def training_settings(recipe: Recipe) -> dict[str, Any]:
    """What the weights depend on; how they are computed (ranks, ZeRO stage, micro-batches) may change between attempts."""
    config = {key: value for key, value in asdict(recipe.pretrain).items() if key not in NOT_IDENTITY}
    if recipe.pretrain.schedule == "cosine":
        config["total_steps"] = recipe.pretrain.total_steps
    if recipe.launch.deepspeed:  # what the keys do is DeepSpeed's; they may change the training
        config["deepspeed"] = recipe.launch.deepspeed
    return {
        "model": asdict(resolve_shape(recipe.model)) | {"vocab_multiple": recipe.model.vocab_multiple},
        "pretrain": config,
        "seed": recipe.seed,
    }


def training_flops(recipe: Recipe, corpus_vocab: int, samples: int) -> float:
    """FLOPs of training on ``samples`` samples."""
    length = recipe.pretrain.sequence_length
    rows = padded_vocabulary(corpus_vocab, recipe.model.vocab_multiple)
    return decoder_training(resolve_shape(recipe.model), rows, tokens=samples * length, length=length)


def open_train_corpus(recipe: Recipe) -> Corpus:
    """The train corpus of a recipe."""
    return open_corpus(layout_of(recipe).corpus("train"), recipe.pretrain.sequence_length)


def pretrain_request(recipe: Recipe, method: str, stage: int) -> Request:
    """The checkpoint at the end of ``stage``."""
    layout = layout_of(recipe)
    inputs = {
        "corpus": artifact.load(layout.corpus("train"), "corpus").fingerprint,
        "index": artifact.load(layout.index(method, stage), "selection index").fingerprint,
    }
    if stage > 0:
        inputs["parent"] = artifact.load(layout.checkpoint(method, stage - 1), "checkpoint").fingerprint
    elif recipe.model.weights is not None:
        inputs["weights"] = weights_fingerprint(Path(recipe.model.weights))
    settings = training_settings(recipe) | {"stage": stage}
    return Request(directory=layout.checkpoint(method, stage), kind="checkpoint", settings=settings, inputs=inputs)


def new_trainer(recipe: Recipe, world: World, corpus: Corpus, weights: Path | None = None) -> Trainer:
    """A trainer for a corpus' vocabulary, from random weights or those of a Hugging Face folder."""
    vocabulary = corpus.info("tokenizer")
    return Trainer(recipe, world, vocab_size=vocabulary["vocab_size"], end_of_document=vocabulary["end_of_document"], weights=weights)


def pretrain_stage(recipe: Recipe, world: World, method: str, stage: int, signals: StopSignals | None = None) -> Manifest:
    """Train a stage, or continue it from its last checkpoint; at once where it is complete.

    Args:
        recipe, world, method, stage: what is trained, and by whom.
        signals: of this process, where it listens to any.

    Raises:
        ArtifactError: what the stage needs is missing, damaged or does not fit.
        StopRequestedError: a rank was asked to stop, and all is saved. BadStepError: a step was not to be taken, and all before is saved.
    """
    request: Request = world.same(lambda: pretrain_request(recipe, method, stage))
    done: Manifest | None = world.same(request.find)
    layout = layout_of(recipe)
    partial = layout.partial_checkpoints(method, stage)
    if done:
        world.same(lambda: shutil.rmtree(partial, ignore_errors=True))  # what an attempt left that was killed after its last file
        return done
    started = time.perf_counter()
    if world.first:
        say(f"pretrain {method} stage {stage}: starting {world.size} rank{'s' * (world.size > 1)} with ZeRO-{recipe.pretrain.zero_stage}")
    corpus = open_train_corpus(recipe)
    index = read_index(layout.index(method, stage), corpus.fingerprint)
    wanted = recipe.pretrain.steps_per_stage * recipe.pretrain.batch_size
    if len(index.ids) != wanted:
        raise ArtifactError(
            f"{layout.index(method, stage)}: {len(index.ids)} samples, the stage trains on {wanted}; "
            "restore the recipe's steps and batch size, or remove the folder and run `mates select` again"
        )
    trainer = new_trainer(recipe, world, corpus, Path(recipe.model.weights) if stage == 0 and recipe.model.weights else None)
    run = _StageRun(recipe, trainer, corpus, index.ids, request, method, stage, started, signals)
    run.restore()
    run.train()
    manifest = run.save()
    world.same(lambda: shutil.rmtree(partial, ignore_errors=True))
    return manifest


def superseded(newest: Path, kept: int) -> list[Path]:
    """The partial checkpoints that nobody needs where ``kept`` whole ones, ``newest`` among them, are to stay.

    Those of later steps do not count as newer: they are unfinished or damaged, or training would have gone on from them. The unfinished are
    of no use; the others stay until training comes to their steps.
    """
    found = sorted(newest.parent.glob("step-*"))
    is_whole = {path: (path / artifact.MANIFEST_NAME).is_file() for path in found}
    whole = [path for path in found if path.name <= newest.name and is_whole[path]]
    return [path for path in found if path in whole[:-kept] or not is_whole[path]]


def finite(value: float) -> float | None:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else None


class _StageRun:
    """The state of a stage being trained."""

    def __init__(
        self,
        recipe: Recipe,
        trainer: Trainer,
        corpus: Corpus,
        ids: npt.NDArray[np.int64],
        request: Request,
        method: str,
        stage: int,
        started: float,
        signals: StopSignals | None,
    ) -> None:
        self.recipe, self.trainer, self.corpus, self.ids = recipe, trainer, corpus, ids
        self.layout, self.request, self.method, self.stage = layout_of(recipe), request, method, stage
        self.losses: list[float] = []
        self.skipped: list[int] = []
        self.spikes, self.signals = SpikeWatch(recipe.pretrain.spike_sd), signals
        self.saved_steps = 0
        self.seconds_before = 0.0
        self.start = started
        self.saving: checkpoint.Saving | None = None
        self.meter = Meter(recipe, trainer.world, flops_per_step=training_flops(recipe, self._vocabulary, recipe.pretrain.batch_size))

    @property
    def _vocabulary(self) -> int:
        return int(self.corpus.info("tokenizer")["vocab_size"])

    @property
    def _label(self) -> str:
        return f"pretrain {self.method} stage {self.stage}"

    @property
    def first_step(self) -> int:
        """Optimizer steps of the run before this stage."""
        return self.stage * self.recipe.pretrain.steps_per_stage

    def restore(self) -> None:
        """Continue from the stage's newest whole partial checkpoint, else from the stage before, else from scratch."""
        world = self.trainer.world
        newest: Path | None = world.same(self._newest_partial)
        if newest is not None:  # its seconds are those of the attempts before
            manifest = checkpoint.load(newest, self.trainer, "partial checkpoint")
            self.losses = list(checkpoint.read_losses(newest))
            self.saved_steps, self.skipped = len(self.losses), list(manifest.info["skipped"])
            if manifest.info["ranks"] == world.size:  # the worst of more ranks, with fewer samples each, is worse
                self.spikes = SpikeWatch(self.recipe.pretrain.spike_sd, manifest.info["recent_nats"])
            self.seconds_before = float(manifest.info["seconds"])
            if world.first:
                say(f"{self._label}: continuing from step {len(self.losses)}")
        elif self.stage > 0:
            parent = self.layout.checkpoint(self.method, self.stage - 1)
            checkpoint.load(parent, self.trainer, "checkpoint", self.request.directory)

    def _newest_partial(self) -> Path | None:
        folder = self.layout.partial_checkpoints(self.method, self.stage)
        for candidate in sorted(folder.glob("step-*"), reverse=True):
            try:
                if self._partial(candidate).find():
                    artifact.verify(candidate)
                    return candidate
            except ArtifactMismatchError:  # other settings by mistake must not cost what was trained
                raise
            except ArtifactError as error:
                say(f"passing over {candidate}: {error}")
        return None

    def _partial(self, directory: Path) -> Request:
        return replace(self.request, directory=directory, kind="partial checkpoint")

    def train(self) -> None:
        """Take the steps that are left, saving and logging on the way."""
        config, world = self.recipe.pretrain, self.trainer.world
        done = len(self.losses)
        progress = Progress(self._label, config.steps_per_stage, "step", done=done, enabled=world.first)
        batches = Batches(self.corpus, self.ids, config.batch_size, rank=world.rank, ranks=world.size, first=done)
        try:
            with progress, batches:
                self.meter.start(done)
                for step, windows in enumerate(batches, done + 1):
                    self._step(step, windows, progress)
            self._finish_partial()
        finally:
            if self.saving:
                self.saving.abandon()

    def _step(self, step: int, windows: npt.NDArray[np.integer[Any]], progress: Progress) -> None:
        config = self.recipe.pretrain
        lr = learning_rate(config, self.first_step + step)
        result = self.trainer.step(
            windows,
            lr,
            limit=self.spikes.limit(),
            is_to_stop=self.signals is not None and self.signals.received,
            is_written=self.saving is not None and self.saving.is_written,
        )
        if result.is_written:
            self._finish_partial()
        if result.refused is None:
            self.spikes.recent.append(result.worst_nats)
        else:
            self._pass_over(step, result.refused)
        self.losses.append(result.loss_nats)
        progress.add(1, f"loss {result.loss_nats:.4f}")
        if step % config.log_every == 0 or step == config.steps_per_stage:
            self._log(step, lr, result)
        if result.is_to_stop or (step % config.checkpoint_every == 0 and step < config.steps_per_stage):
            self._save_partial(in_background=config.async_checkpoints and not result.is_to_stop)
        if result.is_to_stop:
            raise StopRequestedError(f"{self._label}: stopped after step {step}, as asked; the same command continues")

    def _pass_over(self, step: int, why: str) -> None:
        """A step of the stage was not taken: go on without it or stop before it, as the recipe says."""
        label = f"{self._label}: step {step}"
        if self.recipe.pretrain.on_bad_step == "stop":
            self._save_partial()
            raise BadStepError(
                f"{label}: {why}; weights are those after step {step - 1}, and saved. Look at the step's data and the learning rate; "
                "pretrain.on_bad_step skip goes on without such steps, pretrain.spike_sd says how large a loss may be"
            )
        self.skipped.append(step)
        if self.trainer.world.first:
            say(f"WARNING: {label} is passed over: {why}")

    def _log(self, step: int, lr: float, result: StepResult) -> None:
        """Write the metrics since the last line."""
        if not self.trainer.world.first:
            return
        figures = {
            "loss_nats": finite(result.loss_nats),
            "grad_norm": finite(result.grad_norm),
            "lr": lr,
            **self.meter.read(step),
        }
        at = self.first_step + step
        how = {"ranks": self.trainer.world.size, "zero_stage": self.recipe.pretrain.zero_stage}
        line = {"time": time.time(), "method": self.method, "stage": self.stage, "step": at, "stage_step": step, **how, **figures}
        artifact.append_line(self.layout.metrics, json.dumps(line))
        self.trainer.track({f"{self.method}/{name}": value for name, value in figures.items() if isinstance(value, float)}, at)

    def _save_partial(self, *, in_background: bool = False) -> None:
        """Save after the steps that are done, where that is not saved yet."""
        steps = len(self.losses)
        if steps != self.saved_steps:
            self._finish_partial()
            self.saving = self._begin(self._partial(self.layout.partial_checkpoints(self.method, self.stage) / f"step-{steps:08d}"))
            self.saved_steps = steps
        if not in_background:
            self._finish_partial()

    def _finish_partial(self) -> None:
        """Wait for the checkpoint that is being written, commit it and drop those that are too many."""
        if self.saving is None:
            return
        saving, self.saving = self.saving, None
        saving.finish()
        newest, kept = saving.request.directory, self.recipe.pretrain.keep_checkpoints

        def drop_superseded() -> None:
            for old in superseded(newest, kept):
                artifact.unmake(old)
                shutil.rmtree(old, ignore_errors=True)

        self.trainer.world.same(drop_superseded)

    def save(self) -> Manifest:
        """The checkpoint of the stage's end."""
        return checkpoint.save_stage(
            self._begin(self.request),
            next_lr=learning_rate(self.recipe.pretrain, self.first_step + len(self.losses) + 1),
            tokenizer_files=tokenizer_files(self.layout.tokenizer),
        )

    def _begin(self, request: Request) -> checkpoint.Saving:
        seconds = self.seconds_before + time.perf_counter() - self.start
        steps = len(self.losses)
        samples = steps * self.recipe.pretrain.batch_size
        return checkpoint.Saving(
            request,
            self.trainer,
            progress=checkpoint.Progress(
                step=self.first_step + steps,
                stage_step=steps,
                seconds=seconds,
                updates=self.trainer.updates,
                skipped=tuple(self.skipped),
                recent_nats=tuple(self.spikes.recent) if request.kind == "partial checkpoint" else (),
            ),
            losses=np.asarray(self.losses, np.float64),
            cost=Cost(
                flops=training_flops(self.recipe, self._vocabulary, samples),
                seconds=seconds,
                tokens=samples * self.recipe.pretrain.sequence_length,
            ),
        )

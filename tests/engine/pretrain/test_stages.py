"""Stages of training in one process: the data of every step, wherever it was stopped, and what a checkpoint gives to others."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic_run import build_data, make_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from mates.engine.config import EvaluateConfig, ModelConfig, PretrainConfig, Recipe, RecipeError
from mates.engine.data.index import read_index
from mates.engine.distributed import World
from mates.engine.layout import layout_of
from mates.engine.pretrain import checkpoint, meter
from mates.engine.pretrain.meter import matmul_tflops
from mates.engine.pretrain.stage import new_trainer, open_train_corpus, pretrain_stage
from mates.engine.pretrain.trainer import Trainer
from mates.engine.pretrain.vigilance import StopRequestedError, StopSignals
from mates.engine.select.stage import select_stage
from mates.launchers.checks import check_model
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactMismatchError

STEPS, STAGES, BATCH = 4, 2, 4


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Two stages of random data; the corpora are there."""
    folder = tmp_path_factory.mktemp("stages")
    made = make_recipe(
        folder,
        methods=["random"],
        data_dir=str(folder / "data"),
        pretrain=PretrainConfig(
            sequence_length=32,
            batch_size=BATCH,
            micro_batch_size=2,
            stages=STAGES,
            steps_per_stage=STEPS,
            warmup_steps=2,
            precision="fp32",
            checkpoint_every=1,
            log_every=1,
        ),
        evaluate=EvaluateConfig(decay_steps=0, holdout_samples=8),
    )
    build_data(made)
    return made


class StopAfter(StopSignals):
    """Asks to stop when so many steps of the run have been seen."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    @property
    def received(self) -> bool:  # type: ignore[override]
        self._left -= 1
        return self._left == 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """The global batch of every optimizer step that is taken."""
    batches: list[list[list[int]]] = []
    step = Trainer.step

    def watched(self: Trainer, windows: np.ndarray[Any, Any], *arguments: Any, **named: Any) -> Any:
        batches.append(windows.tolist())
        return step(self, windows, *arguments, **named)

    monkeypatch.setattr(Trainer, "step", watched)
    return batches


def train(recipe: Recipe, world: World, stop_after: int = 0) -> None:
    """Both stages; a stop counts the steps of both."""
    signals = StopAfter(stop_after)
    for stage in range(STAGES):
        select_stage(recipe, "random" if stage else "shared", stage)
        pretrain_stage(recipe, world, "random" if stage else "shared", stage, signals)


def expected_batches(recipe: Recipe) -> list[list[list[int]]]:
    """The samples of the index files, in order, by plain slices of the token stream."""
    corpus, layout = open_train_corpus(recipe), layout_of(recipe)
    tokens = corpus.parts[0][1].tokens.tolist()
    ids = [read_index(layout.index("random" if stage else "shared", stage), corpus.fingerprint).ids.tolist() for stage in range(STAGES)]
    rows = [tokens[sample * 32 : sample * 32 + 33] for sample in ids[0] + ids[1]]
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


def test_every_position_continues_in_order_also_across_stages(
    recipe: Recipe, world: World, tmp_path: Path, seen: list[list[list[int]]]
) -> None:
    """Stopped after each step in turn; the last step of a stage ends it, and the next attempt begins with the next stage's index."""
    whole = replace(recipe, run_dir=str(tmp_path / "whole"))
    train(whole, world)
    expected, taken = expected_batches(whole), list(seen)
    assert taken == expected
    assert len({tuple(row) for batch in expected for row in batch}) > BATCH * STEPS  # two different indices
    last = layout_of(whole).checkpoint("random", 1)
    for position in range(1, STAGES * STEPS):
        stopped = replace(recipe, run_dir=str(tmp_path / str(position)))
        seen.clear()
        with pytest.raises(StopRequestedError):
            train(stopped, world, position)
        assert len(seen) == position
        train(stopped, world)
        assert seen == expected
        assert artifact.load(layout_of(stopped).checkpoint("random", 1)).fingerprint == artifact.load(last).fingerprint


def test_checkpoints_inside_a_stage_are_kept_as_asked(recipe: Recipe, world: World, tmp_path: Path) -> None:
    kept = replace(recipe, run_dir=str(tmp_path), pretrain=replace(recipe.pretrain, keep_checkpoints=1))
    with pytest.raises(StopRequestedError):
        train(kept, world, 3)
    folder = layout_of(kept).partial_checkpoints("shared", 0)
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]
    train(kept, world)
    assert not folder.exists()


def test_unfinished_training_with_other_settings_is_refused_and_kept(recipe: Recipe, world: World, tmp_path: Path) -> None:
    first = replace(recipe, run_dir=str(tmp_path))
    with pytest.raises(StopRequestedError):
        train(first, world, 3)
    folder = layout_of(first).partial_checkpoints("shared", 0)
    before = sorted(folder.iterdir())
    with pytest.raises(ArtifactMismatchError, match=r"pretrain.lr: 0.001, now asked 0.1"):
        train(replace(first, pretrain=replace(first.pretrain, lr=0.1)), world)
    assert sorted(folder.iterdir()) == before
    train(first, world)


@pytest.fixture(scope="module")
def trained(recipe: Recipe, world: World, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    done = replace(recipe, run_dir=str(tmp_path_factory.mktemp("trained")))
    train(done, world)
    return done


def test_the_export_gives_the_trainers_logits(trained: Recipe, world: World) -> None:
    directory = layout_of(trained).checkpoint("random", 1)
    trainer = new_trainer(trained, world, open_train_corpus(trained))
    checkpoint.load(directory, trainer, "checkpoint")
    tokens = torch.from_numpy(open_train_corpus(trained).windows(np.arange(8)))
    exported = AutoModelForCausalLM.from_pretrained(directory / "hf", attn_implementation="sdpa")
    assert exported.dtype == torch.float32
    with torch.no_grad():
        gap = exported.eval()(input_ids=tokens).logits - trainer.engine.module.eval()(input_ids=tokens).logits
    assert gap.abs().max() == 0
    assert AutoTokenizer.from_pretrained(directory / "hf").decode(tokens[0, :4])


def test_training_starts_from_a_hugging_face_folder(trained: Recipe, world: World, tmp_path: Path) -> None:
    """The first loss is that of the weights, and the weights are an input of the stage."""
    export = layout_of(trained).checkpoint("random", 1) / "hf"
    tokenizer = replace(trained.tokenizer, path=str(export))
    continued = replace(trained, run_dir=str(tmp_path), model=ModelConfig(weights=str(export)), tokenizer=tokenizer)
    check_model(continued)
    select_stage(continued, "shared", 0)
    manifest = pretrain_stage(continued, world, "shared", 0)
    assert "weights" in manifest.inputs
    corpus = open_train_corpus(continued)
    first = torch.from_numpy(corpus.windows(read_index(layout_of(continued).index("shared", 0), corpus.fingerprint).ids[:BATCH]))
    with torch.no_grad():
        own = AutoModelForCausalLM.from_pretrained(export)(input_ids=first[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(own.flatten(0, 1), first[:, 1:].flatten()).item()
    losses = checkpoint.read_losses(layout_of(continued).checkpoint("shared", 0))
    assert losses[0] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(RecipeError, match=r"model.vocab_multiple: found 4096, expected one that makes 448 rows of 400 token ids, not 4096"):
        check_model(replace(continued, model=replace(continued.model, vocab_multiple=4096)))
    with pytest.raises(RecipeError, match=r"tokenizer.path: found None, expected the tokenizer that model.weights was trained with"):
        replace(continued, tokenizer=trained.tokenizer)
    config = AutoModelForCausalLM.from_pretrained(layout_of(continued).checkpoint("shared", 0) / "hf").config
    assert (config.hidden_size, config.num_hidden_layers, config.use_cache) == (32, 1, True)


def test_documents_apart_are_another_training(trained: Recipe, world: World, tmp_path: Path) -> None:
    apart = replace(trained, run_dir=str(tmp_path), pretrain=replace(trained.pretrain, reset_at_documents=True))
    select_stage(apart, "shared", 0)
    pretrain_stage(apart, world, "shared", 0)
    losses = [checkpoint.read_losses(layout_of(recipe).checkpoint("shared", 0)) for recipe in (apart, trained)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert losses[0].tolist() != losses[1].tolist()


def test_metrics_say_how_fast_and_go_to_trackers(recipe: Recipe, world: World, tmp_path: Path) -> None:
    tracked = replace(recipe, run_dir=str(tmp_path), launch=replace(recipe.launch, peak_tflops=0.5, trackers=["tensorboard"]))
    select_stage(tracked, "shared", 0)
    pretrain_stage(tracked, world, "shared", 0)
    lines = [json.loads(line) for line in layout_of(tracked).metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    flops = artifact.load(layout_of(tracked).checkpoint("shared", 0)).cost.flops / STEPS
    for line in lines:
        assert line["peak_is"] == "launch.peak_tflops"
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] / (BATCH * 32) * flops / 0.5e12)
        assert line["memory_gib"] > 0.1
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("loss_nats", "grad_norm", "lr", "tokens_per_second", "mfu", "memory_gib"):
        found = [(event.step, event.value) for event in events.Scalars(f"shared/{name}")]
        assert found == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines], name


def test_a_tracker_that_is_not_installed_is_named(recipe: Recipe, world: World, tmp_path: Path) -> None:
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed here")
    tracked = replace(recipe, run_dir=str(tmp_path), launch=replace(recipe.launch, trackers=["wandb"]))
    with pytest.raises(RecipeError, match=r"launch.trackers: the package wandb is not installed; run `pip install wandb`"):
        new_trainer(tracked, world, open_train_corpus(tracked))


def test_the_peak_is_measured_where_it_is_not_stated() -> None:
    """Of one thread: not more than any core has, not less than a hundredth of it."""
    assert 1e-3 < matmul_tflops(torch.device("cpu"), torch.float32, size=256) < 10


@pytest.mark.parametrize(("rate", "sizes"), [(1e9, [256]), (2.7e9, [256, 512]), (1e11, [256, 512, 1024])])
def test_products_that_would_take_long_are_not_measured(monkeypatch: pytest.MonkeyPatch, rate: float, sizes: list[int]) -> None:
    """A product of 512 rows takes 0.27 and 0.099 s at the first two rates, one of 1,024 eight times that."""
    measured = []

    def rates(device: torch.device, dtype: torch.dtype, *, size: int, repeats: int) -> list[float]:
        measured.append(size)
        return [rate / 2] * (repeats - 1) + [rate]

    monkeypatch.setattr(meter, "matmul_rates", rates)
    assert matmul_tflops(torch.device("cpu"), torch.bfloat16) == rate / 1e12
    assert measured == sizes


@pytest.mark.parametrize(
    ("precision", "bf16", "stated", "said"),
    [("bf16", 1e9, None, True), ("bf16", 4e10, None, False), ("fp32", 1e9, None, False), ("bf16", 1e9, 1.0, False)],
)
def test_a_cpu_that_is_slow_in_bf16_is_said(
    recipe: Recipe,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    precision: Any,
    bf16: float,
    stated: float | None,
    said: bool,
) -> None:
    monkeypatch.setattr(meter, "matmul_rates", lambda _device, dtype, **_: [bf16 if dtype == torch.bfloat16 else 6e10])
    changed = replace(recipe, pretrain=replace(recipe.pretrain, precision=precision), launch=replace(recipe.launch, peak_tflops=stated))
    meter.Meter(changed, world, flops_per_step=1.0)
    assert ("this CPU multiplies fp32 60 times as fast as bf16; pretrain.precision: fp32" in capsys.readouterr().out) == said

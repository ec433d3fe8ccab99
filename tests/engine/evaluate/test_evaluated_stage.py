"""The evaluation of a stage: tasks on the weights after the decay branch, losses by a field of documents, and what older runs keep."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from report_pages import rows
from synthetic_run import build_data, make_recipe
from task_files import plain_rows, write_rows
from transformers import AutoModelForCausalLM

from mates.engine.config import EvaluateConfig, Recipe
from mates.engine.data.corpus import open_corpus
from mates.engine.distributed import World
from mates.engine.evaluate import stage as evaluation
from mates.engine.evaluate.report import write_report
from mates.engine.evaluate.stage import evaluate_request, evaluate_stage, holdout_ids
from mates.engine.evaluate.zero_shot import TASKS_FILE, evaluate_tasks
from mates.engine.layout import layout_of
from mates.engine.pretrain.stage import pretrain_stage
from mates.engine.select.stage import select_stage
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactMismatchError
from mates.preprocess.metadata import document_rows

SOURCES = ["news", "books", None]
TASKS = ["sciq", "boolq", "lambada"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, world: World) -> Recipe:
    """A stage that has been trained, of documents of three sources."""
    folder = tmp_path_factory.mktemp("evaluated")
    made = make_recipe(folder, data_dir=str(folder / "data"), methods=["random"])
    pretrain = replace(made.pretrain, stages=1, steps_per_stage=4, warmup_steps=1, precision="fp32")
    made = replace(made, pretrain=pretrain, model=replace(made.model, max_positions=512), evaluate=EvaluateConfig(decay_steps=0))
    documents = folder / "corpus.jsonl"
    lines = [json.loads(line) | {"source": SOURCES[number % 3]} for number, line in enumerate(documents.read_text().splitlines())]
    documents.write_text("".join(json.dumps(line) + "\n" for line in lines))
    build_data(made)
    select_stage(made, "shared", 0)
    pretrain_stage(made, world, "shared", 0)
    return made


def with_evaluation(recipe: Recipe, folder: Path, evaluate: EvaluateConfig) -> Recipe:
    """The recipe with another evaluation, in a copy of its run."""
    run = folder / "run"
    run.mkdir()
    (run / "shared").mkdir()
    (run / "shared/stage0").mkdir()
    for name in ("checkpoint", "index"):
        (run / "shared/stage0" / name).symlink_to(Path(recipe.run_dir).absolute() / "shared/stage0" / name)
    return replace(recipe, run_dir=str(run), evaluate=evaluate)


def test_evaluations_without_tasks_are_asked_for_as_before(recipe: Recipe) -> None:
    request = evaluate_request(recipe, "shared", 0)
    assert request.settings == {"decay_steps": 0, "holdout_samples": 512, "stage": 0}
    assert set(request.inputs) == {"checkpoint", "holdout", "reference.made-up"}


def test_tasks_are_measured_on_the_export_where_nothing_decays(recipe: Recipe, world: World, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install mates[eval]")
    data = write_rows(tmp_path / "data", plain_rows())
    config = EvaluateConfig(decay_steps=0, holdout_samples=8, tasks=TASKS, task_data=str(data))
    asked = with_evaluation(recipe, tmp_path, config)
    manifest = evaluate_stage(asked, world, "shared", 0)
    found = artifact.read_json(layout_of(asked).evaluation("shared", 0) / TASKS_FILE)
    expected = evaluate_tasks(layout_of(asked).checkpoint("shared", 0) / "hf", world, config, 0)
    assert found == expected.found
    assert set(manifest.files) == {TASKS_FILE, "metrics.json"}
    without = evaluate_stage(with_evaluation(recipe, make(tmp_path / "plain"), replace(config, tasks=[])), world, "shared", 0)
    assert manifest.cost.flops - without.cost.flops == pytest.approx(expected.cost.flops, rel=1e-12)
    assert manifest.cost.tokens - without.cost.tokens == expected.cost.tokens
    assert {name: value for name, value in manifest.info.items() if name != "tasks"} == without.info
    assert evaluate_request(asked, "shared", 0).find() is not None
    with pytest.raises(ArtifactMismatchError, match=r"tasks"):
        evaluate_request(replace(asked, evaluate=replace(config, task_limit=2)), "shared", 0).find()
    (data / "sciq/test.jsonl").write_text((data / "sciq/test.jsonl").read_text() * 2)
    with pytest.raises(ArtifactMismatchError, match=r"tasks"):
        evaluate_request(asked, "shared", 0).find()


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_tasks_are_measured_on_the_weights_after_the_decay(
    recipe: Recipe, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder that lm_eval is given holds the weights at the end of the branch, and is gone afterwards."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install mates[eval]")
    weights: list[dict[str, torch.Tensor]] = []
    decay = evaluation._decay

    def watched(recipe: Recipe, trainer, *more) -> None:  # type: ignore[no-untyped-def]
        decay(recipe, trainer, *more)
        weights.append({name: value.detach().clone() for name, value in trainer.engine.module.named_parameters()})

    def measured(folder: Path, *more):  # type: ignore[no-untyped-def]
        weights.append(dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters()))
        return evaluate_tasks(folder, *more)

    monkeypatch.setattr(evaluation, "_decay", watched)
    monkeypatch.setattr(evaluation, "evaluate_tasks", measured)
    data = write_rows(tmp_path / "data", plain_rows())
    config = EvaluateConfig(decay_steps=2, holdout_samples=8, tasks=["piqa"], task_data=str(data))
    asked = with_evaluation(recipe, tmp_path, config)
    manifest = evaluate_stage(asked, world, "shared", 0)
    after, read = weights
    kept = dict(AutoModelForCausalLM.from_pretrained(layout_of(recipe).checkpoint("shared", 0) / "hf").named_parameters())
    assert set(after) == set(read)
    assert all(torch.equal(after[name], read[name]) for name in after)
    assert any(not torch.equal(kept[name], read[name]) for name in read)
    directory = layout_of(asked).evaluation("shared", 0)
    assert sorted(path.name for path in directory.iterdir()) == sorted([*manifest.files, artifact.MANIFEST_NAME])


def test_losses_by_source_count_each_token_for_its_document(recipe: Recipe, world: World, tmp_path: Path) -> None:
    """Against a plain walk through the corpus: documents end with the end-of-document token."""
    asked = with_evaluation(recipe, tmp_path, EvaluateConfig(decay_steps=0, holdout_samples=40, by="source"))
    info = evaluate_stage(asked, world, "shared", 0).info
    layout, length = layout_of(asked), recipe.pretrain.sequence_length
    holdout = open_corpus(layout.corpus("holdout"), length)
    tokens = np.asarray(holdout.parts[0][1].tokens).astype(np.int64)
    end = holdout.info("tokenizer")["end_of_document"]
    document_of = np.concatenate([[0], np.cumsum(tokens == end)[:-1]])
    sources = document_rows(layout.corpus("holdout"), range(int(document_of[-1]) + 1))["source"].to_pylist()
    network = AutoModelForCausalLM.from_pretrained(layout.checkpoint("shared", 0) / "hf").double()
    losses: dict[str, list[float]] = defaultdict(list)
    for sample in holdout_ids(asked, holdout.samples):
        first = int(sample) * length
        with torch.no_grad():
            chances = network(torch.from_numpy(tokens[None, first : first + length])).logits[0].log_softmax(-1)
        for place in range(length):
            following = first + place + 1
            losses[sources[document_of[following]] or "(none)"].append(-float(chances[place, tokens[following]]))
    found = info["holdout_by"]
    assert found["field"] == "source"
    assert found["tokens"] == {source: len(values) for source, values in losses.items()}
    assert set(losses) == {"news", "books", "(none)"}
    for source, values in losses.items():
        assert found["loss_nats"][source] == pytest.approx(np.mean(values), rel=1e-6)  # of fp32 logits
    everything = evaluate_stage(
        with_evaluation(recipe, make(tmp_path / "plain"), replace(asked.evaluate, by=None)), world, "shared", 0
    ).info["holdout_loss_nats"]
    assert info["holdout_loss_nats"] == pytest.approx(everything, rel=1e-6)
    weighted = sum(found["loss_nats"][source] * found["tokens"][source] for source in losses) / sum(found["tokens"].values())
    assert weighted == pytest.approx(info["holdout_loss_nats"], rel=1e-14)


def test_the_report_shows_tasks_and_sources(recipe: Recipe, world: World, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install mates[eval]")
    data = write_rows(tmp_path / "data", plain_rows())
    config = EvaluateConfig(decay_steps=0, holdout_samples=8, by="source", tasks=["sciq", "boolq"], task_data=str(data))
    asked = with_evaluation(recipe, tmp_path, config)
    assert rows(write_report(asked).read_text())["Held-out text loss nats per token"] == ["not done yet"]
    info = evaluate_stage(asked, world, "shared", 0).info["holdout_by"]
    table = rows(write_report(asked).read_text())
    found = artifact.read_json(layout_of(asked).evaluation("shared", 0) / TASKS_FILE)
    for name, metrics in [*((name, task["metrics"]) for name, task in found["tasks"].items()), ("mean", found["mean"])]:
        accuracy, loss = metrics["acc"], metrics["loss_nats"]
        assert table[f"{name} accuracy"] == [f"{100 * accuracy['value']:.2f}% ± {100 * accuracy['stderr']:.2f}%"]
        assert table[f"{name} nats per answer"] == [f"{loss['value']:.4f} ± {loss['stderr']:.4f}"]
    assert "boolq accuracy by length" not in table
    for source, nats in info["loss_nats"].items():
        assert table[source] == [f"{info['tokens'][source]:,}", f"{nats:.4f}"]
    shutil.rmtree(data)  # the report can be written where the files are not
    assert rows(write_report(asked).read_text()) == table
    more = replace(asked, evaluate=replace(config, tasks=["sciq", "piqa"]))
    assert rows(write_report(more).read_text())["Held-out text loss nats per token"] == ["not done yet"]

"""The probe step on a checkpoint: its labels, its fidelity report, and what interruptions and ranks change (nothing)."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from mates.engine.config import (
    CorpusConfig,
    EvaluateConfig,
    ModelConfig,
    PretrainConfig,
    ProbeConfig,
    ProbeMethod,
    Recipe,
    ReferenceConfig,
    TaskConfig,
    TokenizerConfig,
)
from mates.engine.distributed import World
from mates.engine.layout import layout_of
from mates.engine.loop import DATA_VERBS
from mates.engine.pretrain import checkpoint
from mates.engine.probe import stage as stage_module
from mates.engine.probe.prober import ESTIMATES
from mates.engine.probe.stage import (
    FIDELITY_FILE,
    LABELS_FILE,
    calibration_ids,
    influence_column,
    label_weights,
    probe_stage,
    probed_samples,
    read_labels,
)
from mates.engine.probe.stage import _joined as joined
from mates.engine.reference.task import IGNORED, open_reference
from mates.launchers.local import console_script, run_plain, step_environment
from mates.launchers.recipe import write_recipe
from mates.launchers.steps import data_step, stage_step
from mates.preprocess import artifact

ONE_THREAD_ONE_SAMPLE = ("--launch.threads", "1", "--probe.chunk_size", "1")
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run whose stage 0 is trained."""
    run = tmp_path_factory.mktemp("probe") / "run"
    recipe = Recipe(
        run_dir=str(run),
        methods=["mates"],
        corpus=CorpusConfig(sample_bytes=2_500_000, pool_share=0.1, holdout_share=0.05),
        tokenizer=TokenizerConfig(vocab_size=512, train_bytes=500_000),
        reference=ReferenceConfig(items=24, test_items=8),
        model=ModelConfig(hidden_size=32, layers=2, heads=2, max_positions=256),
        pretrain=PretrainConfig(sequence_length=64, batch_size=8, micro_batch_size=8, stages=2, steps_per_stage=30, warmup_steps=4),
        probe=ProbeConfig(samples=24, fidelity_samples=12, chunk_size=4, micro_batch_size=3, subset_items=6, calibration_samples=8),
        evaluate=EvaluateConfig(decay_steps=2, holdout_samples=8),
    )
    for verb in DATA_VERBS:
        data_step(verb, recipe)
    stage_step("select", recipe, "shared", 0)
    run.mkdir(exist_ok=True)
    write_recipe(run / "test.yaml", recipe)
    run_plain([console_script("mates"), "pretrain", "--recipe", str(run / "test.yaml"), "--method", "shared", "--stage", "0"], 1)
    return recipe


def probed(recipe: Recipe, **changes: object) -> tuple[Path, artifact.Manifest]:
    """Labels made anew with other settings of the probe."""
    recipe = replace(recipe, probe=replace(recipe.probe, **changes))  # type: ignore[arg-type]
    directory = layout_of(recipe).labels("mates", 1)
    shutil.rmtree(directory, ignore_errors=True)
    return directory, probe_stage(recipe, ALONE, "mates", 1)


@pytest.mark.parametrize("method", ["exact", *ESTIMATES])
def test_labels_are_the_methods_influences(recipe: Recipe, method: ProbeMethod) -> None:
    directory, manifest = probed(recipe, method=method)
    table = pq.read_table(directory / LABELS_FILE)
    assert set(table["method"].to_pylist()) == {method} == {manifest.info["method"]}
    ids, values, _ = read_labels(directory, {"last-word": 1.0})
    assert len(ids) == len(set(ids.tolist())) == 24
    compared = pq.read_table(directory / FIDELITY_FILE).to_pydict()
    own = dict(zip(ids.tolist(), values.tolist(), strict=True))
    both = [(own[number], compared[f"{method}.last-word"][row]) for row, number in enumerate(compared["sample_id"])]
    assert len(both) == 12
    labels, again = np.array(both).T
    # micro-batches lie otherwise in the comparison's chunks: fp32 noise, in units of the scores' SD
    assert np.abs(labels - again).max() <= (1e-3 if method in ("exact", "corrected") else 1e-4) * labels.std()
    assert not list(directory.glob("*/part-*"))
    artifact.verify(directory, "labels")


def test_the_report_says_how_faithful_each_method_is(recipe: Recipe) -> None:
    _, manifest = probed(recipe, method="linear")
    report = manifest.info["fidelity"]
    assert set(report["methods"]) == {*ESTIMATES, "sgd"}
    assert report["samples"] == 12
    for method in ESTIMATES:
        found = report["methods"][method]["last-word"]["spearman"]
        assert -1 <= found["low"] <= found["value"] <= found["high"] <= 1
    assert report["methods"]["corrected"]["last-word"]["spearman"]["value"] > 0.9


def test_auto_takes_what_is_faithful_enough(recipe: Recipe) -> None:
    for least in (1e-6, 0.9, 1.0):
        info = probed(recipe, method="auto", min_fidelity=least)[1].info
        lows = {method: info["fidelity"]["methods"][method]["last-word"]["spearman"]["low"] for method in ESTIMATES}
        assert info["method"] == next((method for method in ESTIMATES if lows[method] >= least), "exact")


def test_nothing_is_compared_when_that_is_asked(recipe: Recipe) -> None:
    directory, manifest = probed(recipe, method="frozen", fidelity_samples=0)
    assert "fidelity" not in manifest.info
    assert not (directory / FIDELITY_FILE).exists()


def test_several_references_are_columns_and_one_label(recipe: Recipe, tmp_path: Path) -> None:
    directory, alone = probed(recipe, method="linear")
    name = influence_column("last-word")
    single = pq.read_table(directory / LABELS_FILE)[name].to_numpy()
    source = tmp_path / "more.jsonl"
    source.write_text("".join(json.dumps({"text": f"the {word} of the people and the {word} of the king"}) + "\n" for word in "abcdef"))
    more = [TaskConfig(name="king", format="lambada", source=str(source), items=4, weight=3.0)]
    both = replace(recipe, reference=replace(recipe.reference, more=more))
    data_step("reference", both)
    directory, manifest = probed(both, method="linear")
    table = pq.read_table(directory / LABELS_FILE)
    assert manifest.info["references"] == ["last-word", "king"]
    assert np.abs(table[name].to_numpy() - single).max() <= 1e-5 * single.std()
    king = table[influence_column("king")].to_numpy()
    assert king.std() > 0
    _, values, _ = read_labels(directory, label_weights(both))
    assert values == pytest.approx((table[name].to_numpy() + 3 * king) / 4, rel=1e-12)
    assert set(manifest.info["fidelity"]["methods"]["linear"]) == {"last-word", "king"}
    shutil.rmtree(directory)
    assert alone.inputs.items() < manifest.inputs.items()


def test_losses_over_passages_count_every_token(recipe: Recipe) -> None:
    """The loss that influences are counted from, against transformers' own model and loss on the items one by one."""
    whole = replace(recipe, reference=replace(recipe.reference, loss_over="passage"))
    _, answers = probed(recipe, method="exact", fidelity_samples=0)
    directory, passages = probed(whole, method="exact", fidelity_samples=0)
    with pytest.raises(artifact.ArtifactMismatchError):
        probe_stage(recipe, ALONE, "mates", 1)
    reference = open_reference(layout_of(recipe).reference("train"))
    model = AutoModelForCausalLM.from_pretrained(layout_of(recipe).checkpoint("shared", 0) / checkpoint.EXPORT, dtype=torch.float32)
    losses: dict[str, list[float]] = {"answers": [], "passages": []}
    for start, stop in itertools.pairwise(reference.offsets.tolist()):
        text = torch.tensor([*reference.tokens[start:stop].tolist(), int(reference.labels[stop - 1])])[None]
        with torch.no_grad():
            each = torch.nn.functional.cross_entropy(model(text).logits[0, :-1], text[0, 1:], reduction="none").tolist()
        losses["passages"] += each
        losses["answers"] += [loss for loss, label in zip(each, reference.labels[start:stop], strict=True) if label != IGNORED]
    for found, expected in ((answers, losses["answers"]), (passages, losses["passages"])):
        assert found.info["influences"]["last-word"]["baseline_loss_nats"] == pytest.approx(np.mean(expected), rel=1e-6)
    assert len(losses["passages"]) > 5 * len(losses["answers"])
    shutil.rmtree(directory)


def test_ranks_change_no_bit(recipe: Recipe) -> None:
    directory, _ = probed(recipe, method="linear")
    expected = {name: (directory / name).read_bytes() for name in (LABELS_FILE, FIDELITY_FILE)}
    shutil.rmtree(directory)
    run_plain(command(recipe), 2)
    # one thread a rank against all of them in this process would add in another order
    by_two = {name: pq.read_table(directory / name) for name in expected}
    shutil.rmtree(directory)
    run_plain([*command(recipe), "--launch.threads", "1"], 1)
    for name, table in by_two.items():
        assert pq.read_table(directory / name).equals(table), name


@pytest.mark.parametrize("method", ["exact", "linear"])
def test_a_model_in_shards_gives_the_same_labels(recipe: Recipe, method: ProbeMethod) -> None:
    directory, _ = probed(recipe, method=method)
    expected = pq.read_table(directory / LABELS_FILE)
    shutil.rmtree(directory)
    run_plain([*command(recipe), "--probe.method", method, "--probe.shard_over", "2"], 2)
    found = pq.read_table(directory / LABELS_FILE)
    assert found["sample_id"].equals(expected["sample_id"])
    for name in (influence_column("last-word"), "grad_norm"):
        values, whole = found[name].to_numpy(), expected[name].to_numpy()
        assert np.abs(values - whole).max() <= 1e-3 * whole.std()


def test_means_are_taken_over_other_samples_than_are_probed(recipe: Recipe) -> None:
    for pool in (40, 1_000):
        probed_ids = set(probed_samples(recipe, pool, 1).tolist())
        calibration = calibration_ids(recipe, pool, 1).tolist()
        assert len(set(calibration)) == recipe.probe.calibration_samples
        assert not probed_ids & set(calibration)
    # a pool that has no others
    assert set(calibration_ids(recipe, 24, 1).tolist()) <= set(probed_samples(recipe, 24, 1).tolist())


def state_file(recipe: Recipe) -> Path:
    return next((layout_of(recipe).checkpoint("shared", 0) / "state").glob("weights-*.safetensors"))


def test_a_changed_checkpoint_is_not_probed(recipe: Recipe) -> None:
    file = state_file(recipe)
    right = file.read_bytes()
    try:
        file.write_bytes(right[:-4_000] + bytes(4_000))
        with pytest.raises(artifact.ArtifactError, match=f"{re.escape(str(file))}: BLAKE3 .* the file was changed"):
            probed(recipe)
    finally:
        file.write_bytes(right)


def test_influences_that_are_not_finite_are_not_kept(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    right = checkpoint.read_state

    def broken(*arguments: Any, **options: Any) -> Any:
        state, manifest = right(*arguments, **options)
        next(iter(state.weights.values()))[0, 0] = float("nan")
        return state, manifest

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "read_state", broken)
        with pytest.raises(artifact.ArtifactError, match="influences of the first samples that were probed now are not finite"):
            probed(recipe, method="linear", fidelity_samples=0)
    directory = layout_of(recipe).labels("mates", 1)
    assert not list(directory.glob("parts/part-*"))
    assert probe_stage(replace(recipe, probe=replace(recipe.probe, method="linear", fidelity_samples=0)), ALONE, "mates", 1)


def test_a_part_that_cannot_be_read_is_made_anew(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pq.read_table(probed(recipe, method="linear")[0] / LABELS_FILE)
    asked = replace(recipe, probe=replace(recipe.probe, method="linear"))
    directory = layout_of(recipe).labels("mates", 1)
    shutil.rmtree(directory)
    for folder in ("fidelity", "parts"):
        with monkeypatch.context() as patch:
            patch.setattr(stage_module, "_joined", Mock(side_effect=KeyboardInterrupt) if folder == "fidelity" else joined_but_parts)
            with pytest.raises(KeyboardInterrupt):
                probe_stage(asked, ALONE, "mates", 1)
        (directory / folder / "part-000001.parquet").write_bytes(b"not Parquet")
        (directory / folder / "seconds.json").write_text("{")
        with pytest.raises(
            artifact.ArtifactError, match=f"{folder}/part-000001.parquet: not readable .* removed; run the same command again"
        ):
            probe_stage(asked, ALONE, "mates", 1)
    probe_stage(asked, ALONE, "mates", 1)
    assert pq.read_table(directory / LABELS_FILE).equals(expected)


def joined_but_parts(folder: Path, ids: Any) -> Any:
    if folder.name == "parts":
        raise KeyboardInterrupt
    return joined(folder, ids)


def test_the_time_of_every_attempt_is_counted(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = layout_of(recipe).labels("mates", 1)
    shutil.rmtree(directory, ignore_errors=True)
    with monkeypatch.context() as patch:
        patch.setattr(stage_module, "_joined", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            probe_stage(recipe, ALONE, "mates", 1)
    (directory / "fidelity" / "seconds.json").write_text("1000")
    assert 1_000 < probe_stage(recipe, ALONE, "mates", 1).cost.seconds < 1_900


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--model.heads", "4"], "model.heads: 2, now asked 4"),
        (["--model.tie_embeddings", "true"], "model.tie_embeddings: false, now asked true"),
        (["--model.layers", "1"], "model.layers: 2, now asked 1"),
        (["--pretrain.lr", "0.01"], "pretrain.lr: 0.001, now asked 0.01"),
    ],
)
def test_another_model_than_the_checkpoints_is_refused(recipe: Recipe, change: list[str], said: str) -> None:
    done = subprocess.run([*command(recipe), *change], env=step_environment(1), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr


def command(recipe: Recipe) -> list[str]:
    return [
        console_script("mates"),
        "probe",
        "--recipe",
        f"{recipe.run_dir}/test.yaml",
        "--method",
        "mates",
        "--stage",
        "1",
        "--probe.method",
        "linear",
    ]


def killed(recipe: Recipe, times: int) -> None:
    """Probe with this many SIGKILLs, each a moment after some chunk was done."""
    source = random.Random(0)
    directory = layout_of(recipe).labels("mates", 1)
    for _ in range(times):
        before = len(list(directory.glob("*/part-*")))
        process = subprocess.Popen([*command(recipe), *ONE_THREAD_ONE_SAMPLE], env=step_environment(1), stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list(directory.glob("*/part-*"))) == before:
            time.sleep(0.005)
        time.sleep(source.random() * 0.05)
        process.kill()
        process.wait()


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1_800)])])
def test_a_killed_run_ends_with_the_labels_of_an_undisturbed_one(recipe: Recipe, times: int) -> None:
    directory = layout_of(recipe).labels("mates", 1)
    shutil.rmtree(directory, ignore_errors=True)
    alone = [*command(recipe), *ONE_THREAD_ONE_SAMPLE]
    run_plain(alone, 1)
    expected = {name: pq.read_table(directory / name) for name in (LABELS_FILE, FIDELITY_FILE)}
    shutil.rmtree(directory)
    killed(recipe, times)
    run_plain(alone, 1)
    for name, table in expected.items():
        assert pq.read_table(directory / name).equals(table), name

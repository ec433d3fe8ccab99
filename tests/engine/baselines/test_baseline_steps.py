"""Each baseline through the steps that score and select, against an independent computation of what it is defined as."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from synthetic_run import build_data, make_recipe
from transformers import AutoModelForCausalLM

from mates.engine.baselines.quality import PENALTY, without
from mates.engine.baselines.scorers import _Checkpoint, baseline_request
from mates.engine.config import BaselinesConfig, Method, PretrainConfig, Recipe, RecipeError
from mates.engine.data.blocks import make_blocks
from mates.engine.data.corpus import open_corpus
from mates.engine.data.index import read_index
from mates.engine.distributed import World
from mates.engine.influence.bags import ngram_features
from mates.engine.influence.model import Samples
from mates.engine.influence.score import open_scores, score_stage
from mates.engine.layout import layout_of
from mates.engine.loop import Step, run_steps
from mates.engine.plan import make_plan
from mates.engine.pretrain.stage import open_train_corpus
from mates.engine.random import gumbel
from mates.engine.reference.task import Reference, open_references
from mates.engine.select.stage import select_stage
from mates.launchers.checks import check_paths, check_sizes
from mates.launchers.local import console_script, run_plain
from mates.launchers.recipe import write_recipe
from mates.launchers.steps import chosen_stage
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError
from mates.preprocess.features import ngram_buckets

LENGTH, METHODS = 32, ["dsir", "semdedup", "quality", "perplexity", "ratings"]
Floats = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def world() -> World:
    return World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run whose shared stage is trained, with ratings of its samples."""
    folder = tmp_path_factory.mktemp("baselines")
    made = make_recipe(
        folder,
        methods=METHODS,
        pretrain=PretrainConfig(sequence_length=LENGTH, batch_size=4, micro_batch_size=4, stages=2, steps_per_stage=25, warmup_steps=5),
        baselines=BaselinesConfig(ratings=str(folder / "ratings.npy")),
    )
    build_data(made)
    np.save(folder / "ratings.npy", np.random.default_rng(0).normal(size=open_train_corpus(made).samples).astype(np.float32))
    select_stage(made, "shared", 0)
    write_recipe(folder / "test.yaml", made)  # DeepSpeed bears one process group in a process, which is another test's
    run_plain([console_script("mates"), "pretrain", "--recipe", str(folder / "test.yaml"), "--method", "shared", "--stage", "0"], 1)
    return made


def scored(recipe: Recipe, world: World, method: str) -> Floats:
    """Scores of a method's candidates, through the step."""
    score_stage(recipe, world, method, 1)
    found = open_scores(layout_of(recipe).scores(method, 1), open_train_corpus(recipe).fingerprint)
    assert found.manifest.info["references"] == [method]
    return found.read()[:, 0].astype(np.float64)


def chosen(recipe: Recipe, method: str) -> list[int]:
    artifact.unmake(layout_of(recipe).index(method, 1))
    select_stage(recipe, method, 1)
    return [int(one) for one in read_index(layout_of(recipe).index(method, 1), open_train_corpus(recipe).fingerprint).ids]


def candidates(recipe: Recipe) -> npt.NDArray[np.int64]:
    return make_blocks(recipe, open_train_corpus(recipe).samples).candidates(1)


def windows(recipe: Recipe) -> npt.NDArray[np.int64]:
    return open_train_corpus(recipe).windows(candidates(recipe))


def the_lowest(recipe: Recipe, scores: Floats) -> list[int]:
    """Ids of the k lowest scores in the order of the block."""
    k = recipe.pretrain.steps_per_stage * recipe.pretrain.batch_size
    return [int(number) for number in candidates(recipe)[np.sort(np.argsort(scores, kind="stable")[:k])]]


def bucket_counts(tokens: npt.NDArray[np.integer]) -> Counter[int]:
    return Counter(bucket for one in tokens for buckets in ngram_buckets(np.asarray(one)) for bucket in buckets.tolist())


def items_of(reference: Reference) -> list[list[int]]:
    """Each item whole: its inputs, and the last label."""
    return [[*reference.tokens[a:b].tolist(), int(reference.labels[b - 1])] for a, b in pairwise(reference.offsets)]


def test_dsir_by_counting(recipe: Recipe, world: World) -> None:
    pool = open_corpus(layout_of(recipe).corpus("pool"), LENGTH)
    raw = bucket_counts(pool.windows(np.arange(pool.samples))[:, :-1])
    (reference,) = open_references(recipe)
    target = bucket_counts(items_of(reference))  # type: ignore[arg-type]

    def weight(window: npt.NDArray[np.int64]) -> float:
        total = 0.0
        for bucket, count in bucket_counts(window[None]).items():
            p, q = target[bucket] / target.total(), raw[bucket] / raw.total()
            total += count * (np.log(p + 1e-8) - np.log(q + 1e-8))
        return total

    expected = np.array([-weight(window) for window in windows(recipe)[:, :-1]])
    found = scored(recipe, world, "dsir")
    assert found == pytest.approx(expected, rel=1e-6)
    keys = -found + gumbel(candidates(recipe), recipe.seed, "select", 1)
    assert chosen(recipe, "dsir") == the_lowest(recipe, -keys)


@pytest.mark.parametrize("keep", ["low", "middle", "high"])
def test_perplexity_is_the_checkpoints_loss(recipe: Recipe, world: World, keep: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(layout_of(recipe).checkpoint("shared", 0) / "hf").double().eval()
    tokens = torch.from_numpy(windows(recipe))
    with torch.no_grad():
        logits = model(input_ids=tokens[:, :-1]).logits
        expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1).numpy()
    asked = replace(recipe, baselines=replace(recipe.baselines, perplexity_keep=keep))  # type: ignore[arg-type]
    found = scored(asked, world, "perplexity")
    assert found == pytest.approx(expected, rel=1e-5)
    k, order = 100, np.argsort(found, kind="stable")
    first = {"low": 0, "middle": (len(order) - k + 1) // 2, "high": len(order) - k}[keep]
    assert chosen(asked, "perplexity") == candidates(recipe)[np.sort(order[first : first + k])].tolist()


def test_semdedup_by_brute_force(recipe: Recipe, world: World) -> None:
    """One cluster, so that no cluster's seam is in the way: every sample against all that are less like the centroid than itself."""
    model = AutoModelForCausalLM.from_pretrained(layout_of(recipe).checkpoint("shared", 0) / "hf").eval()
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.from_numpy(windows(recipe)[:, :-1])).last_hidden_state
    unit = torch.nn.functional.normalize(hidden.double().mean(1), dim=1).numpy()
    centroid = unit.mean(0) / np.linalg.norm(unit.mean(0))
    order = np.argsort(unit @ centroid, kind="stable")
    expected = np.empty(len(unit))
    for place, row in enumerate(order):
        expected[row] = max(unit[row] @ unit[before] for before in order[:place]) if place else -1.0
    asked = replace(recipe, baselines=replace(recipe.baselines, semdedup_clusters=1))
    found = scored(asked, world, "semdedup")
    assert np.mean(np.abs(found - expected) > 1e-5) < 0.02  # fp32 may swap samples that are equally near to the centroid
    assert chosen(asked, "semdedup") == the_lowest(recipe, found)
    assert not (layout_of(asked).stage("semdedup", 1) / "embeddings").exists()


def test_embeddings_see_no_other_documents_where_training_does_not(recipe: Recipe, world: World) -> None:
    """Against each document of a window by itself."""
    asked = replace(recipe, pretrain=replace(recipe.pretrain, reset_at_documents=True))
    corpus = open_train_corpus(asked)
    end = corpus.info("tokenizer")["end_of_document"]
    checkpoint = layout_of(asked).checkpoint("shared", 0)
    ids = candidates(asked)[(corpus.windows(candidates(asked))[:, 1:-2] == end).any(1)][:20]
    found = _Checkpoint(asked, checkpoint, corpus, world).embeddings(Samples(corpus, ids))
    model = AutoModelForCausalLM.from_pretrained(checkpoint / "hf").eval().base_model
    seams = 0
    for window, embedding in zip(corpus.windows(ids)[:, :-1], found, strict=True):
        cuts = np.flatnonzero(window == end) + 1
        documents = [piece for piece in np.split(window, cuts) if len(piece)]
        seams += len(documents) - 1
        with torch.no_grad():
            hidden = [model(input_ids=torch.from_numpy(piece)[None]).last_hidden_state[0] for piece in documents]
        assert embedding == pytest.approx(torch.cat(hidden).mean(0).numpy(), abs=1e-5)
    assert seams > 0


def test_quality_is_a_logistic_regression_against_the_pool(recipe: Recipe, world: World) -> None:
    pool = open_corpus(layout_of(recipe).corpus("pool"), LENGTH)
    negatives = pool.windows(np.arange(pool.samples))[:, :-1]
    (reference,) = open_references(recipe)
    end = pool.info("tokenizer")["end_of_document"]

    def endless(windows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        rows = []
        for row in windows.tolist():
            if row[0] == end:
                row[0] = row[1]
            for place in range(1, len(row)):
                row[place] = row[place - 1] if row[place] == end else row[place]
            rows.append(row)
        return np.array(rows)

    stream = np.concatenate([np.array(item) for item in items_of(reference)])
    positives = stream[: len(stream) // LENGTH * LENGTH].reshape(-1, LENGTH)
    peer = LogisticRegression(C=1 / PENALTY, class_weight="balanced", tol=1e-9, max_iter=5_000, solver="newton-cg")
    peer.fit(ngram_features(np.concatenate([positives, endless(negatives)])), np.repeat([1, 0], [len(positives), len(negatives)]))
    expected = -peer.decision_function(ngram_features(endless(windows(recipe)[:, :-1])))
    found = scored(recipe, world, "quality")
    assert found == pytest.approx(expected, abs=1e-3 * float(expected.std()))
    assert chosen(recipe, "quality") == the_lowest(recipe, found)


def test_quality_towards_files_of_ones_own(recipe: Recipe, world: World, tmp_path: Path) -> None:
    good = tmp_path / "good.jsonl"
    good.write_text('{"text": "' + "aaa bbb ccc " * 200 + '"}\n')
    asked = replace(recipe, baselines=replace(recipe.baselines, quality_sources=[str(good)]), run_dir=str(tmp_path / "run"))
    asked = replace(asked, data_dir=str(layout_of(recipe).data))
    assert np.isfinite(scored(asked, world, "quality")).all()
    good.write_text('{"text": "other"}\n')
    with pytest.raises(ArtifactError, match=r"good\.jsonl: 0 samples of 32 tokens of good text, at least 2"):
        score_stage(replace(asked, run_dir=str(tmp_path / "again")), world, "quality", 1)


@pytest.mark.parametrize("best", ["high", "low"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_ratings_are_those_of_the_file(recipe: Recipe, world: World, best: str, temperature: float) -> None:
    baselines = replace(recipe.baselines, ratings_best=best, ratings_temperature=temperature)  # type: ignore[arg-type]
    asked = replace(recipe, baselines=baselines)
    assert baselines.ratings is not None
    expected = np.load(baselines.ratings)[candidates(recipe)]
    found = scored(asked, world, "ratings")
    assert found.tolist() == expected.tolist()
    values = -found if best == "high" else found
    if temperature:
        values = values / temperature - gumbel(candidates(recipe), recipe.seed, "select", 1)
    assert chosen(asked, "ratings") == the_lowest(recipe, values)


def test_ratings_in_double_precision_are_taken(recipe: Recipe, world: World, tmp_path: Path) -> None:
    """Of many doubles some are as near to each other as float32's steps; that is no reason to refuse them."""
    ratings = np.random.default_rng(0).normal(size=open_train_corpus(recipe).samples)
    first, second = candidates(recipe)[:2]
    ratings[second] = ratings[first] * (1 + 1e-12)
    np.save(tmp_path / "ratings.npy", ratings)
    asked = replace(recipe, baselines=replace(recipe.baselines, ratings=str(tmp_path / "ratings.npy")), run_dir=str(tmp_path / "run"))
    asked = replace(asked, data_dir=str(layout_of(recipe).data))
    assert scored(asked, world, "ratings") == pytest.approx(ratings[candidates(recipe)], rel=1e-6)


def test_finished_scores_are_found_where_their_ratings_are_gone(recipe: Recipe, world: World, tmp_path: Path) -> None:
    path = tmp_path / "ratings.npy"
    np.save(path, np.arange(open_train_corpus(recipe).samples, dtype=np.float32))
    asked = replace(recipe, baselines=replace(recipe.baselines, ratings=str(path)), run_dir=str(tmp_path / "run"))
    asked = replace(asked, data_dir=str(layout_of(recipe).data))
    score_stage(asked, world, "ratings", 1)
    path.unlink()
    done = artifact.load(layout_of(asked).scores("ratings", 1), "scores")
    assert baseline_request(asked, "ratings", 1)[1] == {"ratings": done.inputs["ratings"]}
    artifact.unmake(layout_of(asked).scores("ratings", 1))
    with pytest.raises(ArtifactError, match=r"ratings.npy: cannot be read"):
        baseline_request(asked, "ratings", 1)


def test_a_file_of_ratings_that_changed_makes_other_scores(recipe: Recipe, world: World, tmp_path: Path) -> None:
    path = tmp_path / "ratings.npy"
    np.save(path, np.zeros(open_train_corpus(recipe).samples, np.float32))
    asked = replace(recipe, baselines=replace(recipe.baselines, ratings=str(path)), run_dir=str(tmp_path / "run"))
    asked = replace(asked, data_dir=str(layout_of(recipe).data))
    scored(asked, world, "ratings")
    np.save(path, np.ones(open_train_corpus(recipe).samples, np.float32))
    with pytest.raises(ArtifactError, match="input ratings:"):
        score_stage(asked, world, "ratings", 1)


def test_the_loop_probes_for_no_baseline(recipe: Recipe) -> None:
    for method in METHODS:
        own = [step.verb for step in run_steps(recipe) if step.method == method]
        assert own == ["score", "select", "pretrain", "evaluate"]
        with pytest.raises(RecipeError, match=r"found .*, expected one of the recipe's methods that choose by influence"):
            chosen_stage(recipe, "probe", method, 1)
        assert chosen_stage(recipe, "score", method, 1) == (method, 1)
    assert make_plan(recipe, "dsir").flops["probe"] == 0
    assert make_plan(recipe, "perplexity").flops["score"] == layout_cost(recipe, "perplexity")


def layout_cost(recipe: Recipe, method: str) -> float:
    return artifact.load(layout_of(recipe).scores(method, 1), "scores").cost.flops


def test_missing_ratings_are_refused_before_any_work(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match=r"baselines.ratings: found None, expected a file of scores"):
        replace(recipe, baselines=BaselinesConfig())
    with pytest.raises(RecipeError, match=r"baselines.ratings: found 'nowhere.npy', expected a file that is there"):
        check_paths(replace(recipe, baselines=BaselinesConfig(ratings="nowhere.npy")))


def test_every_method_of_the_recipe_is_tried_here() -> None:
    assert set(METHODS) | {"random", "mates", "mates-topk", "mates-static"} == set(Method.__args__)  # type: ignore[attr-defined]
    assert Step("score", "dsir", 1) in list(run_steps(Recipe(methods=["dsir"])))


def test_ratings_that_float32_cannot_hold_are_refused(recipe: Recipe, world: World, tmp_path: Path) -> None:
    path, n = tmp_path / "ratings.npy", open_train_corpus(recipe).samples
    asked = replace(recipe, baselines=replace(recipe.baselines, ratings=str(path)), run_dir=str(tmp_path / "run"))
    asked = replace(asked, data_dir=str(layout_of(recipe).data))
    for values in (1.7e9 + 0.01 * np.arange(n), np.where(np.arange(n) % 2, 1e39, 0.0)):
        np.save(path, values)
        with pytest.raises(
            ArtifactError, match=r"ratings.npy: scores from .* which float32 cannot hold or tell apart; subtract their mean"
        ):
            score_stage(asked, world, "ratings", 1)


def test_quality_does_not_see_where_documents_end() -> None:
    found = without(np.array([[9, 1, 9, 9, 2, 9], [1, 2, 3, 4, 5, 9], [9, 9, 3, 9, 5, 6], [9, 9, 9, 9, 9, 9]]), 9)
    assert found.tolist() == [[1, 1, 1, 1, 2, 2], [1, 2, 3, 4, 5, 5], [3, 3, 3, 3, 5, 6], [9] * 6]


def test_settings_that_cannot_be_are_refused(recipe: Recipe, world: World) -> None:
    with pytest.raises(RecipeError, match=r"semdedup_clusters: found 1000, expected at most the 200 candidates of a stage"):
        check_sizes(replace(recipe, baselines=replace(recipe.baselines, semdedup_clusters=1000)))
    with pytest.raises(RecipeError, match=r"baselines.perplexity_keep: found 'middle', expected low or high where select.floors"):
        replace(recipe, select=replace(recipe.select, domains="url", caps={"example.com": 0.5}))


def test_the_order_of_sources_matters(recipe: Recipe, tmp_path: Path) -> None:
    """Only so many samples of good text are read, from the first files."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "x"}\n')
    orders = [[str(tmp_path / f"{name}.jsonl") for name in order] for order in ("ab", "ba")]
    settings = [
        baseline_request(replace(recipe, baselines=replace(recipe.baselines, quality_sources=order)), "quality", 1)[0] for order in orders
    ]
    assert settings[0]["quality_sources"] == settings[1]["quality_sources"][::-1]

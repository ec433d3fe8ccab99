"""Floors, caps and duplicates of a selection against brute force, and one index for any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import in_threads
from synthetic_run import build_shared, make_recipe

from mates.engine.config import Recipe as Recipes
from mates.engine.config import RecipeError, SelectConfig
from mates.engine.data.blocks import CorpusTooSmallError, make_blocks
from mates.engine.data.index import INDEX_FILE, read_index
from mates.engine.distributed import World
from mates.engine.influence.score import open_scores
from mates.engine.layout import layout_of
from mates.engine.pretrain.stage import open_train_corpus
from mates.engine.random import gumbel
from mates.engine.select import choose
from mates.engine.select import stage as stage_module
from mates.engine.select.stage import select_stage
from mates.preprocess import artifact
from mates.preprocess.metadata import document_rows

DOMAINS = ["good.org", "bad.net", "other.com"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipes:
    """A run up to the scores of stage 1, over documents of three hosts, a tenth of them twice."""
    folder = tmp_path_factory.mktemp("limits")
    made = make_recipe(folder, methods=["random", "mates", "mates-topk"])
    corpus, source = folder / "corpus.jsonl", np.random.default_rng(0)
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["url"] = f"https://www.{DOMAINS[number % 3]}:80/{number}" if number % 7 else None
    rows += [rows[number] for number in source.integers(0, len(rows), 60)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_shared(made, ["mates", "mates-topk"], ["probe", "fit", "score"])
    return made


@pytest.fixture(autouse=True, params=[False, True], ids=["sorted", "in pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with pieces of 17 candidates and radix selection."""
    if request.param:
        monkeypatch.setattr(choose, "SORTED", 0)
        monkeypatch.setattr(choose, "PIECE", 17)
        monkeypatch.setattr(stage_module, "PIECE", 17)


def asked(recipe: Recipes, **changes: Any) -> Recipes:
    return replace(recipe, select=replace(recipe.select, **changes))


def selected(recipe: Recipes, method: str, world: World | None = None) -> tuple[list[int], artifact.Manifest]:
    artifact.unmake(layout_of(recipe).index(method, 1))
    manifest = select_stage(recipe, method, 1, world)
    return read_index(layout_of(recipe).index(method, 1), open_train_corpus(recipe).fingerprint).ids.tolist(), manifest


def domains_of(recipe: Recipes, ids: np.ndarray) -> list[str]:
    """Host of the document that each sample's first token is in, one by one."""
    corpus = open_train_corpus(recipe)
    urls = []
    for sample in ids.tolist():
        folder, number = corpus.document_of(sample)
        url = document_rows(folder, [number], ["url"])["url"].to_pylist()[0]
        urls.append(url.split("/")[2].split(":")[0] if url else "")
    return urls


def keys_of(recipe: Recipes, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Candidates and their keys, larger is better."""
    corpus = open_train_corpus(recipe)
    candidates = make_blocks(recipe, corpus.samples).candidates(1)
    if method == "random":
        return candidates, -np.arange(len(candidates), dtype=np.float64)
    scores = open_scores(layout_of(recipe).scores(method, 1), corpus.fingerprint).read()[:, 0].astype(np.float64)
    if method == "mates-topk":
        return candidates, -scores
    return candidates, -scores / recipe.select.temperature + gumbel(candidates, recipe.seed, "select", 1)


@pytest.mark.parametrize("method", ["random", "mates", "mates-topk"])
@pytest.mark.parametrize(
    ("floors", "caps"),
    [
        ({"www.bad.net": 0.5}, {}),
        ({}, {"www.good.org": 0.3, "www.bad.net": 0.0}),
        ({"www.good.org": 0.4, "www.bad.net": 0.2}, {"www.good.org": 0.4, "www.other.com": 0.05}),
        ({"www.good.org": 0.95}, {}),
        ({"www.good.org": 0.335, "www.bad.net": 0.335, "www.other.com": 0.33}, {}),
    ],
)
def test_floors_and_caps_by_brute_force(recipe: Recipes, method: str, floors: dict[str, float], caps: dict[str, float]) -> None:
    limited = asked(recipe, domains="url", floors=floors, caps=caps)
    found, manifest = selected(limited, method)
    candidates, keys = keys_of(recipe, method)
    domains = domains_of(recipe, candidates)
    k = recipe.pretrain.steps_per_stage * recipe.pretrain.batch_size
    best = sorted(range(len(keys)), key=lambda row: -keys[row])
    needed = {domain: int(np.ceil(share * k - 1e-6)) for domain, share in floors.items()}
    for domain in sorted(floors)[: max(0, sum(needed.values()) - k)]:  # three thirds, each rounded up
        needed[domain] -= 1
    chosen: list[int] = []
    for domain, count in needed.items():
        chosen += [row for row in best if domains[row] == domain][:count]
    counts = {domain: sum(domains[row] == domain for row in chosen) for domain in set(domains)}
    for row in best:
        if len(chosen) == k:
            break
        if row not in chosen and counts[domains[row]] < caps.get(domains[row], 1.0) * k:
            chosen.append(row)
            counts[domains[row]] += 1
    assert found == [int(candidates[row]) for row in sorted(chosen)]
    for domain in floors | caps:
        assert manifest.info["domains"][domain]["selected"] == counts[domain]
        assert manifest.info["domains"][domain]["candidates"] == domains.count(domain)


def test_caps_that_leave_too_few_are_refused(recipe: Recipes) -> None:
    limits = {f"www.{name}": 0.1 for name in DOMAINS}
    with pytest.raises(CorpusTooSmallError, match=r"of which select.caps let \d+ be chosen; 100 are needed"):
        selected(asked(recipe, domains="url", caps=limits), "mates")


def test_a_domain_that_no_document_has_is_refused(recipe: Recipes) -> None:
    with pytest.raises(RecipeError, match=r"select.floors.good.org: found no document .* this url, expected one of its values, such as"):
        selected(asked(recipe, domains="url", floors={"good.org": 0.5}), "mates")
    with pytest.raises(RecipeError, match=r"select.domains: found 'topic', expected one of corpus.metadata_fields: url"):
        asked(recipe, domains="topic", floors={"good.org": 0.5})
    with pytest.raises(RecipeError, match=r"select.domains: found None, expected a metadata field"):
        SelectConfig(floors={"good.org": 0.5})
    with pytest.raises(RecipeError, match=r"select.floors.a: found 0.5, expected at most its cap of 0.4"):
        SelectConfig(domains="url", floors={"a": 0.5}, caps={"a": 0.4})


@pytest.mark.parametrize("method", ["random", "mates"])
def test_exact_duplicates_are_dropped_before_the_choice(recipe: Recipes, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows seldom begin where their copies do, so every third candidate is made one of an earlier one."""
    corpus = open_train_corpus(recipe)
    candidates, keys = keys_of(recipe, method)
    same_as = {int(candidates[row]): int(candidates[row // 3]) for row in range(3, len(candidates), 3)}
    plain = type(corpus).stored

    def stored(self: Any, ids: np.ndarray) -> np.ndarray:
        return plain(self, np.array([same_as.get(int(number), int(number)) for number in ids]))

    monkeypatch.setattr(type(corpus), "stored", stored)
    found, manifest = selected(asked(recipe, duplicates="exact"), method)
    seen: set[bytes] = set()
    left = []
    for row, window in enumerate(stored(corpus, candidates)[:, :-1]):
        if window.tobytes() not in seen:
            left.append(row)
        seen.add(window.tobytes())
    assert len(left) < len(candidates) * 0.8
    best = sorted(left, key=lambda row: -keys[row])[:100]
    assert found == [int(candidates[row]) for row in sorted(best)]
    assert manifest.info["candidates_left"] == len(left)


def test_near_duplicates_are_dropped(recipe: Recipes) -> None:
    """Copied documents that begin elsewhere in a window are found where windows share most of their runs of tokens."""
    low, high = (selected(asked(recipe, duplicates="near", duplicate_similarity=share), "mates")[1] for share in (0.3, 0.999))
    assert low.info["candidates_left"] < high.info["candidates_left"] <= 200


def every_way() -> Iterator[tuple[str, dict[str, Any]]]:
    limits = {"domains": "url", "floors": {"www.bad.net": 0.5}, "caps": {"www.good.org": 0.1}}
    yield from (("mates", {}), ("mates-topk", {}), ("random", limits), ("mates", limits), ("mates", {"duplicates": "near"}))


@pytest.mark.parametrize(("method", "changes"), list(every_way()))
def test_any_number_of_ranks_makes_the_same_index(recipe: Recipes, method: str, changes: dict[str, Any]) -> None:
    limited = asked(recipe, **changes)
    alone, manifest = selected(limited, method)
    path = layout_of(recipe).index(method, 1) / INDEX_FILE
    expected = path.read_bytes()
    for size in (2, 4):
        artifact.unmake(path.parent)
        manifests = in_threads(size, lambda world: select_stage(limited, method, 1, world))
        assert path.read_bytes() == expected
        assert all(one.fingerprint == manifest.fingerprint and one.info == manifest.info for one in manifests)
        assert {file.name for file in path.parent.iterdir()} == {INDEX_FILE, artifact.MANIFEST_NAME}
    assert len(alone) == 100


def test_the_folder_holds_nothing_else(recipe: Recipes, tmp_path: Path) -> None:
    selected(asked(recipe, duplicates="exact"), "mates")
    assert {file.name for file in layout_of(recipe).index("mates", 1).iterdir()} == {INDEX_FILE, artifact.MANIFEST_NAME}

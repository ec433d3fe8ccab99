"""The reference tasks of a recipe: read, written, refused, packed and opened."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import synthetic_run

from mates.engine.config import Recipe, RecipeError, ReferenceConfig, TaskConfig
from mates.engine.data import steps
from mates.engine.layout import layout_of
from mates.engine.reference.task import IGNORED, open_references, reference_folders, reference_weights
from mates.launchers.checks import check_paths
from mates.launchers.recipe import dump_recipe, load_recipe, parse_with, recipe_parser
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError

YAML = """
reference:
  name: main
  format: piqa
  source: data/piqa.jsonl.gz
  weight: 0.5
  avoid: ["arc:data/arc:test.jsonl"]
  more:
    - {name: arc-easy, format: arc, source: data/arc.jsonl, items: 64}
    - name: boolq
      format: boolq
      source: data/boolq.jsonl.zst
      items: 8
      weight: 0
"""
EXPECTED = ReferenceConfig(
    name="main",
    format="piqa",
    source="data/piqa.jsonl.gz",
    weight=0.5,
    avoid=["arc:data/arc:test.jsonl"],
    more=[
        TaskConfig(name="arc-easy", format="arc", source="data/arc.jsonl", items=64, weight=1.0),
        TaskConfig(name="boolq", format="boolq", source="data/boolq.jsonl.zst", items=8, weight=0.0),
    ],
)


def parse(*arguments: str) -> Recipe:
    return parse_with(recipe_parser("plan", ""), list(arguments))[0]


def test_a_recipe_file_and_back(tmp_path: Path) -> None:
    path, again = tmp_path / "a.yaml", tmp_path / "b.yaml"
    path.write_text(YAML)
    recipe = load_recipe(path)
    assert recipe.reference == EXPECTED
    assert recipe.reference.avoided() == [("arc", Path("data/arc:test.jsonl"))]
    assert reference_weights(recipe) == [0.5, 1.0, 0.0]
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe


def test_tasks_on_the_command_line(tmp_path: Path) -> None:
    first, second = ({"name": task.name, "format": task.format, "source": task.source, "items": task.items} for task in EXPECTED.more)
    recipe = parse("--reference.more", json.dumps([first]), "--reference.more+", json.dumps(second | {"weight": 0}))
    assert recipe.reference.more == EXPECTED.more
    assert Recipe().reference.more == []
    assert reference_weights(Recipe()) == [1.0]
    path = tmp_path / "a.yaml"
    path.write_text(YAML)
    assert parse(str(path), "--reference.more", "[]").reference == replace(EXPECTED, more=[])


TASK: dict[str, Any] = {"name": "one", "format": "arc", "source": "a.jsonl", "items": 4}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"more": [TASK, TASK]},
            "reference.more: found ['last-word', 'one', 'one'], expected different names, and others than reference.name",
        ),
        ({"more": [TASK | {"name": "last-word"}]}, "reference.more: found ['last-word', 'last-word'], expected different names"),
        ({"more": [TASK | {"name": "../x"}]}, "reference.more.name: found '../x', expected letters, digits, '-' and '_' only"),
        ({"more": [TASK | {"items": 1}]}, "reference.more (one).items: found 1, expected at least 2 items"),
        ({"more": [TASK | {"weight": -1}]}, "reference.more (one).weight: found -1.0, expected 0 or more"),
        ({"more": [TASK | {"weight": ".nan"}]}, "reference.more (one).weight: found nan, expected 0 or more"),
        ({"more": [TASK | {"format": "mmlu"}]}, "mmlu"),
        ({"more": [{"name": "one"}]}, "arguments are required: format, source, items"),
        ({"weight": -0.5}, "reference.weight: found -0.5, expected 0 or more"),
        ({"weight": 0, "more": [TASK | {"weight": 0}]}, "reference.weight: found [0.0, 0.0], expected a weight above 0 for at least one"),
        ({"format": "arc"}, "reference.format: found 'arc', expected lambada, the form of the sample's passages"),
        ({"avoid": ["a.jsonl"]}, "reference.avoid: found 'a.jsonl', expected FORMAT:PATH with one of the formats lambada, arc, boolq"),
        ({"avoid": ["arc:"]}, "reference.avoid: found 'arc:', expected FORMAT:PATH"),
    ],
)
def test_impossible_tasks_are_refused(values: dict[str, Any], message: str) -> None:
    arguments = [
        part for name, value in values.items() for part in (f"--reference.{name}", value if isinstance(value, str) else json.dumps(value))
    ]
    with pytest.raises(RecipeError) as caught:
        parse(*arguments)
    assert message in str(caught.value)


def test_files_that_are_not_there_are_refused_before_the_work(tmp_path: Path) -> None:
    here = tmp_path / "a.jsonl"
    here.touch()
    good = ReferenceConfig(source=str(here), avoid=[f"arc:{here}"], more=[TaskConfig(**TASK | {"source": str(here)})])
    check_paths(Recipe(reference=good))
    changes: list[tuple[dict[str, Any], str]] = [
        ({"source": "none"}, "reference.source"),
        ({"avoid": [f"arc:{here}", "arc:none"]}, "reference.avoid"),
        ({"more": [TaskConfig(**TASK | {"source": "none"})]}, "reference.more (one).source"),
    ]
    for change, name in changes:
        with pytest.raises(RecipeError) as caught:
            check_paths(Recipe(reference=replace(good, **change)))
        assert str(caught.value) == f"{name}: found 'none', expected a file that is there"


def test_the_step_packs_all_tasks_and_they_open_in_the_recipes_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = synthetic_run.make_recipe(tmp_path)
    arc, evaluation = tmp_path / "arc.jsonl", tmp_path / "evaluation.jsonl"
    rows = [{"question": f"Is {number} more than 3?", "choices": ["yes", "no"], "label": int(number <= 3)} for number in range(40)]
    arc.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation.write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    tasks = [TaskConfig(name="zz", format="arc", source=str(arc), items=35), TaskConfig(name="aa", format="arc", source=str(arc), items=6)]
    several = replace(recipe.reference, more=tasks, avoid=[f"arc:{evaluation}"])
    recipe = replace(recipe, reference=several)
    steps.tokenizer_step(recipe)
    capsys.readouterr()
    steps.reference_step(recipe)
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "reference: left out for overlap with reference.avoid: 0 of made-up, 5 of zz, 5 of aa"
    assert sum("left out" in line for line in said) == 1
    assert [line.split(",")[0] for line in said[-3:-1]] == ["reference: zz with 35 items", "reference: aa with 6 items"]
    found = open_references(recipe)
    assert [(reference.name, reference.items) for reference in found] == [("made-up", 8), ("zz", 35), ("aa", 6)]
    assert [reference.manifest.kind for reference in found] == ["reference"] * 3
    assert [artifact.load(folder, "reference") for folder in reference_folders(recipe)] == [reference.manifest for reference in found]
    assert len({tuple(sorted(reference.manifest.info)) for reference in found}) == 1
    assert (layout_of(recipe).data / "reference" / "more" / "zz" / "manifest.json").is_file()
    whole = open_references(replace(recipe, reference=replace(several, more=[replace(tasks[0], loss_over="passage"), tasks[1]])))
    assert (whole[0].labels == found[0].labels).all()
    assert (whole[2].labels == found[2].labels).all()
    for start, stop in itertools.pairwise(found[1].offsets):  # next tokens, and of the last the answer's
        assert whole[1].labels[start : stop - 1].tolist() == found[1].tokens[start + 1 : stop].tolist()
        assert whole[1].labels[stop - 1] == found[1].labels[stop - 1] != IGNORED
    assert whole[1].sizes == (35, len(found[1].tokens), len(found[1].tokens))
    assert found[1].sizes[2] == found[1].manifest.info["label_tokens"] < len(found[1].tokens)
    one = replace(recipe, reference=replace(several, more=tasks[1:]))
    assert [reference.name for reference in open_references(one)] == ["made-up", "aa"]
    with pytest.raises(ArtifactError):
        open_references(replace(recipe, reference=replace(several, more=[replace(tasks[0], name="none")])))


def test_without_files_to_avoid_nothing_is_said_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = synthetic_run.make_recipe(tmp_path)
    steps.tokenizer_step(recipe)
    done = steps.reference_step(recipe)
    assert "left out" not in capsys.readouterr().out
    assert [manifest.settings["half"] for manifest in done] == ["train", "test"]
    assert "format" not in done[0].settings  # a manifest that says none is one of LAMBADA's form

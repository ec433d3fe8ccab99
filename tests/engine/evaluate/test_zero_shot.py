"""Zero-shot tasks: the figures are those of lm_eval's own task definitions, and the same for any number of ranks."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import shared
from ranks import in_threads
from task_files import ITEMS, NAMES, hub_rows, plain_rows, write_model, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from mates.engine.config import EVALUATION_TASKS, EvaluateConfig, Recipe, RecipeError, require_packages
from mates.engine.distributed import World
from mates.engine.evaluate import zero_shot
from mates.engine.evaluate.zero_shot import DEFINITIONS, batches, evaluate_tasks, table
from mates.launchers.cli import main
from mates.launchers.local import console_script, run_plain

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install mates[eval]")

SHIPPED = Path(lm_eval.__file__).parent / "tasks"
ORIGINALS = {
    "sciq": "sciq/sciq.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "logiqa": "logiqa/logiqa.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "lambada": "lambada/lambada_openai.yaml",
}
NINE = [name for name in EVALUATION_TASKS if name != "lambada"]
BATCH = 4
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def model(bpe_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), bpe_dir)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "plain", plain_rows())


@pytest.fixture(scope="module")
def config(data: Path) -> EvaluateConfig:
    return EvaluateConfig(tasks=list(EVALUATION_TASKS), task_data=str(data), batch_size=BATCH)


@pytest.fixture(scope="module")
def found(model: Path, config: EvaluateConfig) -> dict[str, Any]:
    return evaluate_tasks(model, ALONE, config, 0).found


def write_originals(folder: Path, items: Mapping[str, Any]) -> Path:
    """lm_eval's own definitions, with nothing but the data set replaced by local files in the hub's form."""
    write_rows(folder / "data", items)
    for name in items:
        file = str(folder / "data" / name / f"{NAMES.get(name, 'test')}.jsonl")
        changed = {
            "include": str(SHIPPED / ORIGINALS[name]),
            "task": f"own_{name}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": dict.fromkeys(("train", "validation", "test"), file)},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(changed))
    return folder


def accuracies(results: Mapping[str, Mapping[str, Any]], prefix: str = "") -> dict[str, dict[str, tuple[float, float]]]:
    """Values and standard errors of lm_eval's results."""
    return {
        name.removeprefix(prefix): {
            metric: (task[f"{metric},none"], task[f"{metric}_stderr,none"]) for metric in ("acc", "acc_norm") if f"{metric},none" in task
        }
        for name, task in results.items()
    }


def own_accuracies(found: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, float]]]:
    return {
        name: {metric: (item["value"], item["stderr"]) for metric, item in task["metrics"].items() if metric.startswith("acc")}
        for name, task in found["tasks"].items()
    }


def test_figures_are_those_of_lm_evals_own_definitions(
    model: Path, found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import config as datasets_config
    from lm_eval.tasks import TaskManager

    from mates.engine.evaluate.task_data import read_task

    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # lm_eval's bootstrap forks this process, whose threads may hold locks
    rows = hub_rows(plain_rows())
    held_out = {row["text"] for row in read_task("lambada", write_rows(tmp_path / "all", {"lambada": rows["lambada"]}), 0)}
    rows["lambada"] = [row for row in rows["lambada"] if row["text"] in held_out]
    folder = write_originals(tmp_path / "own", rows)
    results = lm_eval.simple_evaluate(
        "hf",
        model_args={"pretrained": str(model)},
        tasks=[f"own_{name}" for name in EVALUATION_TASKS],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=BATCH,
        device="cpu",
        bootstrap_iters=2,
    )
    assert own_accuracies(found) == accuracies(results["results"], "own_")
    assert any(0 < value < 1 for task in own_accuracies(found).values() for value, _ in task.values())
    assert found["tasks"]["lambada"]["metrics"]["perplexity"]["value"] == results["results"]["own_lambada"]["perplexity,none"]
    for name in EVALUATION_TASKS:
        samples, metrics = results["samples"][f"own_{name}"], found["tasks"][name]["metrics"]
        right = [right_answer(name, sample["doc"]) for sample in samples]
        losses = [-sample["filtered_resps"][number][0] for sample, number in zip(samples, right, strict=True)]
        sizes = [len(sample["arguments"][number][1].encode()) for sample, number in zip(samples, right, strict=True)]
        assert metrics["loss_nats"]["n"] == len(samples)
        assert metrics["loss_nats"]["value"] == sum(losses) / len(losses)
        assert metrics["loss_nats"]["stderr"] == pytest.approx(np.std(losses, ddof=1) / math.sqrt(len(losses)), rel=1e-13)
        assert metrics["bits_per_byte"]["value"] == pytest.approx(np.mean(np.array(losses) / sizes / math.log(2)), rel=1e-14)


def right_answer(name: str, row: Mapping[str, Any]) -> int:
    """Which answer of an item in the hub's form is right, read from its fields."""
    if "answerKey" in row:
        return int(row["answerKey"]) - 1
    if name == "logiqa":
        return "abcd".index(row["label"])
    return (
        {"sciq": 3, "lambada": 0}[name]
        if name in ("sciq", "lambada")
        else int(row["answer"]) - 1
        if name == "winogrande"
        else int(row["label"])
    )


def test_definitions_say_what_lm_evals_say() -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    assert {path.stem for path in DEFINITIONS.glob("*.yaml")} == set(EVALUATION_TASKS)
    for name, original in ORIGINALS.items():
        ours, theirs = load_yaml(DEFINITIONS / f"{name}.yaml"), load_yaml(SHIPPED / original)
        for key in ("output_type", "doc_to_choice", "target_delimiter", "description", "filter_list", "process_results"):
            assert ours.get(key) == theirs.get(key), (name, key)
        for key in ("doc_to_text", "doc_to_target"):
            assert getattr(ours[key], "__qualname__", ours[key]) == getattr(theirs[key], "__qualname__", theirs[key]), (name, key)
        assert [item["metric"] for item in ours["metric_list"]] == [item["metric"] for item in theirs["metric_list"]]
        assert ours["metadata"]["version"] == theirs["metadata"]["version"]


def test_losses_are_those_of_a_plain_forward_pass(model: Path, data: Path) -> None:
    found = evaluate_tasks(model, ALONE, EvaluateConfig(tasks=["piqa", "boolq"], task_data=str(data)), 0).found["tasks"]
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model).double(), AutoTokenizer.from_pretrained(model)
    for name, rows in plain_rows().items():
        if name not in found:
            continue
        losses, bits = [], []
        for row in rows:
            if name == "piqa":
                context, answer = f"Question: {row['goal']}\nAnswer:", " " + (row["sol1"], row["sol2"])[row["label"]]
            else:
                context, answer = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", " yes" if row["answer"] else " no"
            whole, first = tokenizer(context + answer)["input_ids"], len(tokenizer(context)["input_ids"])
            with torch.no_grad():
                chances = network(torch.tensor([whole])).logits[0].log_softmax(-1)
            losses.append(-sum(float(chances[place - 1, whole[place]]) for place in range(first, len(whole))))
            bits.append(losses[-1] / math.log(2) / len(answer.encode()))
        assert found[name]["metrics"]["loss_nats"]["value"] == pytest.approx(np.mean(losses), rel=1e-5)  # of fp32 weights
        assert found[name]["metrics"]["bits_per_byte"]["value"] == pytest.approx(np.mean(bits), rel=1e-5)


def test_any_number_of_ranks_gives_the_same(model: Path, config: EvaluateConfig, found: dict[str, Any]) -> None:
    for results in in_threads(3, lambda world: evaluate_tasks(model, world, config, 0)):
        assert results.found == found


def test_batches_are_those_of_lm_eval() -> None:
    """Its own collator is asked for the same requests."""
    from lm_eval.models.utils import Collator

    draw = np.random.default_rng(0)
    tokens = [tuple(draw.integers(0, 3, draw.integers(1, 5)).tolist()) for _ in range(400)]
    requests = [((str(number), ""), list(tokens[number]), list(tokens[-number - 1])) for number in range(200)]

    def place(request: Any) -> Any:
        return -len(request[1] + request[2]), tuple(request[1] + request[2])

    theirs = Collator(requests, sort_fn=place, group_by="contexts", group_fn=lambda request: request[-2] + request[-1][:-1])
    expected = [{(*request[1], *request[2][:-1]) for request in batch} for batch in theirs.get_batched(n=7)]
    ours = batches(requests, 7)
    assert [{(*requests[number][1], *requests[number][2][:-1]) for number in batch} for batch in ours] == expected
    assert sorted(number for batch in ours for number in batch) == list(range(200))


def test_means_count_tasks_alike(found: dict[str, Any]) -> None:
    tasks = [task["metrics"] for task in found["tasks"].values()]
    for metric in ("acc", "acc_norm", "loss_nats", "bits_per_byte"):
        chosen = [task[metric] if metric in task else task["acc"] for task in tasks]
        mean = found["mean"][metric]
        assert mean["n"] == len(EVALUATION_TASKS)
        assert mean["value"] == pytest.approx(np.mean([item["value"] for item in chosen]), rel=1e-14)
        assert mean["stderr"] == pytest.approx(np.linalg.norm([item["stderr"] for item in chosen]) / len(chosen), rel=1e-14)
    assert {name for name, task in found["tasks"].items() if "acc_norm" not in task["metrics"]} == {"boolq", "winogrande", "lambada"}


def test_a_limit_takes_the_first_items_and_one_has_no_error(model: Path, data: Path) -> None:
    config = EvaluateConfig(tasks=["boolq"], task_data=str(data), task_limit=1)
    results = evaluate_tasks(model, ALONE, config, 0)
    metrics = results.found["tasks"]["boolq"]["metrics"]
    assert {(item["n"], item["stderr"]) for item in metrics.values()} == {(1, None)}
    assert results.found["tasks"]["boolq"]["files"] == ["boolq/validation.jsonl"]
    assert results.found["limit"] == 1
    row, tokenizer = plain_rows()["boolq"][0], AutoTokenizer.from_pretrained(model)
    prompt = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    read = {tuple(tokenizer(prompt + answer)["input_ids"][:-1]) for answer in (" no", " yes")}
    assert results.cost.tokens == sum(map(len, read))
    weights = 2 * (4 * 32 * 32 + 2 * 32 * 64) + 32 * 512  # layers of attention and feed-forward, output embedding
    assert results.cost.flops == sum(2 * len(one) * (weights + 2 * 2 * 32 * len(one)) for one in read)


def test_the_table_names_every_task(found: dict[str, Any]) -> None:
    lines = table(found)
    assert [line.split()[0] for line in lines] == ["task", *EVALUATION_TASKS, "mean"]
    sciq = found["tasks"]["sciq"]["metrics"]
    assert lines[1].split()[1:5] == [str(ITEMS), f"{sciq['acc']['value']:.4f}", "±", f"{sciq['acc']['stderr']:.4f}"]
    assert len({line.index(" 0.", 20) for line in lines[1:]}) == 1


# --- what can be wrong ---------------------------------------------------------------------------------------------


def test_a_missing_package_is_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(evaluate=EvaluateConfig(tasks=["sciq"], task_data=str(data)))
    require_packages(recipe)
    monkeypatch.setattr("mates.engine.config.is_installed", lambda module: module != "lm_eval")
    with pytest.raises(RecipeError, match=r"evaluate.tasks: the package lm_eval is not installed; run `pip install mates\[eval\]`"):
        require_packages(recipe)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"evaluate.tasks: found 'bolq', expected some of sciq, arc_easy"):
        EvaluateConfig(tasks=["bolq"], task_data="data")
    with pytest.raises(RecipeError, match=r"evaluate.tasks.*each task once"):
        EvaluateConfig(tasks=["boolq", "boolq"], task_data="data")
    with pytest.raises(RecipeError, match=r"evaluate.task_data: found None, expected the folder"):
        EvaluateConfig(tasks=["boolq"])
    with pytest.raises(RecipeError, match=r"evaluate.task_limit"):
        EvaluateConfig(task_limit=0)
    with pytest.raises(RecipeError, match=r"evaluate.by: found 'topic', expected null or one of corpus.metadata_fields: url"):
        Recipe(evaluate=EvaluateConfig(by="topic"))


def test_the_command_says_what_is_wrong(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        assert main(["evaluate", *arguments]) == 2
        return capsys.readouterr().err

    tasks = ["--evaluate.tasks", "[sciq]", "--evaluate.task_data"]
    assert f"--export: found '{tmp_path}', expected a Hugging Face folder" in said("--export", str(tmp_path), *tasks, str(data))
    assert "evaluate.tasks: found [], expected at least one of sciq" in said("--export", str(model))
    wrong = said("--export", str(model), *tasks, str(tmp_path))
    assert f"{tmp_path}/sciq: found no such folder, expected test.jsonl" in wrong
    assert "--out: found 'x.json', expected --export beside it" in said("--out", "x.json")


def test_a_folder_without_a_model_is_refused(model: Path, tmp_path: Path, config: EvaluateConfig) -> None:
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    with pytest.raises(RecipeError, match="found no language model that transformers opens"):
        zero_shot.evaluate_tasks(tmp_path, ALONE, config, 0)


# --- against lm_eval's own command ---------------------------------------------------------------------------------

LIMIT = 40


@pytest.mark.slow
def test_lm_evals_own_command_gives_the_same(bpe_dir: Path, tmp_path: Path) -> None:
    """The nine tasks' public files: its command on its own definitions, on ours, and `mates evaluate` on one rank and on two."""
    real = shared("eval")
    plain = {name: read_plain(real, name)[:LIMIT] for name in NINE}
    model = write_model(tmp_path / "model", bpe_dir, positions=2048)
    originals = write_originals(tmp_path / "originals", hub_rows(plain))
    own = lm_eval_command(model, originals, [f"own_{name}" for name in NINE], tmp_path / "own", [])
    ours = lm_eval_command(model, DEFINITIONS, NINE, tmp_path / "ours", ["--metadata", json.dumps({"folder": str(real)})])
    assert accuracies(own, "own_") == accuracies(ours)
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.json"
        settings = {"tasks": json.dumps(NINE), "task_data": str(real), "task_limit": str(LIMIT), "batch_size": str(BATCH)}
        options = [word for name, value in settings.items() for word in (f"--evaluate.{name}", value)]
        command = [console_script("mates"), "evaluate", "--export", str(model), *options, "--launch.threads", "1", "--out", str(out)]
        run_plain(command, ranks)
    alone, two = (json.loads((tmp_path / f"{ranks}.json").read_text()) for ranks in (1, 2))
    assert own_accuracies(alone) == accuracies(own, "own_")
    assert alone["tasks"] == two["tasks"]
    assert alone["mean"] == two["mean"]
    assert alone["cost"]["flops"] == two["cost"]["flops"] > 0


def read_plain(folder: Path, name: str) -> list[dict[str, Any]]:
    import gzip

    file = next(path for split in ("test", "validation") if (path := folder / name / f"{split}.jsonl.gz").exists())
    return [json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().splitlines()]


def lm_eval_command(model: Path, definitions: Path, tasks: list[str], out: Path, more: list[str]) -> dict[str, Any]:
    words = ["--model", "hf", "--model_args", f"pretrained={model}", "--tasks", ",".join(tasks), "--include_path", str(definitions)]
    words += ["--limit", str(LIMIT), "--batch_size", str(BATCH), "--device", "cpu", "--output_path", str(out), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(out / "cache")}
    command = [sys.executable, "-P", "-m", "lm_eval", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = out.rglob("results_*.json")
    results: dict[str, Any] = json.loads(file.read_text())["results"]
    return results

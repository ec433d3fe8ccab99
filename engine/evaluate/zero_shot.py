"""Zero-shot tasks of a Hugging Face folder, measured by lm_eval's own model class and task definitions, shared out to ranks.

Prompts, answers and accuracies are lm_eval's. Beside them stand two measures that small models move long before their accuracies do:
the mean loss of the right answer, and its bits per byte.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mates.engine.config import EvaluateConfig, RecipeError
from mates.engine.distributed import World
from mates.engine.evaluate.task_data import find_files
from mates.engine.flops import decoder_forward
from mates.engine.pretrain.shapes import read_shape
from mates.engine.progress import Progress
from mates.preprocess.artifact import Cost, read_json

DEFINITIONS = Path(__file__).parent / "tasks"
TASKS_FILE = "tasks.json"
AVERAGED = ("acc", "acc_norm", "loss_nats", "bits_per_byte")

Scored = tuple[tuple[str, str], Sequence[int], Sequence[int]]
"""What lm_eval asks a model for: texts, tokens of the context and tokens of the answer."""
Metrics = dict[str, dict[str, Any]]
"""``value``, ``stderr`` (None for a single item) and ``n`` by the metric's name."""


@dataclass(frozen=True, kw_only=True)
class TaskResults:
    """``found`` is what :data:`TASKS_FILE` holds. FLOPs are counted where the model's shape is known, and otherwise 0."""

    found: dict[str, Any]
    cost: Cost


def evaluate_tasks(model: Path, world: World, config: EvaluateConfig, seed: int) -> TaskResults:
    """Measure a model on the tasks of ``config``: all ranks take part, and all get the results, which do not depend on their number.

    Args:
        model: a Hugging Face folder with weights in safetensors and a tokenizer. world: the ranks. config: tasks, data and batch size.
        seed: which half of LAMBADA is held out (``corpus.split_seed``).

    Returns:
        For each task its files and metrics: lm_eval's ``acc``, ``acc_norm`` and ``perplexity``; ``loss_nats``, of the right answer as a
        whole after its prompt; ``bits_per_byte``, that over the answer's bytes, the space before it included, averaged over items. ``mean``
        is over tasks, and takes ``acc`` where a task has no ``acc_norm``. ``truncated`` counts sequences that the model has no room for,
        which lose their beginning.

    Raises:
        InputError: no file, or a bad item. RecipeError: a folder that is no model.
    """
    assert config.task_data is not None
    start, folder = time.perf_counter(), Path(config.task_data)
    with _quiet() as stderr:
        import lm_eval
        from lm_eval.evaluator import evaluate

        opened: list[Any] = []
        world.gathered(lambda: opened.extend((_open(model, world, config.batch_size), _load(config.tasks, folder, seed))))
        lm, tasks = opened
        lengths = _share(lm, world, f"evaluate {model}", stderr)
        results = evaluate(lm, tasks, limit=config.task_limit, bootstrap_iters=0)
    measured: dict[str, dict[str, Any]] = {
        name: {
            "files": [str(path.relative_to(folder)) for path in find_files(name, folder)],
            "metrics": _metrics(tasks["tasks"][name], results["results"][name], results["samples"][name]),
        }
        for name in config.tasks
    }
    about = {
        "lm_eval": lm_eval.__version__,
        "limit": config.task_limit,
        "truncated": sum(length > lm.max_length for length in lengths),
        "tasks": measured,
        "mean": _mean([task["metrics"] for task in measured.values()]),
    }
    read = [min(length, lm.max_length) for length in lengths]
    cost = Cost(flops=_flops(model, read), seconds=time.perf_counter() - start, tokens=sum(read))
    same: TaskResults = world.same(lambda: TaskResults(found=about, cost=cost))
    return same


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """Without lm_eval's remarks and bars, which every rank would write; errors are raised all the same. Gives the real stderr."""
    logger, stderr = logging.getLogger("lm_eval"), sys.stderr
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield stderr
    finally:
        logger.setLevel(level)


def _open(folder: Path, world: World, batch_size: int) -> Any:
    """lm_eval's model, in the dtype that the folder names."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True).to(world.device)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise RecipeError(f"{folder}: found no language model that transformers opens ({error}), expected a folder with one") from error
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _load(names: Sequence[str], folder: Path, seed: int) -> Any:
    """lm_eval's tasks out of our definitions."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(DEFINITIONS), include_defaults=False, metadata={"folder": str(folder), "seed": seed})
    return manager.load(list(names))


# --- sharing out ---------------------------------------------------------------------------------------------------


def batches(requests: Sequence[Scored], size: int) -> list[list[int]]:
    """Numbers of requests by batch, as lm_eval's model forms them: one sequence of the model's input counts once, the longest come first.

    ``size`` is the number of sequences in a batch.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (_, context, answer) in enumerate(requests):
        groups.setdefault((*context, *answer[:-1]), []).append(number)

    def place(members: list[int]) -> tuple[int, tuple[int, ...]]:
        longest = requests[max(members, key=lambda number: len(requests[number][2]))]
        return -len(longest[1]) - len(longest[2]), (*longest[1], *longest[2])

    ordered = sorted(groups.values(), key=place)
    return [list(itertools.chain(*ordered[start : start + size])) for start in range(0, len(ordered), size)]


def _share(lm: Any, world: World, label: str, stderr: Any) -> list[int]:
    """Make lm_eval's model score its batches in turn with the other ranks.

    All ranks form the batches that one forms alone, so results are the same to the last bit for any number of ranks; lm_eval's own way, to
    shard items, changes what is padded together, and its model class takes ranks for those of one machine.

    Returns:
        A list that gets the tokens of each sequence that any rank reads.
    """
    alone: Callable[..., list[tuple[float, bool]]] = lm._loglikelihood_tokens
    lengths: list[int] = []

    def shared(requests: Sequence[Scored], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        cut = batches(requests, lm.batch_size)
        lengths.extend(len(sequence) for sequence in {(*context, *answer[:-1]) for _, context, answer in requests})

        def own() -> list[tuple[int, tuple[float, bool]]]:
            found: list[tuple[int, tuple[float, bool]]] = []
            mine = cut[world.rank :: world.size]
            with contextlib.redirect_stderr(stderr), Progress(label, len(mine), "chunk", enabled=world.first) as progress:
                for batch in mine:
                    found += zip(batch, alone([requests[number] for number in batch], disable_tqdm=True), strict=True)
                    progress.add()
            return found

        scores = dict(itertools.chain.from_iterable(world.gathered(own)))
        return [scores[number] for number in range(len(requests))]

    lm._loglikelihood_tokens = shared
    return lengths


def _flops(model: Path, lengths: Sequence[int]) -> float:
    """FLOPs of reading sequences; 0 for a model of another architecture than GPT-NeoX or Llama."""
    try:
        shape = read_shape(model / "config.json")
    except RecipeError:
        return 0.0
    rows = read_json(model / "config.json")["vocab_size"]
    return math.fsum(decoder_forward(shape, rows, tokens=length, length=length) for length in lengths)


# --- metrics -------------------------------------------------------------------------------------------------------


def _metrics(task: Any, result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Metrics:
    """A task's metrics out of lm_eval's results and logged samples."""
    answers = [_right_answer(task, sample) for sample in samples]
    losses = [-log_likelihood for log_likelihood, _ in answers]
    bits = [loss / math.log(2) / size for loss, (_, size) in zip(losses, answers, strict=True)]
    found = {"loss_nats": _summary(losses), "bits_per_byte": _summary(bits)}
    own = {}
    for metric in task.aggregation():
        own[metric] = _summary([sample[metric] for sample in samples]) | {"value": float(result[f"{metric},none"])}
        if metric == "perplexity":  # to first order, where lm_eval draws samples
            error = found["loss_nats"]["stderr"]
            own[metric]["stderr"] = None if error is None else own[metric]["value"] * error
    return own | found


def _right_answer(task: Any, sample: Mapping[str, Any]) -> tuple[float, int]:
    """Log-likelihood in nats of an item's right answer, and its bytes."""
    number = 0
    if task.OUTPUT_TYPE == "multiple_choice":
        number = task.doc_to_text(sample["doc"]) if task.multiple_input else task.doc_to_target(sample["doc"])
    return sample["filtered_resps"][number][0], len(sample["arguments"][number][1].encode())


def _summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean and its standard error, as lm_eval calculates them."""
    from lm_eval.api.metrics import mean, mean_stderr

    return {"value": float(mean(values)), "stderr": float(mean_stderr(values)) if len(values) > 1 else None, "n": len(values)}


def _mean(tasks: Sequence[Metrics]) -> Metrics:
    """Means over tasks, each counting alike; ``n`` counts tasks. The standard error is that of items only: tasks are taken as given."""
    found = {}
    for metric in AVERAGED:
        chosen = [task.get(metric, task["acc"]) for task in tasks]
        errors = [item["stderr"] for item in chosen if item["stderr"] is not None]
        stderr = math.sqrt(math.fsum(error**2 for error in errors)) / len(tasks) if len(errors) == len(tasks) else None
        found[metric] = {"value": math.fsum(item["value"] for item in chosen) / len(tasks), "stderr": stderr, "n": len(tasks)}
    return found


def table(found: Mapping[str, Any]) -> list[str]:
    """Lines of a table of the results for a terminal, values with their standard errors."""

    def cell(metrics: Metrics, name: str) -> str:
        item = metrics.get(name)
        if item is None:
            return "-"
        return f"{item['value']:.4f}" + (f" ± {item['stderr']:.4f}" if item["stderr"] is not None else "")

    rows = [["task", "items", *AVERAGED]]
    for name, task in found["tasks"].items():
        rows.append([name, str(task["metrics"]["acc"]["n"]), *(cell(task["metrics"], metric) for metric in AVERAGED)])
    rows.append(["mean", "", *(cell(found["mean"], metric) for metric in AVERAGED)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]

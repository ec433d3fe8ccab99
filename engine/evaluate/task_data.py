"""Items of the zero-shot tasks, read from files of a folder as lm_eval's own task definitions expect them from the model hub.

``FOLDER/TASK/SPLIT`` is JSON lines (plain, .gz, .zst) or Parquet. The split is lm_eval's, or validation where a task has only that: test
for SciQ, ARC, LogiQA, OpenBookQA and LAMBADA (of the first four validation, if there is no file of a test split), validation for BoolQ,
HellaSwag, PIQA and WinoGrande, whose test answers are not public.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mates.engine.reference.formats import lines_of, read_passages
from mates.engine.reference.task import drop_overlapping
from mates.preprocess.inputs import InputError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
EXCERPT = 80  # characters of what was found in a message
Row = dict[str, Any]


# --- one item ------------------------------------------------------------------------------------------------------


def _texts(row: Row, *names: str) -> Row:
    for name in names:
        if not isinstance(row[name], str):
            raise TypeError(f"{name} is {row[name]!r}, expected a text")
    return {name: row[name] for name in names}


def _number(row: Row, name: str, count: int) -> int:
    """The number of the right answer, of ``count``: a number, a digit, or true for 1."""
    value = row[name]
    known = list(range(count))
    if isinstance(value, str) and value.isdigit():
        value = int(value)
    if not isinstance(value, int) or value not in known:
        raise ValueError(f"{name} is {row[name]!r}, expected the right answer as one of {', '.join(map(str, known))}")
    return int(value)


def _list(row: Row, name: str) -> list[str]:
    values = row[name]
    if not isinstance(values, list) or len(values) < 2 or not all(isinstance(value, str) for value in values):
        raise TypeError(f"{name} is {values!r}, expected a list of texts")
    return values


def _with_choices(row: Row, question: str) -> Row:
    """ARC and OpenBookQA."""
    text = _texts(row, question if question in row else "question")
    if isinstance(row["choices"], dict):
        texts, labels = _list(row["choices"], "text"), _list(row["choices"], "label")
        if len(texts) != len(labels) or str(row["answerKey"]).strip() not in labels:
            raise ValueError(f"answerKey is {row['answerKey']!r}, expected one of {len(texts)} labels, of which there are {labels!r}")
        answer = row["answerKey"]
    else:
        texts = _list(row, "choices")
        labels = list(LETTERS[: len(texts)])
        answer = labels[_number(row, "label", len(texts))]
    return {question: next(iter(text.values())), "choices": {"text": texts, "label": labels}, "answerKey": answer}


def _arc(row: Row) -> Row:
    return _with_choices(row, "question")


def _openbookqa(row: Row) -> Row:
    return _with_choices(row, "question_stem")


def _sciq(row: Row) -> Row:
    return _texts(row, "question", "distractor1", "distractor2", "distractor3", "correct_answer", "support")


def _logiqa(row: Row) -> Row:
    """The label is a letter, or a number from 0."""
    options, label = _list(row, "options"), row["label"]
    letters = LETTERS[: len(options)].lower()
    if not (isinstance(label, str) and len(label.strip()) == 1 and label.strip() in letters):
        label = letters[_number(row, "label", len(options))]
    return _texts(row, "context", "question") | {"options": options, "label": label}


def _boolq(row: Row) -> Row:
    """SuperGLUE's ``label``, or the authors' ``answer``."""
    return _texts(row, "passage", "question") | {"label": _number(row, "answer" if "answer" in row else "label", 2)}


def _hellaswag(row: Row) -> Row:
    """The authors' fields; or ``query`` and ``choices``, which lm_eval's ``process_docs`` makes of them."""
    if "query" in row:
        choices = _list(row, "choices")
        return _texts(row, "query") | {"choices": choices, "label": str(_number(row, "label", len(choices)))}
    endings = _list(row, "endings")
    return _texts(row, "activity_label", "ctx_a", "ctx_b") | {"endings": endings, "label": str(_number(row, "label", len(endings)))}


def _piqa(row: Row) -> Row:
    return _texts(row, "goal", "sol1", "sol2") | {"label": _number(row, "label", 2)}


def _winogrande(row: Row) -> Row:
    found = _texts(row, "sentence", "option1", "option2", "answer")
    if found["answer"] not in ("1", "2") or "_" not in found["sentence"]:
        raise ValueError(f"answer is {found['answer']!r}, expected 1 or 2 and a '_' in the sentence")
    return found


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a task's items are and what an item becomes: names of files without their endings, the first that is there is taken."""

    stems: tuple[str, ...]
    item: Callable[[Row], Row]


TESTED, VALIDATED = ("test", "validation"), ("validation",)
SOURCES: Mapping[str, Source] = {
    "sciq": Source(stems=TESTED, item=_sciq),
    "arc_easy": Source(stems=TESTED, item=_arc),
    "arc_challenge": Source(stems=TESTED, item=_arc),
    "logiqa": Source(stems=TESTED, item=_logiqa),
    "openbookqa": Source(stems=TESTED, item=_openbookqa),
    "boolq": Source(stems=VALIDATED, item=_boolq),
    "hellaswag": Source(stems=VALIDATED, item=_hellaswag),
    "piqa": Source(stems=VALIDATED, item=_piqa),
    "winogrande": Source(stems=VALIDATED, item=_winogrande),
    "lambada": Source(stems=("test", "lambada_test"), item=lambda row: _texts(row, "text")),
}


# --- files ---------------------------------------------------------------------------------------------------------


def find_files(task: str, folder: Path) -> list[Path]:
    """The file of a task, or the shards that the model hub cuts it into.

    Raises:
        InputError: none, or several that could be meant.
    """
    place, stems = folder / task, SOURCES[task].stems
    names = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
    endings = r"\.(jsonl|jsonl\.gz|jsonl\.zst|parquet)" if task != "lambada" else r"\.(jsonl|jsonl\.gz|jsonl\.zst)"
    for stem in stems:
        whole = [name for name in names if re.fullmatch(re.escape(stem) + endings, name)]
        shards = [name for name in names if re.fullmatch(re.escape(stem) + r"-\d+-of-\d+" + endings, name)]
        if len(whole) > 1 or (whole and shards):
            raise InputError(f"{place}: found {', '.join(whole + shards)}, expected one of them")
        if whole or shards:
            return [place / name for name in whole or shards]
    found = ", ".join(names[:8]) or ("an empty folder" if place.is_dir() else "no such folder")
    raise InputError(
        f"{place}: found {found}, expected {' or '.join(f'{stem}.jsonl' for stem in stems)} (or .jsonl.gz, .jsonl.zst, .parquet); "
        f"evaluate.task_data names the folder that has one of the name {task}"
    )


def read_task(task: str, folder: Path, seed: int) -> list[Row]:
    """The items of a task in the order of its file, in the form that the model hub has them.

    Of LAMBADA these are the passages of the half that ``mates reference`` holds out by this seed (``corpus.split_seed``), less those
    that share a 13-gram with any passage of the other half.

    Raises:
        InputError: no file, or an item without its fields or its answer; it names file and line, found and expected.
    """
    files = find_files(task, folder)
    if task == "lambada":
        passages = [passage for file in files for passage in read_passages(file, seed)]
        held_out = [passage for passage in passages if passage.half == "test"]
        kept, _ = drop_overlapping(held_out, [passage for passage in passages if passage.half == "train"])
        found = [{"text": passage.text} for passage in kept]
    else:
        found = [_item(task, row, place) for file in files for place, row in _rows(file)]
    if not found:
        raise InputError(f"{files[0]}: found no item, expected at least one of {task}")
    if "endings" in found[0]:
        from datasets import Dataset
        from lm_eval.tasks.hellaswag.utils import process_docs

        found = list(process_docs(Dataset.from_list(found)))
    return found


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Place (``file:line``) and contents of each item."""
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            rows = pq.read_table(file).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file}: found no readable Parquet file ({error}). Fetch it again") from error
        yield from ((f"{file}: row {number}", row) for number, row in enumerate(rows, 1))
        return
    for place, line in lines_of(file):
        try:
            yield place, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place}: found {line[:EXCERPT].decode(errors='replace')!r}, expected a JSON object") from error


def _item(task: str, row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise InputError(f"{place}: found {str(row)[:EXCERPT]!r}, expected a JSON object, an item of {task}")
    try:
        return SOURCES[task].item(row)
    except KeyError as error:
        raise InputError(f"{place}: found the fields {', '.join(row)}, expected an item of {task} with {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{place}: {error}, in an item of {task}") from error


def dataset(*, task: str, folder: str | None = None, seed: int = 0, **_: Any) -> Any:
    """What lm_eval loads in place of a data set of the hub (``custom_dataset``): the split ``test`` with the items of :func:`read_task`.

    Raises:
        InputError: see :func:`read_task`; or no folder is named, in lm_eval's own command by ``--metadata '{"folder": "/data/eval"}'``.
    """
    from datasets import Dataset, DatasetDict

    if folder is None:
        raise InputError(f"""{task}: found no folder of data, expected --metadata '{{"folder": "/data/eval"}}'""")
    return DatasetDict({"test": Dataset.from_list(read_task(task, Path(folder), seed))})

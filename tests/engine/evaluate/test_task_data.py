"""Items of zero-shot tasks: every form of file gives what lm_eval's own definitions expect; what is wrong is said with file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import shared
from task_files import NAMES, hub_rows, plain_rows, write_rows

from mates.engine.config import EVALUATION_TASKS
from mates.engine.evaluate.task_data import find_files, read_task
from mates.engine.reference.formats import read_passages
from mates.preprocess.inputs import InputError

PLAIN = plain_rows()
COUNTS = {
    "sciq": 1000,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "logiqa": 651,
    "openbookqa": 500,
    "boolq": 3270,
    "hellaswag": 10042,
    "piqa": 1838,
    "winogrande": 1267,
}


@pytest.mark.parametrize("task", EVALUATION_TASKS)
def test_the_plain_form_and_the_hubs_are_the_same_items(tmp_path: Path, task: str) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install mates[eval]")
    plain = read_task(task, write_rows(tmp_path / "plain", PLAIN), 0)
    hub = read_task(task, write_rows(tmp_path / "hub", hub_rows(PLAIN)), 0)
    used = {"hellaswag": ("query", "choices", "label")}.get(task, tuple(plain[0]))
    answers = [[row["choices"]["label"].index(row["answerKey"]) for row in rows] for rows in (plain, hub) if "answerKey" in rows[0]]
    if answers:  # by letters in one and digits in the other
        assert answers[0] == answers[1] == [row["label"] for row in PLAIN[task]]
        plain, hub = ([{**row, "answerKey": None, "choices": row["choices"]["text"]} for row in rows] for rows in (plain, hub))
    assert [{name: row[name] for name in used} for row in plain] == [{name: row[name] for name in used} for row in hub]


@pytest.mark.parametrize("ending", [".jsonl.gz", ".parquet", "-00000-of-00002.parquet"])
def test_other_kinds_of_file_hold_the_same(tmp_path: Path, ending: str) -> None:
    folder, rows = tmp_path / "piqa", PLAIN["piqa"]
    expected = read_task("piqa", write_rows(tmp_path / "plain", PLAIN), 0)
    folder.mkdir()
    if ending == ".jsonl.gz":
        (folder / "validation.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    elif ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "validation.parquet")
    else:
        for number, part in enumerate((rows[:3], rows[3:])):
            pq.write_table(pa.Table.from_pylist(part), folder / f"validation-0000{number}-of-00002.parquet")
    assert read_task("piqa", tmp_path, 0) == expected


def test_test_items_are_taken_before_validation(tmp_path: Path) -> None:
    folder = write_rows(tmp_path, PLAIN)
    (folder / "sciq/validation.jsonl").write_text("not read\n")
    assert [path.name for path in find_files("sciq", folder)] == ["test.jsonl"]
    (folder / "boolq/test.jsonl").write_text("hidden answers\n")
    assert [path.name for path in find_files("boolq", folder)] == ["validation.jsonl"]


@pytest.mark.parametrize("task", COUNTS)
def test_the_public_files_are_read_whole(task: str) -> None:
    assert len(read_task(task, shared("eval"), 0)) == COUNTS[task]


def test_lambada_is_the_half_that_no_reference_is_drawn_from(tmp_path: Path, lambada_file: Path) -> None:
    (tmp_path / "lambada").mkdir()
    (tmp_path / "lambada/lambada_test.jsonl").symlink_to(lambada_file)
    halves = {seed: {row["text"] for row in read_task("lambada", tmp_path, seed)} for seed in (0, 1)}
    for seed, texts in halves.items():
        passages = read_passages(lambada_file, seed)
        held_out = {passage.text for passage in passages if passage.half == "test"}
        assert texts < held_out
        assert len(held_out) - len(texts) < 0.05 * len(held_out)  # those that share 13 words with the other half
    assert halves[0] != halves[1]


@pytest.mark.parametrize(
    ("task", "change", "found"),
    [
        ("sciq", {"correct_answer": None}, "correct_answer is None, expected a text, in an item of sciq"),
        ("arc_easy", {"label": 4}, "label is 4, expected the right answer as one of 0, 1, 2, 3"),
        ("arc_easy", {"label": -1}, "label is -1, expected the right answer"),
        ("arc_easy", {"choices": "one"}, "choices is 'one', expected a list of texts"),
        ("boolq", {"answer": "yes"}, "answer is 'yes', expected the right answer as one of 0, 1"),
        ("hellaswag", {"label": ""}, "label is '', expected the right answer"),
        ("logiqa", {"label": "e"}, "label is 'e', expected the right answer"),
        ("winogrande", {"answer": ""}, "answer is '', expected 1 or 2"),
        ("winogrande", {"sentence": "no gap"}, "expected 1 or 2 and a '_' in the sentence"),
    ],
)
def test_a_bad_item_is_refused_with_its_line(tmp_path: Path, task: str, change: dict[str, object], found: str) -> None:
    rows = [PLAIN[task][0], {**PLAIN[task][1], **change}]
    with pytest.raises(InputError) as error:
        read_task(task, write_rows(tmp_path, {task: rows}), 0)
    assert str(error.value).startswith(f"{tmp_path / task / NAMES.get(task, 'test')}.jsonl:2: ")
    assert found in str(error.value)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    rows = [{name: value for name, value in PLAIN["piqa"][0].items() if name != "sol2"}]
    with pytest.raises(InputError, match=r"validation.jsonl:1: found the fields goal, sol1, label, expected an item of piqa with sol2"):
        read_task("piqa", write_rows(tmp_path, {"piqa": rows}), 0)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sciq: found no such folder, expected test.jsonl or validation.jsonl .*evaluate.task_data"):
        read_task("sciq", tmp_path, 0)
    (tmp_path / "sciq").mkdir()
    (tmp_path / "sciq/train.jsonl").touch()
    with pytest.raises(InputError, match=r"sciq: found train.jsonl, expected test.jsonl or"):
        read_task("sciq", tmp_path, 0)
    (tmp_path / "sciq/test.jsonl").touch()
    with pytest.raises(InputError, match=r"test.jsonl: found no item"):
        read_task("sciq", tmp_path, 0)
    (tmp_path / "sciq/test.jsonl.gz").touch()
    with pytest.raises(InputError, match=r"found test.jsonl, test.jsonl.gz, expected one of them"):
        read_task("sciq", tmp_path, 0)
    (tmp_path / "sciq/test.jsonl.gz").unlink()
    (tmp_path / "sciq/test.jsonl").write_text('{"question": \n')
    with pytest.raises(InputError, match=r"test.jsonl:1: found '{\"question\": ', expected a JSON object"):
        read_task("sciq", tmp_path, 0)
    (tmp_path / "sciq/test.jsonl").unlink()
    (tmp_path / "sciq/test.parquet").write_bytes(b"no table")
    with pytest.raises(InputError, match=r"test.parquet: found no readable Parquet file"):
        read_task("sciq", tmp_path, 0)

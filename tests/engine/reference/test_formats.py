"""Items of evaluation tasks: prompts and answers written out by hand, what is refused, and the public files themselves."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import zstandard
from conftest import shared

from mates.engine.config import TaskFormat
from mates.engine.reference.formats import FORMATS, read_items, read_passages
from mates.engine.reference.task import IGNORED, Passage, half_of, pack
from mates.preprocess.readers import InputError
from mates.preprocess.tokenizer import load_tokenizer

Row = dict[str, Any]


def write_lines(path: Path, rows: Sequence[Row | str]) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows),
        encoding="utf-8",
    )
    return path


def one(tmp_path: Path, form: TaskFormat, row: Row) -> tuple[str, str]:
    """Context and target of one item."""
    (passage,) = read_items(write_lines(tmp_path / "one.jsonl", [row]), form, seed=0)
    return passage.context, passage.target


# --- prompts -------------------------------------------------------------------------------------------------------

ARC = {"question": "Which is a mammal?", "choices": ["a trout", "a bat", "an ant"], "label": 1}
COPA = {"premise": "The man turned on the faucet.", "choice1": "The toilet filled with water.", "choice2": "Water flowed.", "idx": 0}
HELLASWAG = {
    "ind": 4,
    "activity_label": "Making tea",
    "ctx": "Boil it. [title] Pour it [step] Slowly. he",
    "ctx_a": "Boil it. [title] Pour it [step] Slowly.",
    "ctx_b": "he Then",
    "endings": ["drinks.", " [substeps] waits  a bit. [title] Sips ", "leaves.", "sleeps."],
    "split": "train",
}
LOGIQA = {"context": "All cats sleep.Tom is a cat.", "question": "What follows?", "options": ["Tom sleeps.", "Tom eats.", "None", "All"]}
LOGIQA_PROMPT = (
    "Passage: All cats sleep.Tom is a cat.\nQuestion: What follows?\nChoices:\nA. Tom sleeps.\nB. Tom eats.\nC. None\nD. All\nAnswer:"
)
OPENBOOK = {"question_stem": "The sun is responsible for", "choices": {"text": ["puppies", "plants"], "label": ["A", "B"]}}
PIQA = {"goal": "To boil an egg, you", "sol1": "put it into hot water ", "sol2": "put it into hot sand"}
SCIQ = {"question": "What gas?", "distractor1": "a", "distractor2": "b", "distractor3": "c", "correct_answer": "oxygen"}
WINOGRANDE = {"sentence": "Ann thanked Sue because _ had helped, _ said.", "option1": "Ann", "option2": "Sue"}
BOOLQ = {"question": "is milk white", "passage": "Milk -- Milk is a white liquid."}

PROMPTS: list[tuple[TaskFormat, Row, str, str]] = [
    ("lambada", {"text": "He went to the door"}, "He went to the", " door"),
    ("arc", ARC, "Question: Which is a mammal?\nAnswer:", " a bat"),
    (
        "arc",
        {"question": "Why?", "choices": {"text": ["so", "thus"], "label": ["1", "2"]}, "answerKey": "2"},
        "Question: Why?\nAnswer:",
        " thus",
    ),
    (
        "arc",
        {"question": {"stem": "Why?", "choices": [{"text": "so", "label": "A"}, {"text": "thus", "label": "B"}]}, "answerKey": "A"},
        "Question: Why?\nAnswer:",
        " so",
    ),
    ("boolq", BOOLQ | {"answer": True}, "Milk -- Milk is a white liquid.\nQuestion: is milk white?\nAnswer:", " yes"),
    ("boolq", BOOLQ | {"answer": False}, "Milk -- Milk is a white liquid.\nQuestion: is milk white?\nAnswer:", " no"),
    ("boolq", BOOLQ | {"label": 1, "idx": 3}, "Milk -- Milk is a white liquid.\nQuestion: is milk white?\nAnswer:", " yes"),
    ("copa", COPA | {"question": "effect", "label": 1}, "The man turned on the faucet therefore", " water flowed."),
    ("copa", COPA | {"question": "cause", "label": 0}, "The man turned on the faucet because", " the toilet filled with water."),
    (
        "copa",
        COPA | {"premise": "It rained ", "question": "cause", "label": 0},
        "It rained because",
        " the toilet filled with water.",
    ),
    ("hellaswag", HELLASWAG | {"label": 3}, "Making tea: Boil it.. Pour it Slowly. He then", " sleeps."),
    ("hellaswag", HELLASWAG | {"label": "1"}, "Making tea: Boil it.. Pour it Slowly. He then", "  waits a bit.. Sips"),
    (
        "hellaswag",
        HELLASWAG | {"ctx_a": "She sits.", "ctx_b": "", "label": "0"},
        "Making tea: She sits.",
        " drinks.",
    ),
    (
        "hellaswag",
        {"query": "Roof: A man sits. he", "choices": ["naps.", "starts [x]."], "label": 1},
        "Roof: A man sits. he",
        " starts [x].",
    ),
    ("logiqa", LOGIQA | {"label": 1}, LOGIQA_PROMPT, " Tom eats."),
    ("logiqa", LOGIQA | {"label": "d"}, LOGIQA_PROMPT, " All"),
    (
        "logiqa",
        {
            "passage": LOGIQA["context"],
            "question": "What follows?",
            "options": ["(A)Tom sleeps.", "(B)Tom eats.", "(C) None", "(D)All"],
            "label": "A",
            "answer": None,
        },
        LOGIQA_PROMPT,
        " Tom sleeps.",
    ),
    ("openbookqa", OPENBOOK | {"answerKey": "B"}, "The sun is responsible for", " plants"),
    ("openbookqa", {"question": "The sun is", "choices": ["cold", "hot"], "label": 1}, "The sun is", " hot"),
    ("piqa", PIQA | {"label": 0}, "Question: To boil an egg, you\nAnswer:", " put it into hot water "),
    ("sciq", SCIQ | {"support": "  We breathe oxygen."}, "We breathe oxygen.\nQuestion: What gas?\nAnswer:", " oxygen"),
    ("sciq", SCIQ | {"support": ""}, "\nQuestion: What gas?\nAnswer:", " oxygen"),
    ("winogrande", WINOGRANDE | {"answer": "2"}, "Ann thanked Sue because Sue", " had helped, _ said."),
    ("winogrande", WINOGRANDE | {"answer": "1"}, "Ann thanked Sue because Ann", " had helped, _ said."),
]


@pytest.mark.parametrize(("form", "row", "context", "target"), PROMPTS)
def test_prompts_are_those_of_lm_eval(tmp_path: Path, form: TaskFormat, row: Row, context: str, target: str) -> None:
    assert one(tmp_path, form, row) == (context, target)


def test_every_format_has_a_reader_and_a_prompt_here() -> None:
    assert {*FORMATS, "lambada"} == set(get_args(TaskFormat)) == {form for form, *_ in PROMPTS}


def test_items_keep_their_order_and_their_half_is_that_of_their_text(tmp_path: Path) -> None:
    rows = [ARC | {"question": f"Question {number}?", "split": "validation"} for number in range(200)]
    passages = read_items(write_lines(tmp_path / "a.jsonl", [*rows, rows[0]]), "arc", seed=5)
    assert [passage.context for passage in passages[:-1]] == [f"Question: Question {number}?\nAnswer:" for number in range(200)]
    assert passages[-1] == passages[0]
    assert all(passage.half == half_of(passage.text, 5) for passage in passages)
    assert 60 < sum(passage.half == "train" for passage in passages) < 140


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "json.gz", "txt"])
def test_compressed_files_are_read_as_plain_ones(tmp_path: Path, suffix: str) -> None:
    data = "".join(json.dumps(ARC | {"question": f"Was it {number}\u2028?"}) + "\r\n" for number in range(3)).encode()
    path = tmp_path / f"items.{suffix}"
    packed = {"gz": gzip.compress(data[:50]) + gzip.compress(data[50:]), "zst": zstandard.compress(data)}
    path.write_bytes(packed.get(suffix.rpartition(".")[2], data))
    assert [passage.context for passage in read_items(path, "arc", 0)] == [
        f"Question: Was it {number}\u2028?\nAnswer:" for number in range(3)
    ]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_damaged_file_is_refused(tmp_path: Path, suffix: str) -> None:
    data = json.dumps(ARC).encode() * 50
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes((gzip.compress(data) if suffix == "gz" else zstandard.compress(data))[:-9])
    with pytest.raises(InputError, match=re.escape(f"{path}: the ") + ".*Fetch it again"):
        read_items(path, "arc", 0)


# --- refusals ------------------------------------------------------------------------------------------------------

HIDDEN = "; an item without its answer cannot be a reference"

REFUSED: list[tuple[TaskFormat, Row, str]] = [
    ("arc", ARC | {"label": 3}, "field 'label': found 3, expected one of 0, 1, 2"),
    ("arc", ARC | {"label": -1}, f"field 'label': found -1, expected one of 0, 1, 2{HIDDEN}"),
    ("arc", {"question": "Why?", "choices": ["a", "b"]}, f"field 'label': found nothing, expected one of 0, 1{HIDDEN}"),
    ("arc", ARC | {"label": True}, "field 'label': found True, expected one of 0, 1, 2"),
    ("arc", ARC | {"label": 1.0}, "field 'label': found 1.0, expected one of 0, 1, 2"),
    ("arc", ARC | {"choices": ["a"]}, "field 'choices': found ['a'], expected a list of at least two texts"),
    ("arc", ARC | {"choices": ["a", 2, "c"]}, "field 'choices': found ['a', 2, 'c'], expected a list of at least two texts"),
    ("arc", ARC | {"question": " "}, "field 'question': found ' ', expected a text"),
    ("arc", ARC | {"question": None}, "field 'question': found None, expected a text"),
    ("openbookqa", OPENBOOK | {"answerKey": ""}, f"field 'answerKey': found '', expected one of A, B{HIDDEN}"),
    ("openbookqa", OPENBOOK | {"answerKey": "C"}, "field 'answerKey': found 'C', expected one of A, B"),
    (
        "openbookqa",
        {"question_stem": "x", "choices": {"text": ["a", "b"], "label": ["A", "B", "C"]}, "answerKey": "A"},
        "field 'choices': found {'text': ['a', 'b'], 'label': ['A', 'B', 'C']}, expected as many labels as texts",
    ),
    (
        "openbookqa",
        {"question_stem": "x", "choices": {"text": ["a", "b"]}, "answerKey": "A"},
        "choices: field 'label': found nothing, expected a list of at least two texts",
    ),
    (
        "arc",
        {"question": {"stem": "x", "choices": [{"text": "a", "label": "A"}, {"label": "B"}]}, "answerKey": "A"},
        "question: choices[1]: field 'text': found nothing, expected a text",
    ),
    ("boolq", BOOLQ | {"answer": "yes"}, "field 'answer': found 'yes', expected true or false"),
    ("boolq", BOOLQ | {"answer": 1.0}, "field 'answer': found 1.0, expected true or false"),
    ("boolq", BOOLQ | {"label": -1}, f"field 'label': found -1, expected true or false{HIDDEN}"),
    ("boolq", BOOLQ, f"field 'label': found nothing, expected true or false{HIDDEN}"),
    ("boolq", {"question": "q", "answer": True}, "field 'passage': found nothing, expected a text"),
    ("copa", COPA | {"question": "why", "label": 0}, "field 'question': found 'why', expected cause or effect"),
    ("copa", COPA | {"question": "cause", "label": 2}, "field 'label': found 2, expected one of 0, 1"),
    ("hellaswag", HELLASWAG | {"label": ""}, f"field 'label': found '', expected one of 0, 1, 2, 3{HIDDEN}"),
    ("hellaswag", HELLASWAG | {"ctx_b": None, "label": 0}, "field 'ctx_b': found None, expected a text"),
    (
        "hellaswag",
        HELLASWAG | {"endings": ["[a]", "b"], "label": 0},
        "field 'endings': found ['[a]', 'b'], expected an ending of more than marks in brackets",
    ),
    ("logiqa", LOGIQA | {"label": "e"}, "field 'label': found 'e', expected one of A, B, C, D"),
    ("piqa", PIQA, f"field 'label': found nothing, expected one of 0, 1{HIDDEN}"),
    ("piqa", PIQA | {"sol2": "", "label": 0}, "field 'sol2': found '', expected a text"),
    ("sciq", SCIQ, "field 'support': found nothing, expected a text"),
    ("sciq", SCIQ | {"support": "", "correct_answer": 4}, "field 'correct_answer': found 4, expected a text"),
    ("winogrande", WINOGRANDE | {"answer": ""}, f"field 'answer': found '', expected one of 1, 2{HIDDEN}"),
    ("winogrande", WINOGRANDE | {"answer": "0"}, "field 'answer': found '0', expected one of 1, 2"),
    (
        "winogrande",
        WINOGRANDE | {"sentence": "No gap.", "answer": "1"},
        "field 'sentence': found 'No gap.', expected a text that goes on after a '_'",
    ),
    (
        "winogrande",
        WINOGRANDE | {"sentence": "It was _ ", "answer": "1"},
        "field 'sentence': found 'It was _ ', expected a text that goes on after a '_'",
    ),
]


@pytest.mark.parametrize(("form", "row", "message"), REFUSED)
def test_an_item_that_cannot_be_used_is_named(tmp_path: Path, form: TaskFormat, row: Row, message: str) -> None:
    good = next(good for name, good, *_ in PROMPTS if name == form)
    path = write_lines(tmp_path / "a.jsonl", [good, "", row, good])
    with pytest.raises(InputError) as caught:
        read_items(path, form, seed=0)
    assert str(caught.value) == f"{path}:3: {message}"


def test_a_long_value_is_cut_and_one_that_is_no_unicode_can_be_printed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [ARC | {"label": "x" * 500}])
    with pytest.raises(InputError, match=re.escape("found '" + "x" * 78 + "…, expected one of 0, 1, 2")):
        read_items(path, "arc", 0)
    write_lines(path, ['{"question": "a \\ud800", "choices": ["a", "b"], "label": 0}'])
    with pytest.raises(InputError, match=re.escape(r"field 'question': found 'a \ud800', expected a text")):
        read_items(path, "arc", 0)


@pytest.mark.parametrize("line", ["{", "[1]", '"a"', "null", "7", "[" * 100_000], ids=lambda line: str(line)[:9])
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", [ARC, line])
    with pytest.raises(InputError, match=re.escape(f"{path}:2: expected a JSON object, found ")):
        read_items(path, "arc", 0)


# --- LAMBADA's form ------------------------------------------------------------------------------------------------


def test_the_last_word_is_the_target(tmp_path: Path) -> None:
    rows = [
        {"text": "one two three", "split": "train"},
        {"text": "  four  five \n", "split": "test"},
        {"text": "a line\nand another", "split": "test", "domain": "x"},
        {"text": "with\u2028a separator\u0085and\x0cmore words", "split": "train"},
        {"text": 'he said: "no!"', "split": "train"},
    ]
    path = write_lines(tmp_path / "a.jsonl", [rows[0], "", "   ", *rows[1:]])
    expected = [
        Passage("one two", " three", "train"),
        Passage("four ", " five", "test"),
        Passage("a line\nand", " another", "test"),
        Passage("with\u2028a separator\u0085and\x0cmore", " words", "train"),
        Passage("he said:", ' "no!"', "train"),
    ]
    assert read_passages(path, seed=0) == expected
    assert [passage.text for passage in expected] == [row["text"].strip() for row in rows]
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n")[:-2])
    assert read_passages(path, seed=0) == expected


def test_a_passage_counts_once(tmp_path: Path) -> None:
    rows: list[Row | str] = [
        {"text": "one two", "split": "train"},
        {"text": "one two "},
        {"text": "one two", "split": "test"},
        {"text": "One two"},
    ]
    passages = read_passages(write_lines(tmp_path / "a.jsonl", rows), seed=0)
    assert [passage.text for passage in passages] == ["one two", "One two"]
    assert passages[0].half == "train"


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        '"one two"',
        "null",
        "{}",
        '{"text": 1}',
        '{"text": null}',
        '{"text": ["a", "b"]}',
        '{"text": "a \\ud800 b"}',
        "[" * 100_000,
    ],
    ids=lambda line: str(line)[:20],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "one two"}, "", line])
    with pytest.raises(InputError, match=re.escape(f"{path}:3: expected a JSON object with a 'text' of words, found ")):
        read_passages(path, seed=0)


def test_bytes_that_are_no_unicode_are_a_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one two"}\n{"text": "one \xff\xfe two"}\n')
    with pytest.raises(InputError, match=re.escape(f"{path}:2: ")):
        read_passages(path, seed=0)


@pytest.mark.parametrize("text", ["", "   ", "word", " word\n", "two\nlines"])
def test_one_word_is_no_passage(tmp_path: Path, text: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": text}])
    with pytest.raises(InputError, match=re.escape(f"{path}:1: a passage needs at least two words, found {text.strip()!r}")):
        read_passages(path, seed=0)


def test_another_split_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "one two", "split": "validation"}])
    with pytest.raises(InputError, match=re.escape(f"{path}:1: split 'validation', expected 'train' or 'test'")):
        read_passages(path, seed=0)
    with pytest.raises(InputError, match=r"none\.jsonl: no such file"):
        read_passages(tmp_path / "none.jsonl", seed=0)


# --- the public files ----------------------------------------------------------------------------------------------

TRAINING: list[tuple[TaskFormat, str, int]] = [
    ("arc", "arc_challenge/train", 1_119),
    ("arc", "arc_easy/train", 2_251),
    ("boolq", "boolq/train", 9_427),
    ("openbookqa", "openbookqa/train", 4_957),
    ("piqa", "piqa/train", 16_113),
    ("winogrande", "winogrande/train_xl", 40_398),
    # of these no training split is at hand
    ("copa", "copa/validation", 100),
    ("hellaswag", "hellaswag/validation", 10_042),
    ("logiqa", "logiqa/validation", 651),
    ("logiqa", "logiqa/test_agieval", 651),
    ("sciq", "sciq/validation", 1_000),
]


@pytest.mark.parametrize(("form", "name", "count"), TRAINING, ids=[name for _, name, _ in TRAINING])
def test_every_item_of_the_public_files(neox_tokenizer: Path, form: TaskFormat, name: str, count: int) -> None:
    """Each line is an item, whose labels are the tokens of its answer and of nothing else."""
    path = shared(f"eval/{name}.jsonl.gz")
    passages = read_items(path, form, seed=0)
    assert len(passages) == len(gzip.decompress(path.read_bytes()).splitlines()) == count
    tokenizer = load_tokenizer(neox_tokenizer)
    tokens, labels, offsets = pack(passages, tokenizer, 2_048)
    assert len(offsets) == count + 1
    assert not np.any((labels != IGNORED) & (labels < 0))
    for number, passage in enumerate(passages):
        own = slice(offsets[number], offsets[number + 1])
        carried = np.flatnonzero(labels[own] != IGNORED)
        assert carried.tolist() == list(range(carried[0], offsets[number + 1] - offsets[number]))  # one run, up to the end
        if number % max(1, count // 500) == 0:
            spaces = passage.context[len(passage.context.rstrip()) :]  # they belong to the target, as in lm_eval
            assert tokenizer.decode(labels[own][carried].tolist()) == spaces + passage.target
            assert tokenizer.decode(tokens[own][: carried[0] + 1].tolist()) == passage.context.rstrip()

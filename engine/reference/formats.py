"""Items of evaluation tasks as passages: the prompt and the right answer, as lm_eval puts them to a model.

A format is chosen by name and takes the forms of line in which the task's public files are found. The context is the prompt without
white space at its end and the target begins with the space between them, except in LAMBADA, where both are cut from one text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mates.engine.config import TaskFormat
from mates.engine.reference.task import Half, Passage, half_of
from mates.preprocess.inputs import DamageError, InputError, InputFile, RawFile
from mates.preprocess.rows import ReadOptions
from mates.preprocess.streams import GzipStream, PlainPart, Stream, ZstdStream

BUFFER_BYTES = 1 << 20
EXCERPT = 80  # characters of what was found in a message
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NO_ANSWER = (None, "", -1, "-1")  # what test sets with hidden answers hold
_MISSING = object()
_LETTER_MARK = re.compile(r"^\([A-Z]\)\s*")


def read_items(path: Path, form: TaskFormat, seed: int) -> list[Passage]:
    """The items of a file in its order, one a line (LAMBADA's each once), with halves by the hash of their text.

    Args:
        path: JSON lines: plain, .gz or .zst. form: the name of the format. seed: key of the hash.

    Raises:
        InputError: no such file, a damaged one, or a line that is no item with its answer; it names line, field, found and expected.
    """
    if form == "lambada":
        return read_passages(path, seed)
    passages = []
    for place, line in lines_of(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise InputError(f"{place}: expected a JSON object, found {line[:EXCERPT].decode(errors='replace')!r}")
        context, target = FORMATS[form](_Item(row, place))
        passages.append(Passage(context, target, half_of(context + target, seed)))
    return passages


def read_passages(path: Path, seed: int) -> list[Passage]:
    """Read a JSON-lines file of passages in LAMBADA's form; its last word is the target. A passage that is there twice counts once.

    Raises:
        InputError: no such file, a line that is not an object with a ``text``, or a passage of one word.
    """
    passages, seen = [], set()
    for place, line in lines_of(path):
        try:
            row = json.loads(line)
            text = row["text"].strip()
            text.encode()  # a lone surrogate could not be hashed or tokenized
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            found = line[:EXCERPT].decode(errors="replace")
            raise InputError(f"{place}: expected a JSON object with a 'text' of words, found {found!r}") from error
        context, _, word = text.rpartition(" ")
        if not context.strip():
            raise InputError(f"{place}: a passage needs at least two words, found {text!r}")
        if text not in seen:
            seen.add(text)
            passages.append(Passage(context, " " + word, _own_half(row.get("split"), text, seed, place)))
    return passages


def _own_half(split: object, text: str, seed: int, place: str) -> Half:
    if split == "train" or split == "test":
        return split
    if split is not None:
        raise InputError(f"{place}: split {split!r}, expected 'train' or 'test' (or none)")
    return half_of(text, seed)


def lines_of(path: Path) -> Iterator[tuple[str, bytes]]:
    """Place (``file:line``) and bytes of each line that is not blank. str.splitlines would also split at U+2028 inside a text."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    for number, line in enumerate(_contents(path).split(b"\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line


def _contents(path: Path) -> bytes:
    with RawFile(InputFile(str(path), path.stat().st_size)) as raw:
        expansion = ReadOptions().max_expansion
        stream: Stream
        if path.suffix == ".gz":
            stream = GzipStream(raw, expansion)
        elif path.suffix == ".zst":
            stream = ZstdStream(raw, expansion)
        else:
            stream = PlainPart(raw, 0, 1)
        pieces, buffer = [], bytearray(BUFFER_BYTES)
        try:
            while count := stream.readinto(memoryview(buffer)):
                pieces.append(bytes(buffer[:count]))
        except DamageError as error:
            raise InputError(f"{path}: {error}. Fetch it again") from error
    return b"".join(pieces)


# --- fields --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Item:
    """An object of a file, and where it stands."""

    row: dict[str, Any]
    place: str

    def refuse(self, field: str, expected: str) -> NoReturn:
        """InputError naming place, field, found and expected."""
        value = self.row.get(field, _MISSING)
        found = "nothing" if value is _MISSING else repr(value)
        found = found if len(found) <= EXCERPT else found[: EXCERPT - 1] + "…"
        raise InputError(f"{self.place}: field {field!r}: found {found}, expected {expected}")

    def text(self, field: str, *, blank: bool = False) -> str:
        """A string, not blank unless that is allowed."""
        value = self.row.get(field)
        if not _is_text(value) and not (blank and isinstance(value, str) and not value.strip()):
            self.refuse(field, "a text")
        return str(value)

    def texts(self, field: str) -> list[str]:
        """A list of two strings or more, none of them blank."""
        values = self.row.get(field)
        if not isinstance(values, list) or len(values) < 2 or not all(map(_is_text, values)):
            self.refuse(field, "a list of at least two texts")
        return list(values)

    def inside(self, field: str) -> _Item:
        """The object in a field."""
        return _Item(self.row[field], f"{self.place}: {field}")

    def answer(self, field: str, names: Sequence[str]) -> int:
        """Which of ``names`` a field holds, as a string or as a number."""
        value = self.row.get(field)
        is_name = isinstance(value, str | int) and not isinstance(value, bool)
        name = str(value).strip().casefold()
        known = [one.strip().casefold() for one in names]
        if not is_name or name not in known:
            hidden = "; an item without its answer cannot be a reference" if value in NO_ANSWER else ""
            self.refuse(field, f"one of {', '.join(names)}{hidden}")
        return known.index(name)


def _is_text(value: object) -> bool:
    """Whether a value is a string of more than blanks, without the lone surrogates that could not be hashed or tokenized."""
    return isinstance(value, str) and value.strip() != "" and not any("\ud800" <= character <= "\udfff" for character in value)


def _numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


# --- formats -------------------------------------------------------------------------------------------------------


def _multiple_choice(item: _Item) -> tuple[str, str]:
    """Question and right choice of ARC and OpenBookQA.

    Three forms: their authors' (an object ``question`` of stem and choices), the model hub's (``choices`` of texts and labels), both
    with ``answerKey``; and a plain list of ``choices`` with the number of the right one as ``label``.
    """
    inner = item.inside("question") if isinstance(item.row.get("question"), dict) else item
    stem = next((field for field in ("stem", "question_stem") if field in inner.row), "question")
    choices, names = inner.row.get("choices"), None
    if isinstance(choices, dict):
        texts, names = inner.inside("choices").texts("text"), inner.inside("choices").texts("label")
    elif isinstance(choices, list) and len(choices) > 1 and all(isinstance(choice, dict) for choice in choices):
        each = [_Item(choice, f"{inner.place}: choices[{number}]") for number, choice in enumerate(choices)]
        texts, names = [choice.text("text") for choice in each], [choice.text("label") for choice in each]
    else:
        texts = inner.texts("choices")
    if names is not None and len(names) != len(texts):
        inner.refuse("choices", "as many labels as texts")
    chosen = item.answer("label", _numbers(len(texts))) if names is None else item.answer("answerKey", names)
    return inner.text(stem), texts[chosen]


def _arc(item: _Item) -> tuple[str, str]:
    question, choice = _multiple_choice(item)
    return f"Question: {question}\nAnswer:", " " + choice


def _openbookqa(item: _Item) -> tuple[str, str]:
    stem, choice = _multiple_choice(item)
    return stem, " " + choice


def _boolq(item: _Item) -> tuple[str, str]:
    """The authors' ``answer``, true or false, or SuperGLUE's ``label``, 1 or 0. Questions come without their question mark."""
    field = "answer" if "answer" in item.row else "label"
    value = item.row.get(field)
    if not isinstance(value, bool) and not (type(value) is int and value in (0, 1)):
        hidden = "; an item without its answer cannot be a reference" if value in NO_ANSWER else ""
        item.refuse(field, f"true or false{hidden}")
    return f"{item.text('passage')}\nQuestion: {item.text('question')}?\nAnswer:", " yes" if value else " no"


def _copa(item: _Item) -> tuple[str, str]:
    """The premise without its full stop, a conjunction, and the choice as the clause that follows."""
    premise = item.text("premise").strip()
    connector = {"cause": "because", "effect": "therefore"}.get(item.text("question"))
    if connector is None:
        item.refuse("question", "cause or effect")
    choice = [item.text("choice1"), item.text("choice2")][item.answer("label", _numbers(2))]
    clause = premise if premise[-1].isalnum() else premise[:-1]
    return f"{clause} {connector}", f" {choice[0].lower()}{choice[1:]}"


def _hellaswag(item: _Item) -> tuple[str, str]:
    """The authors' fields; or ``query`` and ``choices``, in which they are joined and cleaned already."""
    if "query" in item.row:
        query, endings = item.text("query"), item.texts("choices")
    else:
        context = f"{item.text('ctx_a')} {item.text('ctx_b', blank=True).capitalize()}"
        query = _without_marks(f"{item.text('activity_label')}: {context}")
        endings = [_without_marks(ending) for ending in item.texts("endings")]
    ending = endings[item.answer("label", _numbers(len(endings)))]
    if not ending.strip():
        item.refuse("endings", "an ending of more than marks in brackets")
    return query, " " + ending


def _without_marks(text: str) -> str:
    """lm_eval's cleaning of WikiHow's marks."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _logiqa(item: _Item) -> tuple[str, str]:
    """``label`` is a letter or a number from 0; AGIEval's ``passage`` and options that begin with their letter are taken too."""
    passage = item.text("passage" if "passage" in item.row else "context")
    options = [_LETTER_MARK.sub("", option) for option in item.texts("options")]
    if len(options) > len(LETTERS):
        item.refuse("options", f"at most {len(LETTERS)}")
    is_number = isinstance(item.row.get("label"), int)
    chosen = item.answer("label", _numbers(len(options)) if is_number else list(LETTERS[: len(options)]))
    listed = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, options, strict=False))
    return f"Passage: {passage}\nQuestion: {item.text('question')}\nChoices:\n{listed}Answer:", " " + options[chosen]


def _piqa(item: _Item) -> tuple[str, str]:
    solutions = [item.text("sol1"), item.text("sol2")]
    return f"Question: {item.text('goal')}\nAnswer:", " " + solutions[item.answer("label", _numbers(2))]


def _sciq(item: _Item) -> tuple[str, str]:
    """With the supporting paragraph before the question, which may be blank."""
    support = item.text("support", blank=True).lstrip()
    return f"{support}\nQuestion: {item.text('question')}\nAnswer:", " " + item.text("correct_answer")


def _winogrande(item: _Item) -> tuple[str, str]:
    """The right option in place of ``_`` as the context; the rest of the sentence, the same after either option, as the target."""
    before, gap, rest = item.text("sentence").partition("_")
    if not gap or not rest.strip():
        item.refuse("sentence", "a text that goes on after a '_'")
    options = [item.text("option1"), item.text("option2")]
    return before + options[item.answer("answer", ["1", "2"])], " " + rest.strip()


FORMATS: Mapping[TaskFormat, Callable[[_Item], tuple[str, str]]] = {
    "arc": _arc,
    "boolq": _boolq,
    "copa": _copa,
    "hellaswag": _hellaswag,
    "logiqa": _logiqa,
    "openbookqa": _openbookqa,
    "piqa": _piqa,
    "sciq": _sciq,
    "winogrande": _winogrande,
}
"""Context and target of an item, by the name of its format; LAMBADA's is :func:`read_passages`."""

"""Reference items that an evaluation would meet again: data chosen by them would be chosen by the evaluation's own answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from mates.engine.config import TaskFormat
from mates.engine.reference.formats import read_items
from mates.engine.reference.task import OVERLAP, WORDS, Passage, ngrams
from mates.preprocess.inputs import InputError


def contamination(reference: Sequence[Passage], evaluation: Iterable[Passage]) -> tuple[int, list[Passage]]:
    """Reference passages, in their order, that share a run of 13 words with an evaluation passage: how many, and which.

    Words are compared in lower case without punctuation. A passage of fewer words is compared whole, so it is met by one of the same
    words and by no longer one. Prompts count as text: a question of 13 words that many items of a task ask makes them all overlap.
    """
    known = {run for passage in evaluation for run in _runs(passage.text)}
    found = [passage for passage in reference if any(run in known for run in _runs(passage.text))]
    return len(found), found


def _runs(text: str) -> Iterable[tuple[str, ...]]:
    words = tuple(WORDS.findall(text.lower()))
    return ngrams(text) if len(words) >= OVERLAP else [words]


def without_overlap(passages: list[Passage], evaluation: Iterable[Passage]) -> tuple[list[Passage], int]:
    """The passages that do not overlap with the evaluation's, and how many were dropped."""
    count, found = contamination(passages, evaluation)
    dropped = set(found)
    return [passage for passage in passages if passage not in dropped], count


def read_avoided(avoid: Sequence[tuple[TaskFormat, Path]]) -> list[Passage]:
    """Items of evaluation files. InputError as :func:`read_items`, and for a file without items, which would guard against nothing."""
    passages = []
    for form, path in avoid:
        items = read_items(path, form, seed=0)  # halves do not matter here
        if not items:
            raise InputError(f"reference.avoid: {path}: no items, expected those of an evaluation")
        passages += items
    return passages

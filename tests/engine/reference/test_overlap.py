"""Overlap of reference items with an evaluation: by brute force, at its edges, and of files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mates.engine.reference.formats import read_items
from mates.engine.reference.overlap import contamination, read_avoided, without_overlap
from mates.engine.reference.task import Passage
from mates.preprocess.readers import InputError

words = st.sampled_from(["a", "A", "b"])
joints = st.sampled_from([" ", "  ", "\n", ", ", " - ", '." "'])


@st.composite
def passages(draw: st.DrawFn) -> Passage:
    drawn = draw(st.lists(st.tuples(words, joints), min_size=1, max_size=16))
    return Passage("".join(word + joint for word, joint in drawn).rstrip(), " " + draw(words), "train")


def word_string(passage: Passage) -> list[str]:
    return re.sub(r"[^a-z0-9]+", " ", passage.text.lower()).split()


def overlaps(one: Passage, other: Passage) -> bool:
    """All pairs of places are compared, word by word."""
    own, others = word_string(one), word_string(other)
    if len(own) < 13:
        return own == others
    places = ((i, j) for i in range(len(own) - 12) for j in range(len(others) - 12))
    return any(own[i : i + 13] == others[j : j + 13] for i, j in places)


@given(reference=st.lists(passages(), max_size=5), evaluation=st.lists(passages(), max_size=4))
@example(reference=[Passage("a a A", " a", "train")], evaluation=[Passage("A, a, a", " a", "test")])
@example(reference=[Passage("a " * 20, "a", "train")], evaluation=[Passage("a " * 12, "a", "train"), Passage("a", " a", "train")])
def test_contamination_by_brute_force(reference: list[Passage], evaluation: list[Passage]) -> None:
    count, found = contamination(reference, evaluation)
    expected = [passage for passage in reference if any(overlaps(passage, other) for other in evaluation)]
    assert (count, found) == (len(expected), expected)
    kept, dropped = without_overlap(reference, evaluation)
    assert kept == [passage for passage in reference if passage not in expected]
    assert dropped == len(reference) - len(kept)


def test_edges() -> None:
    run = [f"w{number}" for number in range(13)]

    def passage(*parts: str) -> Passage:
        return Passage(" ".join(parts), " end", "train")

    thirteen, twelve = passage("x", *run), passage("x", *run[:12])
    evaluation = [passage("Other:", "; ".join(run).upper() + "!")]
    assert contamination([thirteen, twelve], evaluation) == (1, [thirteen])
    short = passage("Is", "it", "so?")
    assert contamination([short], [passage("IS it so!")]) == (1, [short])
    assert contamination([short], [passage("And is it so")]) == (0, [])
    assert contamination([passage(*run[:11])], [passage(*run[:11], "w11", "w12")]) == (0, [])  # twelve words and fourteen
    assert contamination([], evaluation) == (0, [])
    assert contamination([thirteen], []) == (0, [])


def test_files_to_avoid(tmp_path: Path) -> None:
    arc, piqa, empty = tmp_path / "a.jsonl", tmp_path / "p.jsonl", tmp_path / "e.jsonl"
    arc.write_text(json.dumps({"question": "Why?", "choices": ["so", "thus"], "label": 0}) + "\n")
    piqa.write_text(json.dumps({"goal": "Why?", "sol1": "so", "sol2": "thus", "label": 1}) + "\n")
    empty.write_text("\n")
    expected = [*read_items(arc, "arc", 0), *read_items(piqa, "piqa", 0)]
    assert read_avoided([("arc", arc), ("piqa", piqa)]) == expected
    assert [passage.target for passage in expected] == [" so", " thus"]
    assert read_avoided([]) == []
    with pytest.raises(InputError, match=r"reference\.avoid: .*e\.jsonl: no items, expected those of an evaluation"):
        read_avoided([("arc", arc), ("arc", empty)])
    with pytest.raises(InputError, match=r"a\.jsonl:1: field 'goal': found nothing, expected a text|a\.jsonl:1: field 'sol1'"):
        read_avoided([("piqa", arc)])

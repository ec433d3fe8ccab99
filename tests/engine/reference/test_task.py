"""Reference tasks: halves, held-out overlap, packing as lm_eval counts tokens, and batches."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mates.engine.reference.batches import label_batches
from mates.engine.reference.formats import read_passages
from mates.engine.reference.task import (
    IGNORED,
    Half,
    Passage,
    Reference,
    choose,
    drop_overlapping,
    ngrams,
    open_reference,
    pack,
)
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, Manifest
from mates.preprocess.tokenizer import Tokenizer, load_tokenizer, open_tokenizer

CPU = torch.device("cpu")
Row = dict[str, Any]


def write_lines(path: Path, rows: Sequence[Row | str]) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows),
        encoding="utf-8",
    )
    return path


# --- halves and choice ---------------------------------------------------------------------------------------------


def halves(passages: list[Passage]) -> dict[str, set[str]]:
    return {half: {passage.text for passage in passages if passage.half == half} for half in ("train", "test")}


def test_halves_are_disjoint_and_depend_on_text_and_seed_alone(tmp_path: Path) -> None:
    n = 4_000
    rows: list[Row | str] = [{"text": f"passage number {number}"} for number in range(n)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    first = halves(read_passages(path, seed=0))
    assert not first["train"] & first["test"]
    assert len(first["train"] | first["test"]) == n
    assert abs(len(first["train"]) - n / 2) < 4 * math.sqrt(n) / 2
    reordered = write_lines(tmp_path / "b.jsonl", rows[::-1])
    assert halves(read_passages(reordered, seed=0)) == first
    second = halves(read_passages(path, seed=1))
    both = len(first["train"] & second["train"])
    assert abs(both - n / 4) < 4 * math.sqrt(n * 3 / 16)


def test_choice_is_a_prefix_of_one_order(tmp_path: Path) -> None:
    passages = [Passage(f"passage {number}", " end", "train" if number % 3 else "test") for number in range(300)]
    everything = choose(passages, "train", 10**6, seed=4)
    assert Counter(everything) == Counter(passage for passage in passages if passage.half == "train")
    for items in (0, 1, 7, 199):
        assert choose(passages, "train", items, seed=4) == everything[:items]
        assert choose(passages[::-1], "train", items, seed=4) == everything[:items]
    assert choose(passages, "train", 50, seed=5) != everything[:50]
    order = [passages.index(passage) for passage in everything]  # in no order of the file
    assert sum(a < b for a, b in itertools.pairwise(order)) == pytest.approx(len(order) / 2, abs=4 * math.sqrt(len(order) / 12))


# --- contamination -------------------------------------------------------------------------------------------------

words = st.sampled_from(["a", "A", "b", "B"])
joints = st.sampled_from([" ", "  ", "\n", ", ", " - ", '." "'])


@st.composite
def passages_of_few_words(draw: st.DrawFn, half: Half) -> Passage:
    drawn = draw(st.lists(st.tuples(words, joints), min_size=1, max_size=18))
    return Passage("".join(word + joint for word, joint in drawn).rstrip(), " " + draw(words), half)


@given(
    held_out=st.lists(passages_of_few_words(half="test"), max_size=4),
    reference=st.lists(passages_of_few_words(half="train"), max_size=4),
    n=st.just(13),
)
def test_overlap_by_brute_force(held_out: list[Passage], reference: list[Passage], n: int) -> None:
    """Two letters only, so that runs of 13 words do meet; words are searched as a string between spaces."""

    def normal(passage: Passage) -> list[str]:
        return re.sub(r"[^a-z]+", " ", passage.text.lower()).split()

    def shares(passage: Passage) -> bool:
        own = normal(passage)
        runs = [" " + " ".join(own[start : start + n]) + " " for start in range(len(own) - n + 1)]
        return any(run in " " + " ".join(normal(other)) + " " for run in runs for other in reference)

    kept, dropped = drop_overlapping(held_out, reference)
    assert kept == [passage for passage in held_out if not shares(passage)]
    assert dropped == len(held_out) - len(kept)


def test_thirteen_words_in_common_are_dropped_and_twelve_are_not() -> None:
    run = [f"w{number}" for number in range(13)]
    reference = [Passage("Before " + " ".join(run), " after", "train")]
    thirteen = Passage('Other "' + ", ".join(run).upper() + '!"', " end", "test")
    twelve = Passage("other " + " ".join(run[:12]), " end", "test")
    broken = Passage(" ".join([*run[:6], "x", *run[6:]]), " end", "test")
    assert drop_overlapping([thirteen, twelve, broken], reference) == ([twelve, broken], 1)
    assert len(list(ngrams(thirteen.text))) == 15 - 13 + 1
    assert list(ngrams("one two three", 2)) == [("one", "two"), ("two", "three")]
    assert list(ngrams("one two", 3)) == []


# --- packing -------------------------------------------------------------------------------------------------------


def lm_eval_pair(tokenizer: Tokenizer, context: str, target: str) -> tuple[list[int], list[int]]:
    """How lm_eval's ``_encode_pair`` divides a request into tokens of the context and tokens that are predicted."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, target = context[:-spaces], context[-spaces:] + target
    encoded, whole = (ids.tolist() for ids in tokenizer.encode_batch([context, context + target]))
    return encoded, whole[len(encoded) :]


def items_of(
    packed: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int64]],
) -> list[tuple[list[int], list[int]]]:
    tokens, labels, offsets = packed
    assert [str(values.dtype) for values in (tokens, labels, offsets)] == ["int32", "int32", "int64"]
    assert len(tokens) == len(labels) == offsets[-1]
    assert offsets[0] == 0
    return [(tokens[a:b].tolist(), labels[a:b].tolist()) for a, b in itertools.pairwise(offsets.tolist())]


def check_packing(passages: list[Passage], tokenizer: Tokenizer, max_tokens: int) -> None:
    for passage, (tokens, labels) in zip(passages, items_of(pack(passages, tokenizer, max_tokens)), strict=True):
        context, target = lm_eval_pair(tokenizer, passage.context, passage.target)
        assert tokens == (context + target)[:-1][-max_tokens:]  # cut on the left; the last token is only a label
        assert labels == ([IGNORED] * (len(context) - 1) + target)[-max_tokens:]
        predicted = [label for label in labels if label != IGNORED]
        if len(target) <= max_tokens:
            assert tokenizer.decode(predicted).strip() == passage.target.strip()
            assert tokenizer.decode([*tokens[: len(tokens) - len(target) + 1], *predicted]).endswith(passage.target)


@pytest.fixture(scope="module")
def bpe(bpe_dir: Path) -> Tokenizer:
    return open_tokenizer(bpe_dir)[0]


@pytest.fixture(scope="module")
def passages(texts: list[str]) -> list[Passage]:
    result = []
    for number, text in enumerate(texts):
        context, _, word = text.rpartition(" ")
        result.append(Passage(context + " " * (number % 10 == 0), " " + word, "train" if number % 2 else "test"))
    return result


@pytest.mark.parametrize("max_tokens", [10_000, 40, 5, 1])
def test_labels_are_exactly_the_tokens_of_the_target(passages: list[Passage], bpe: Tokenizer, max_tokens: int) -> None:
    check_packing(passages[:200], bpe, max_tokens)


@given(
    pairs=st.lists(
        st.tuples(
            st.text(min_size=1).filter(str.strip).map(str.lstrip),
            st.text(min_size=1).filter(lambda word: word.split() == [word]),
        ),
        min_size=1,
        max_size=5,
    ),
    max_tokens=st.integers(1, 60),
)
def test_any_text_is_packed_as_lm_eval_does(bpe: Tokenizer, pairs: list[tuple[str, str]], max_tokens: int) -> None:
    passages = [Passage(context, " " + word, "train") for context, word in pairs]
    for passage, (tokens, labels) in zip(passages, items_of(pack(passages, bpe, max_tokens)), strict=True):
        context, target = lm_eval_pair(bpe, passage.context, passage.target)
        assert tokens == (context + target)[:-1][-max_tokens:]
        assert labels == ([IGNORED] * (len(context) - 1) + target)[-max_tokens:]


class Pairs:
    """Tokens of two characters: after an odd number of them, the last one merges with the target's space."""

    vocab_size, end_of_document = 2**24, 0

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        return [np.array([int.from_bytes(text[start : start + 2].encode()) for start in range(0, len(text), 2)]) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(item.to_bytes(2).decode().lstrip("\0") for item in ids)


def test_tokens_that_merge_across_the_boundary() -> None:
    """The target's tokens are the whole's beyond as many as the context has; at least the last one is predicted."""
    tokenizer = Pairs()

    def label_texts(context: str, target: str) -> list[str]:
        ((_, labels),) = items_of(pack([Passage(context, target, "train")], tokenizer, 99))
        return [tokenizer.decode([label]) for label in labels if label != IGNORED]

    assert label_texts("abcd", " ef") == [" e", "f"]
    assert label_texts("abc", " de") == ["de"]
    assert label_texts("abc", " ") == ["c "]
    assert label_texts("a", " bcd") == ["bc", "d"]


# --- batches -------------------------------------------------------------------------------------------------------

NO_MANIFEST = Manifest(kind="reference", fingerprint="", settings={}, inputs={}, info={}, files={})


@st.composite
def references(draw: st.DrawFn) -> Reference:
    items = draw(
        st.lists(
            st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99) | st.just(IGNORED)), min_size=1, max_size=12),
            min_size=1,
            max_size=12,
        )
    )
    pairs = list(itertools.chain(*items))
    return Reference(
        "test",
        NO_MANIFEST,
        np.array([token for token, _ in pairs], np.int32),
        np.array([label for _, label in pairs], np.int32),
        np.array([0, *itertools.accumulate(map(len, items))], np.int64),
    )


@given(reference=references(), budget=st.integers(1, 60))
def test_batches_hold_each_label_once_with_its_context(reference: Reference, budget: int) -> None:
    offsets = reference.offsets.tolist()
    expected = Counter(
        (item, tuple(reference.tokens[start : position + 1].tolist()), int(reference.labels[position]))
        for item, (start, stop) in enumerate(itertools.pairwise(offsets))
        for position in range(start, stop)
        if reference.labels[position] != IGNORED
    )
    found: Counter[tuple[int, tuple[int, ...], int]] = Counter()
    rows = 0
    for batch in label_batches(reference, batch_tokens=budget, device=CPU):
        height, width = batch.tokens.shape
        rows += height
        assert height * width <= budget or height == 1
        assert {values.dtype for values in (batch.tokens, batch.positions, batch.targets, batch.items)} == {torch.int64}
        assert len(batch.positions) == len(batch.targets) == len(batch.items)
        for position, target, item in zip(batch.positions.tolist(), batch.targets.tolist(), batch.items.tolist(), strict=True):
            row, column = divmod(position, width)
            found[(item, tuple(batch.tokens[row, : column + 1].tolist()), target)] += 1  # all that a causal model sees
    assert found == expected
    assert rows == reference.items == len(offsets) - 1


@given(reference=references(), budget=st.integers(1, 60))
def test_batches_are_the_same_again_and_hardly_padded(reference: Reference, budget: int) -> None:
    one, other = (label_batches(reference, batch_tokens=budget, device=CPU) for _ in range(2))
    assert [batch.tokens.tolist() for batch in one] == [batch.tokens.tolist() for batch in other]
    widths = [batch.tokens.shape[1] for batch in one]
    assert all(a <= b for a, b in itertools.pairwise(widths))  # shortest first, so that items of a batch are of similar length
    longest = int(np.diff(reference.offsets).max())
    assert widths[-1] == longest


# --- the artifact --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("offsets", np.array([0, 2, 5], np.int64)),
        ("offsets", np.array([1, 2, 4], np.int64)),
        ("offsets", np.array([0, 5, 4], np.int64)),
        ("offsets", np.array([4], np.int64)),
        ("offsets", np.array([], np.int64)),
        ("labels", np.zeros(3, np.int32)),
        ("tokens", np.zeros(5, np.int32)),
    ],
)
def test_arrays_that_contradict_each_other_are_refused(tmp_path: Path, name: str, values: npt.NDArray[Any]) -> None:
    arrays: dict[str, npt.NDArray[Any]] = {
        "tokens": np.zeros(4, np.int32),
        "labels": np.zeros(4, np.int32),
        "offsets": np.array([0, 2, 4], np.int64),
    }

    def write(directory: Path, chosen: dict[str, npt.NDArray[Any]]) -> Path:
        directory.mkdir()
        for array_name, array in chosen.items():
            np.save(directory / f"{array_name}.npy", array)
        artifact.commit(directory, kind="reference", settings={"name": "x"}, inputs={}, info={}, cost=artifact.Cost())
        return directory

    assert open_reference(write(tmp_path / "good", dict(arrays))).items == 2
    with pytest.raises(ArtifactError, match="do not belong together"):
        open_reference(write(tmp_path / "bad", arrays | {name: values}))


# --- LAMBADA -------------------------------------------------------------------------------------------------------


def test_lambada_with_the_gpt_neox_tokenizer(lambada_file: Path, neox_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(neox_tokenizer)
    rows = [json.loads(line)["text"] for line in lambada_file.read_text(encoding="utf-8").split("\n") if line]
    passages = read_passages(lambada_file, seed=0)
    assert len(rows) == 5_153
    assert [passage.text for passage in passages] == list(dict.fromkeys(rows))
    for passage in passages:  # lm_eval's lambada_openai: all but the last of text.split(' '), and ' ' + the last
        words_of = passage.text.split(" ")
        assert (passage.context, passage.target) == (" ".join(words_of[:-1]), " " + words_of[-1])
    assert abs(sum(passage.half == "train" for passage in passages) - len(passages) / 2) < 4 * math.sqrt(len(passages)) / 2

    check_packing(passages[::10], tokenizer, 2_048)
    check_packing(passages[::40], tokenizer, 50)

    tokens, labels, offsets = pack(passages, tokenizer, 2_048)
    reference = Reference("lambada", NO_MANIFEST, tokens, labels, offsets)
    found: Counter[tuple[int, int]] = Counter()
    padded = 0
    for batch in label_batches(reference, batch_tokens=8_192, device=CPU):
        padded += batch.tokens.numel()
        found.update(zip(batch.items.tolist(), batch.targets.tolist(), strict=True))
    owners = np.repeat(np.arange(len(passages)), np.diff(offsets))
    carries = labels != IGNORED
    assert found == Counter(zip(owners[carries].tolist(), labels[carries].tolist(), strict=True))
    assert padded < 1.1 * len(tokens)

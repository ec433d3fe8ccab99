"""Reference tasks: halves, contamination, packing as lm_eval counts tokens, and batches."""

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
from mates.engine.reference.task import (
    IGNORED,
    Half,
    Passage,
    Reference,
    choose,
    drop_overlapping,
    make_reference,
    ngrams,
    open_reference,
    pack,
    read_passages,
)
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, ArtifactMismatchError, Manifest
from mates.preprocess.readers import InputError
from mates.preprocess.tokenizer import Tokenizer, load_tokenizer, open_tokenizer

CPU = torch.device("cpu")
Row = dict[str, Any]


def write_lines(path: Path, rows: Sequence[Row | str]) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows),
        encoding="utf-8",
    )
    return path


# --- reading -------------------------------------------------------------------------------------------------------


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
    with pytest.raises(InputError, match=r"reference\.source: .*none\.jsonl: no such file"):
        read_passages(tmp_path / "none.jsonl", seed=0)


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


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    return write_lines(tmp_path_factory.mktemp("source") / "passages.jsonl", [{"text": text} for text in texts])


def make(directory: Path, sources: list[Path], bpe_dir: Path, **changes: Any) -> dict[Half, Manifest]:
    settings: Row = {
        "sources": sources,
        "name": "words",
        "items": {"train": 100, "test": 80},
        "tokenizer_dir": bpe_dir,
        "max_tokens": 64,
        "seed": 3,
    }
    return make_reference(directory, **(settings | changes))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*.npy")}


def times(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in directory.rglob("*")}


def test_the_artifact_holds_the_chosen_passages(tmp_path: Path, source: Path, bpe_dir: Path, bpe: Tokenizer) -> None:
    made = make(tmp_path, [source], bpe_dir)
    passages = read_passages(source, 3)
    train = choose(passages, "train", 100, 3)
    kept, dropped = drop_overlapping([passage for passage in passages if passage.half == "test"], train)
    expected_halves: dict[Half, list[Passage]] = {"train": train, "test": choose(kept, "test", 80, 3)}
    for half, chosen in expected_halves.items():
        found = open_reference(tmp_path / half)
        expected = pack(chosen, bpe, 64)
        assert found.tokens.tolist() == expected[0].tolist()
        assert found.labels.tolist() == expected[1].tolist()
        assert found.offsets.tolist() == expected[2].tolist()
        assert (found.name, found.items, len(chosen)) == ("words", len(chosen), {"train": 100, "test": 80}[half])
        assert found.manifest == artifact.verify(tmp_path / half, "reference") == made[half]
        assert found.manifest.info == {
            "items": len(chosen),
            "tokens": len(expected[0]),
            "label_tokens": int((expected[1] != IGNORED).sum()),
            "dropped_for_overlap": dropped if half == "test" else 0,
        }


def test_a_passage_of_both_sources_counts_once(tmp_path: Path, bpe_dir: Path) -> None:
    third = write_lines(tmp_path / "c.jsonl", [{"text": "a train passage 1", "split": "train"}])
    first = write_lines(tmp_path / "a.jsonl", [{"text": f"a train passage {n}", "split": "train"} for n in range(5)])
    second = write_lines(
        tmp_path / "b.jsonl",
        [{"text": f"a {'train' if n < 3 else 'test'} passage {n}", "split": "test"} for n in range(9)],
    )
    made = make(tmp_path / "out", [first, second], bpe_dir, items={"train": 5, "test": 99})
    assert (made["train"].info["items"], made["test"].info["items"]) == (5, 6)
    with pytest.raises(InputError, match=r"5 passages in the train half, reference\.items asks for 6"):
        make(tmp_path / "other", [first, second, third], bpe_dir, items={"train": 6, "test": 99})


def test_overlapping_passages_are_dropped_from_the_test_half(tmp_path: Path, bpe_dir: Path) -> None:
    run = " ".join(f"w{number}" for number in range(13))
    rows: list[Row | str] = [{"text": f"{run} first", "split": "train"}, {"text": "other train", "split": "train"}]
    rows += [{"text": f"{start} {run} second", "split": "test"} for start in ("x", "y", "z")]
    rows += [{"text": f"clean passage {number}", "split": "test"} for number in range(4)]
    made = make(tmp_path / "out", [write_lines(tmp_path / "a.jsonl", rows)], bpe_dir, items={"train": 2, "test": 99})
    assert made["test"].info["items"] == 4
    assert made["test"].info["dropped_for_overlap"] == 3


def test_it_is_made_once_and_another_is_refused(tmp_path: Path, source: Path, bpe_dir: Path) -> None:
    made = make(tmp_path / "out", [source], bpe_dir)
    before = times(tmp_path)
    assert make(tmp_path / "out", [source], bpe_dir) == made
    changes: list[tuple[Row, str]] = [
        ({"name": "other"}, 'name: "words", now asked "other"'),
        ({"items": {"train": 99, "test": 80}}, "items: 100, now asked 99"),
        ({"items": {"train": 100, "test": 79}}, "test_items: 80, now asked 79"),
        ({"max_tokens": 65}, "max_tokens: 64, now asked 65"),
        ({"seed": 4}, "seed: 3, now asked 4"),
        ({"sources": [source, source]}, "input source: "),
    ]
    for change, message in changes:
        settings: Row = {"sources": [source]} | change
        with pytest.raises(ArtifactMismatchError, match=message):
            make(tmp_path / "out", bpe_dir=bpe_dir, **settings)
    assert times(tmp_path) == before


@pytest.mark.parametrize("lost", [["train"], ["test"], ["train", "test"]])
def test_an_interrupted_step_is_done_again_to_the_same_bytes(tmp_path: Path, source: Path, bpe_dir: Path, lost: list[str]) -> None:
    made = make(tmp_path, [source], bpe_dir)
    before = contents(tmp_path)
    for half in lost:
        artifact.unmake(tmp_path / half)
        (tmp_path / half / "tokens.npy").write_bytes(b"half")
    again = make(tmp_path, [source], bpe_dir)
    assert contents(tmp_path) == before
    assert [again[half].fingerprint for half in made] == [made[half].fingerprint for half in made]
    assert artifact.verify(tmp_path / "train") == again["train"]


def test_no_manifest_stands_while_files_are_rewritten(tmp_path: Path, source: Path, bpe_dir: Path) -> None:
    """A step that makes both halves again and fails between them leaves no manifest that might speak of other files."""
    make(tmp_path, [source], bpe_dir)
    artifact.unmake(tmp_path / "train")
    (tmp_path / "train" / "labels.npy").unlink()
    (tmp_path / "train" / "labels.npy").mkdir()  # cannot be replaced by a file
    with pytest.raises(IsADirectoryError):
        make(tmp_path, [source], bpe_dir)
    assert not list(tmp_path.rglob("manifest.json"))


def test_too_few_passages_are_refused_with_both_numbers(tmp_path: Path, source: Path, bpe_dir: Path) -> None:
    count = sum(passage.half == "train" for passage in read_passages(source, 3))
    with pytest.raises(InputError, match=rf"{count} passages in the train half, reference\.items asks for {count + 1}"):
        make(tmp_path / "a", [source], bpe_dir, items={"train": count + 1, "test": 2})
    rows: list[Row | str] = [{"text": f"p {n}", "split": "test" if n == 0 else "train"} for n in range(9)]
    with pytest.raises(InputError, match="1 passages left in the test half, at least 2 are needed"):
        make(tmp_path / "b", [write_lines(tmp_path / "b.jsonl", rows)], bpe_dir, items={"train": 4, "test": 2})
    with pytest.raises(InputError, match=r"reference\.source: .*none: no such file"):
        make(tmp_path / "c", [source, tmp_path / "none"], bpe_dir)
    assert not list(tmp_path.rglob("manifest.json"))


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

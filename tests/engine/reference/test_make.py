"""Reference artifacts: the main task's two halves, further tasks, and what is left out of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mates.engine.reference.formats import read_items, read_passages
from mates.engine.reference.make import make_further_reference, make_reference
from mates.engine.reference.overlap import contamination
from mates.engine.reference.task import IGNORED, Half, Passage, choose, drop_overlapping, open_reference, pack
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactMismatchError, Manifest
from mates.preprocess.readers import InputError
from mates.preprocess.tokenizer import Tokenizer, open_tokenizer

Row = dict[str, Any]


def write_lines(path: Path, rows: Sequence[Row | str]) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows),
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def bpe(bpe_dir: Path) -> Tokenizer:
    return open_tokenizer(bpe_dir)[0]


# --- the main task -------------------------------------------------------------------------------------------------


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


# --- other formats, and files to avoid -----------------------------------------------------------------------------


def arc_rows(texts: Sequence[str]) -> list[Row]:
    """Questions of about 15 words from different places of different texts."""
    words = [text.split() for text in texts]
    return [
        {"question": " ".join(own[:15]) + "?", "choices": [own[0], own[-1], "neither"], "label": number % 3}
        for number, own in enumerate(words)
    ]


@pytest.fixture(scope="module")
def arc(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    return write_lines(tmp_path_factory.mktemp("arc") / "train.jsonl", arc_rows(texts[:300]))


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """Holds every tenth item of ``arc`` and 30 others."""
    rows = [*arc_rows(texts[:300])[::10], *arc_rows(texts[300:330])]
    return write_lines(tmp_path_factory.mktemp("evaluation") / "test.jsonl", rows)


def make_further(directory: Path, source: Path, bpe_dir: Path, **changes: Any) -> Manifest:
    settings: Row = {"name": "arc-easy", "form": "arc", "items": 50, "tokenizer_dir": bpe_dir, "max_tokens": 64, "seed": 3}
    return make_further_reference(directory, source=source, **(settings | changes))


def test_a_further_task_is_drawn_from_all_of_its_file(tmp_path: Path, arc: Path, bpe_dir: Path, bpe: Tokenizer) -> None:
    made = make_further(tmp_path, arc, bpe_dir)
    every = [Passage(passage.context, passage.target, "train") for passage in read_items(arc, "arc", 3)]
    chosen = choose(every, "train", 50, 3)
    found, expected = open_reference(tmp_path), pack(chosen, bpe, 64)
    assert found.tokens.tolist() == expected[0].tolist()
    assert found.labels.tolist() == expected[1].tolist()
    assert found.offsets.tolist() == expected[2].tolist()
    assert (found.name, found.items) == ("arc-easy", 50)
    assert found.manifest == artifact.verify(tmp_path, "reference") == made
    carried = [label for label in found.labels.tolist() if label != IGNORED]
    assert bpe.decode(carried) == "".join(passage.target for passage in chosen)
    halves = {passage.half for passage in read_items(arc, "arc", 3) if (passage.context, passage.target) in set(pairs(chosen))}
    assert halves == {"train", "test"}  # no half of it is held out
    assert made.info == {"items": 50, "tokens": len(expected[0]), "label_tokens": len(carried), "dropped_for_overlap": 0}


def pairs(passages: Sequence[Passage]) -> list[tuple[str, str]]:
    return [(passage.context, passage.target) for passage in passages]


def test_a_further_task_is_made_once_and_another_is_refused(tmp_path: Path, arc: Path, evaluation: Path, bpe_dir: Path) -> None:
    made = make_further(tmp_path / "out", arc, bpe_dir)
    before = times(tmp_path)
    assert make_further(tmp_path / "out", arc, bpe_dir) == made
    changes: list[tuple[Row, str]] = [
        ({"items": 49}, "items: 50, now asked 49"),
        ({"form": "openbookqa"}, 'format: "arc", now asked "openbookqa"'),
        ({"source": evaluation}, "input source: "),
        ({"avoid": [("arc", evaluation)]}, "input avoid: "),
    ]
    for change, message in changes:
        settings: Row = {"source": arc} | change
        with pytest.raises(ArtifactMismatchError, match=message):
            make_further(tmp_path / "out", bpe_dir=bpe_dir, **settings)
    assert times(tmp_path) == before


def test_items_of_an_evaluation_are_left_out_before_the_choice(tmp_path: Path, arc: Path, evaluation: Path, bpe_dir: Path) -> None:
    """With as many items asked for as there are clean ones, all of these are taken and nothing else."""
    avoided = read_items(evaluation, "arc", 0)
    clean = [passage for passage in read_items(arc, "arc", 3) if not contamination([passage], avoided)[0]]
    assert len(clean) == 270
    made = make_further(tmp_path / "out", arc, bpe_dir, items=270, avoid=[("arc", evaluation)])
    assert (made.info["items"], made.info["dropped_for_overlap"]) == (270, 30)
    with pytest.raises(ArtifactMismatchError, match="input avoid: "):  # the same file, read as another task's
        make_further(tmp_path / "out", arc, bpe_dir, items=270, avoid=[("openbookqa", evaluation)])
    message = (
        r"train\.jsonl: 270 different items after 30 that overlap with reference\.avoid, reference\.more \(arc-easy\)\.items asks for 271"
    )
    with pytest.raises(InputError, match=message):
        make_further(tmp_path / "other", arc, bpe_dir, items=271, avoid=[("arc", evaluation)])


def test_the_main_task_in_another_format(tmp_path: Path, arc: Path, evaluation: Path, bpe_dir: Path, bpe: Tokenizer) -> None:
    """Its train half avoids the evaluation; the held-out half is compared with the reference alone."""
    avoided, passages = read_items(evaluation, "arc", 0), read_items(arc, "arc", 3)
    own = [passage for passage in passages if passage.half == "train"]
    clean = [passage for passage in own if not contamination([passage], avoided)[0]]
    dropped = len(own) - len(clean)
    assert dropped > 5
    made = make(tmp_path, [arc], bpe_dir, form="arc", avoid=[("arc", evaluation)], items={"train": len(clean), "test": 10**6})
    assert made["train"].info["dropped_for_overlap"] == dropped
    assert made["test"].info["items"] == len(passages) - len(own) - made["test"].info["dropped_for_overlap"]
    found, expected = open_reference(tmp_path / "train"), pack(choose(clean, "train", 10**6, 3), bpe, 64)
    assert found.labels.tolist() == expected[1].tolist()
    assert made["train"].settings["format"] == "arc"
    with pytest.raises(InputError, match=rf"{len(clean)} passages in the train half after {dropped} that overlap with reference\.avoid"):
        make(tmp_path / "a", [arc], bpe_dir, form="arc", avoid=[("arc", evaluation)], items={"train": len(clean) + 1, "test": 9})


def test_a_repeated_item_counts_once(tmp_path: Path, bpe_dir: Path) -> None:
    rows = [{"goal": f"goal {number % 5}", "sol1": "a", "sol2": "b", "label": 0} for number in range(10)]
    path = write_lines(tmp_path / "p.jsonl", rows)
    assert make_further(tmp_path / "out", path, bpe_dir, form="piqa", items=5).info["items"] == 5
    with pytest.raises(InputError, match=r"p\.jsonl: 5 different items, reference\.more \(goals\)\.items asks for 6"):
        make_further(tmp_path / "more", path, bpe_dir, form="piqa", items=6, name="goals")


def test_a_file_that_is_not_there_is_named_with_its_field(tmp_path: Path, arc: Path, bpe_dir: Path) -> None:
    with pytest.raises(InputError, match=r"reference\.more \(arc-easy\)\.source: .*none: no such file"):
        make_further(tmp_path / "a", tmp_path / "none", bpe_dir)
    with pytest.raises(InputError, match=r"reference\.avoid: .*none: no such file"):
        make_further(tmp_path / "a", arc, bpe_dir, avoid=[("arc", tmp_path / "none")])
    assert not (tmp_path / "a").exists()

"""Deliberate mistakes in recipes and inputs: each is refused before any work starts, by a message that says what to do."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from mates.launchers.cli import main

MISTAKES = [
    (["run", "--select.ratio", "1.5"], "select.ratio: found 1.5, expected a share above 0 and at most 1"),
    (
        ["run", "--pretrain.sequence_length", "4096"],
        "pretrain.sequence_length: found 4096, expected at most the model's max_positions = 512",
    ),
    (["run", "--pretrain.lr", "fast"], '"pretrain.lr"'),
    (["run", "--pretrian.lr", "0.1"], "--pretrian.lr"),
    (["run", "nowhere.yaml"], "nowhere.yaml"),
    (["run", "--methods", "[mates,best]"], "best"),
    (["run", "--model.preset", "pythia-9b"], "model.preset: found 'pythia-9b', expected one of pythia-14m"),
    (["run", "--model.heads", "5"], "model.heads: found 5, expected a divisor of model.hidden_size = 128"),
    (
        ["run", "--pretrain.batch_size", "31", "--launch.processes", "2"],
        "pretrain.batch_size: found 31, expected a multiple of launch.processes = 2",
    ),
    (
        ["run", "--evaluate.decay_steps", "500"],
        "evaluate.decay_steps: found 500, expected at most pretrain.steps_per_stage = 100",
    ),
    (["run", "--select.temperature", "0"], "select.temperature: found 0.0, expected at least 1e-6"),
    (["run", "--corpus.pool_share", "0.99"], "corpus.pool_share + corpus.holdout_share"),
    (["probe", "--stage", "0"], "--stage: found 0, expected one of [1, 2] for probe"),
    (
        ["pretrain", "--stage", "1", "--method", "best"],
        "--method: found 'best', expected one of the recipe's methods: random, mates",
    ),
    (["probe", "--stage", "1", "--method", "random"], "random needs no probe"),
    (
        ["run", "--launch.deepspeed", "{gradient_clipping: 0.5}"],
        "launch.deepspeed.gradient_clipping: found 0.5, expected nothing: pretrain.clip_norm",
    ),
    (["run", "--pretrain.weight_decay", ".inf"], "pretrain.weight_decay: found inf, expected a finite number"),
    (["run", "--reference.source", "nowhere.jsonl"], "reference.source: found 'nowhere.jsonl', expected a file that is there"),
    (["report", "--run_dir", "nothing"], "run_dir: found 'nothing', expected the folder of a run"),
    (["trian"], "unknown verb 'trian'"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_bad_arguments(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [], "nothing may be written before the recipe is known to be good"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"pretrain: {lr: 0.1}\npretrain: {lr: 0.2}\n", "the key 'pretrain' is there twice"),
        (b"pretrain:\n", "pretrain: found None, expected a mapping of its fields"),
        (b"", "found NoneType, expected a mapping of recipe fields"),
        (b"- 1\n", "found list, expected a mapping of recipe fields"),
        (b"\xff\xfe\x00", "cannot be read as a recipe"),
        (b"a: &a [*a]\n", "found a, expected only run_dir, data_dir"),
    ],
)
def test_files_that_are_no_recipe(content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    assert main(["run", str(path)]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.splitlines()) < 10


def test_printed_recipe_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for verb, arguments in (
        ("run", ["--select.ratio", "0.3"]),
        ("pretrain", [str(tmp_path / "0.yaml")]),
        ("plan", [str(tmp_path / "1.yaml")]),
    ):
        with pytest.raises(SystemExit) as end:
            main([verb, *arguments, "--print_config"])
        assert end.value.code == 0
        printed.append(capsys.readouterr().out)
        (tmp_path / f"{len(printed) - 1}.yaml").write_text(printed[-1])
    assert printed[0] == printed[1] == printed[2]
    assert "ratio: 0.3" in printed[0]


def test_unknown_key_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("pretrain: {learning_rate: 0.1}\n")
    assert main(["run", str(recipe)]) == 2
    message = capsys.readouterr().err
    assert "learning_rate" in message


def write_documents(path: Path, rows: list[str]) -> Path:
    with gzip.open(path, "wt") as handle:
        handle.write("\n".join(rows))
    return path


@pytest.fixture
def corpus_arguments(tmp_path: Path) -> list[str]:
    """A small corpus and tokenizer settings, into a run folder below tmp_path."""
    rows = [json.dumps({"text": f"Document {number} tells of the {number}th thing in plain words. " * 8}) for number in range(400)]
    path = write_documents(tmp_path / "docs.json.gz", rows)
    return ["--corpus.inputs", f"[{path}]", "--run_dir", str(tmp_path / "run"), "--tokenizer.vocab_size", "300"]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_missing_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["tokenizer", "--corpus.inputs", f"[{tmp_path}/none-*.json.gz]", "--run_dir", str(tmp_path / "run")], capsys)
    assert f"{tmp_path}/none-*.json.gz: no such file, folder or match" in message


def test_cut_input(tmp_path: Path, corpus_arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "docs.json.gz"
    path.write_bytes(path.read_bytes()[:-300])
    message = refused(["tokenizer", *corpus_arguments, "--corpus.on_bad_input", "fail"], capsys)
    assert str(path) in message
    assert "damaged after" in message
    assert main(["tokenizer", *corpus_arguments]) == 0
    assert main(["preprocess", *corpus_arguments]) == 0
    assert "WARNING: 1 damaged files were read up to the damage" in capsys.readouterr().out


def test_wrong_text_field(corpus_arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", *corpus_arguments]) == 0
    message = refused(["preprocess", *corpus_arguments, "--corpus.text_field", "content"], capsys)
    assert "no document for the train corpus" in message
    assert "'no text field': 400" in message


def test_step_before_its_input(corpus_arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["preprocess", *corpus_arguments], capsys)
    assert "no complete tokenizer artifact here" in message


def test_corpus_too_small(corpus_arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("tokenizer", "preprocess"):
        assert main([verb, *corpus_arguments]) == 0
    message = refused(["select", *corpus_arguments], capsys)
    assert "need 35,200" in message
    assert "samples of 128 tokens" in message


def test_changed_recipe_over_finished_work(corpus_arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", *corpus_arguments]) == 0
    message = refused(["tokenizer", *corpus_arguments, "--tokenizer.train_bytes", "123456"], capsys)
    assert "train_bytes: 20000000, now asked 123456" in message


def test_not_a_tokenizer(tmp_path: Path, corpus_arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    message = refused(["tokenizer", *corpus_arguments, "--tokenizer.path", str(tmp_path / "tokenizer.json")], capsys)
    assert f"{tmp_path}/tokenizer.json: not a tokenizer.json" in message


def test_broken_reference(tmp_path: Path, corpus_arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "task.jsonl").write_text('{"text": "One two three"}\n{"passage": "four"}\n')
    assert main(["tokenizer", *corpus_arguments]) == 0
    message = refused(["reference", *corpus_arguments, "--reference.source", str(tmp_path / "task.jsonl")], capsys)
    assert f"{tmp_path}/task.jsonl:2: expected a JSON object with a 'text'" in message


def test_damage_is_found_by_inspect(tmp_path: Path, corpus_arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("tokenizer", "preprocess"):
        assert main([verb, *corpus_arguments]) == 0
    tokens = tmp_path / "run/data/corpus/train/tokens.bin"
    assert main(["inspect", str(tokens.parent)]) == 0
    data = bytearray(tokens.read_bytes())
    data[100] ^= 1
    tokens.write_bytes(data)
    assert main(["inspect", str(tokens.parent)]) == 1
    assert f"{tokens}: BLAKE3" in capsys.readouterr().out
    tokens.write_bytes(data[:-2])
    message = refused(["select", *corpus_arguments], capsys)
    assert f"{tokens}: {len(data) - 2} bytes, the manifest says {len(data)}" in message

"""The tokenization benchmark: what it writes on a little text, and its gate, which a wrong result of any contestant closes."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import tokenize_corpus
from tokenize_corpus import FLOOR, FORMATS, PEERS, claims, documents_of, line_blocks, spread, steady, write_documents


@pytest.fixture
def options(tmp_path: Path, texts: list[str], bpe_dir: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options that make the benchmark short. The documents hold one text twice, and one that spells a special token.

    megatron-core is hidden from the benchmark's processes: importing it takes longer than all the rest.
    """
    (tmp_path / "path" / "megatron").mkdir(parents=True)
    (tmp_path / "path" / "megatron" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    documents = [
        {"text": text, "url": f"https://example.org/{number}"} for number, text in enumerate([*texts, texts[0], "<|endoftext|> x"])
    ]
    write_documents(tmp_path / "text.jsonl.zst", documents)
    chosen = ["--inputs", str(tmp_path / "text.jsonl.zst"), "--tokenizer", str(bpe_dir), "--out", str(tmp_path / "out" / "tokenize.json")]
    return [
        *chosen,
        "--shards",
        "2",
        "--repeats",
        "1",
        "--floor_repeats",
        "1",
        "--floor_groups",
        "2",
        "--subset_mb",
        "0.05",
        "--memory_mb",
        "0.5",
        "--work",
        str(tmp_path / "work"),
    ]


def result_of(options: list[str]) -> Path:
    return Path(options[options.index("--out") + 1])


def test_every_figure_is_there(options: list[str], texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert tokenize_corpus.main([*options, "--workers", "1"]) == 0
    found = json.loads(result_of(options).read_bytes())
    assert found["corpus"]["documents"] == len(texts) + 1
    assert found["corpus"]["repeated_dropped"] == 1
    assert found["corpus"]["text_bytes"] == sum(len(text.encode()) for text in [*texts, "<|endoftext|> x"])
    part = found["by_workers"]["1"]
    assert set(part["rates"]) >= {"ours", "ours subset", "pool"}
    assert all(rate["process_mb_s"]["n"] == 1 for rate in part["rates"].values())
    assert all("steady_mb_s" in part["rates"][name] for name in ("ours", "pool"))  # None where so little text cannot tell
    assert part["ours_over"]["pool"]["process"]["median"] > 0
    assert set(part["ours_over"]) == set(PEERS)
    assert part["ours_over"]["megatron"] is None
    assert set(found["floor"]["cpu_s_per_gb"]) == {*FLOOR, "floor", "ours", "ours with metadata"}
    assert [len(found["floor"]["runs"][name]) for name in (*FLOOR, "ours", "ours with metadata")] == [1] * 6
    assert found["memory"]["text_bytes"] == found["corpus"]["text_bytes"] + found["memory"]["derived_text_bytes"] >= 0.5e6
    assert found["memory"]["mib"] > 10
    assert found["scaling"] == {}
    assert len(found["gate"]["digests"]["shards"]) == 64
    assert [claim["holds"] for claim in found["claims"] if "Megatron's own" in claim["claim"]] == [None]
    assert [claim["holds"] for claim in found["claims"] if "workers of that" in claim["claim"]] == [None]
    assert str(Path.cwd()) not in json.dumps(found)
    assert "megatron: not measured" in capsys.readouterr().out


@pytest.mark.parametrize("contestant", ["pool", "ours", "tokenize"])
def test_a_wrong_result_closes_the_gate(
    contestant: str, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tokenize_corpus.run_child
    runs = 0

    def wrong(task: dict[str, Any], **more: Any) -> dict[str, Any]:
        nonlocal runs
        found = run(task, **more)
        runs += task["task"] == contestant
        if task["task"] != contestant or (contestant == "ours" and runs == 1):  # ours must differ from its own first run
            return found
        place = {"pool": Path(task["out"] + ".bin"), "ours": Path(task["out"]) / "train" / "tokens.bin"}.get(contestant)
        if place is None:
            return found | {"tokens": found["tokens"] + 1}
        data = bytearray(place.read_bytes())
        data[-1] ^= 1
        place.write_bytes(data)
        return found

    monkeypatch.setattr(tokenize_corpus, "run_child", wrong)
    assert tokenize_corpus.main([*options, "--workers", "1,2" if contestant == "ours" else "1"]) == 1
    assert "tokenize_corpus: gate: " in capsys.readouterr().err
    assert not result_of(options).exists()


def test_a_failed_contestant_is_named_and_nothing_is_written(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path(options[options.index("--inputs") + 1]).write_bytes(b"not zstd")
    assert tokenize_corpus.main(options) == 1
    assert "prepare ended with 1" in capsys.readouterr().err
    assert not result_of(options).exists()


@pytest.mark.parametrize("change", [["--workers", "0"], ["--workers", "100000"], ["--shards", "1"], ["--inputs", "/no/such"]])
def test_bad_options(options: list[str], change: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        tokenize_corpus.parse([*options, *change])
    assert raised.value.code == 2


@pytest.mark.parametrize("form", FORMATS)
def test_shards_hold_the_documents(form: str, tmp_path: Path, texts: list[str]) -> None:
    documents = [{"text": text, "url": None, "timestamp": "2019", "source": "é"} for text in texts]
    write_documents(tmp_path / f"a.{form}", documents)
    assert list(documents_of(tmp_path / f"a.{form}")) == documents


def test_blocks_end_at_lines() -> None:
    assert list(line_blocks(iter([b"a\nb", b"c", b"d\ne\nf", b"g"]))) == [b"a\n", b"bcd\ne\n", b"fg"]


def test_steady_seconds_are_less_the_median_start() -> None:
    runs = {"ours": [{"wall_s": 5.0}, {"wall_s": 6.0}], "ours start": [{"wall_s": 1.0}, {"wall_s": 2.0}]}
    assert steady(runs, "ours", "wall_s") == [3.5, 4.5]


def test_a_run_that_the_starts_drown_out_gives_no_rate() -> None:
    runs = {"ours": [{"wall_s": 5.0}, {"wall_s": 2.4}], "ours start": [{"wall_s": 1.0}, {"wall_s": 2.0}]}
    assert math.isnan(steady(runs, "ours", "wall_s")[1])
    assert spread(steady(runs, "ours", "wall_s")) is None
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "range": [1.0, 3.0], "n": 3}


def by_workers(pool: float) -> dict[str, Any]:
    def over(value: float) -> dict[str, Any]:
        return {"pool": {"steady": {"median": value}}, "datatrove": None, "megatron": None}

    return {"1": {"ours_over": over(50.0)}, "2": {"ours_over": over(pool)}}


def test_claims_hold_by_their_worst_figure() -> None:
    def holds(pool: float, cpu: float, gain: float, mib: float) -> list[bool | None]:
        floor = {"cpu_share": {"median": cpu}, "wall_share": {"median": 0.9}}
        return [claim["holds"] for claim in claims(by_workers(pool), floor, {"gain": {"median": gain}}, {"mib": mib})]

    assert holds(41, 0.86, 1.9, 390) == [True, None, None, True, True, True, True]
    assert holds(39, 0.84, 1.7, 410) == [False, None, None, False, True, False, False]


def test_a_claim_without_a_figure_is_not_measured() -> None:
    floor = {"cpu_share": None, "wall_share": {"median": 0.9}}
    assert [claim["holds"] for claim in claims(by_workers(41), floor, {}, {"mib": 390})] == [True, None, None, None, True, True, None]

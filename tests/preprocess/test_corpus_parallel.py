"""One corpus made by many: workers, MPI ranks, killed processes and full disks leave the same bytes, or none."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from small_disks import resize, small_disk_at

from mates.preprocess import artifact, encode
from mates.preprocess.artifact import ArtifactError, DiskFullError, Manifest
from mates.preprocess.corpus import SPLITS, CorpusError, CorpusSettings, SplitShares, make_corpora
from mates.preprocess.encode import EngineDifferenceError
from mates.preprocess.indexed import open_indexed
from mates.preprocess.inputs import InputError, find_inputs
from mates.preprocess.parts import PartFiles, PartRecord
from mates.preprocess.ranks import RanksError, find_ranks
from mates.preprocess.readers import ReadOptions
from mates.preprocess.workers import Stop, WorkerDiedError, for_each

SETTINGS = CorpusSettings(shares=SplitShares(pool=0.2, holdout=0.1, seed=5), reading=ReadOptions(), features=("length", "ngrams"))
PART_BYTES = 80_000
# what a test starts in a process of its own
SCRIPT = """
import sys
from pathlib import Path
from mates.preprocess.inputs import find_inputs
from mates.preprocess.corpus import make_corpora
from mates.preprocess.parts import PartFiles, PartRecord
from mates.preprocess.ranks import MpiRanks, find_ranks
from tests.preprocess.test_corpus_parallel import PART_BYTES, SETTINGS
if __name__ == "__main__":
    directory, inputs, tokenizer, workers, expected_ranks = sys.argv[1:]
    ranks = find_ranks()
    assert ranks.size == int(expected_ranks), (ranks.size, expected_ranks)
    make_corpora(
        Path(directory), inputs=find_inputs([inputs]), settings=SETTINGS, tokenizer_dir=Path(tokenizer), workers=int(workers),
        part_bytes=PART_BYTES, ranks=ranks, say=print,
    )
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """Some twenty parts: two large files without compression, small ones, one bad line in each, an empty file."""
    folder = tmp_path_factory.mktemp("inputs")
    source = random.Random(4)
    for number, count in enumerate((900, 3, 700, 40, 60)):
        rows = [json.dumps({"text": f"{number}.{row} {source.choice(texts)}", "url": f"u{row}"}) for row in range(count)]
        rows.insert(count // 2, "{broken")
        (folder / f"{number}.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "9.jsonl").write_text("")
    return folder


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "make.py"
    path.write_text(SCRIPT)
    return path


def make(directory: Path, inputs: Path, bpe_dir: Path, *, workers: int = 1, settings: CorpusSettings = SETTINGS) -> dict[str, Manifest]:
    return make_corpora(
        directory,
        inputs=find_inputs([str(inputs)]),
        settings=settings,
        tokenizer_dir=bpe_dir,
        workers=workers,
        part_bytes=PART_BYTES,
    )


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every data file."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "manifest.json" and not path.name.endswith(".lock")
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, inputs: Path, bpe_dir: Path) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("expected")
    made = make(directory, inputs, bpe_dir)
    assert made["train"].info["engine"]["name"] == "fastokens"
    assert sum(manifest.info["documents"] for manifest in made.values()) == 900 + 3 + 700 + 40 + 60
    found = hashes(directory)
    assert len([name for name in found if name.startswith("train/documents/")]) >= 12  # parts
    assert not list(directory.glob("unfinished-*"))
    return found


def command(script: Path, directory: Path, inputs: Path, bpe_dir: Path, workers: int, ranks: int = 1) -> list[str]:
    return [sys.executable, "-P", str(script), str(directory), str(inputs), str(bpe_dir), str(workers), str(ranks)]


def environment() -> dict[str, str]:
    tests = Path(__file__).parents[1]
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}


# --- the same bytes from any number --------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_any_number_of_workers_gives_the_same_bytes(
    tmp_path: Path, inputs: Path, bpe_dir: Path, script: Path, expected: dict[str, str], workers: int
) -> None:
    subprocess.run(command(script, tmp_path, inputs, bpe_dir, workers), check=True, env=environment())
    assert hashes(tmp_path) == expected
    for split in SPLITS:
        artifact.verify(tmp_path / split)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (4, 1), (2, 2)])
def test_any_number_of_mpi_ranks_gives_the_same_bytes(
    tmp_path: Path, inputs: Path, bpe_dir: Path, script: Path, expected: dict[str, str], ranks: int, workers: int
) -> None:
    run = [mpirun(), "-n", str(ranks), *command(script, tmp_path, inputs, bpe_dir, workers, ranks)]
    subprocess.run(run, check=True, env=environment(), timeout=300)
    assert hashes(tmp_path) == expected


def mpirun() -> str:
    """The one that came with the environment's own MPI library: another's processes would not find each other."""
    path = Path(sys.executable).parent / "mpirun"
    if not path.exists():
        pytest.skip("this environment has no mpirun (pip install mpich)")
    return str(path)


def test_part_size_does_not_show_in_the_tokens(tmp_path: Path, inputs: Path, bpe_dir: Path, expected: dict[str, str]) -> None:
    make_corpora(tmp_path, inputs=find_inputs([str(inputs)]), settings=SETTINGS, tokenizer_dir=bpe_dir)
    found = hashes(tmp_path)
    for split in SPLITS:
        for name in ("tokens.bin", "tokens.idx", "ngram_counts.npy"):
            assert found[f"{split}/{name}"] == expected[f"{split}/{name}"]


def test_an_error_of_one_mpi_rank_ends_all(tmp_path: Path, inputs: Path, bpe_dir: Path, script: Path) -> None:
    folder = tmp_path / "inputs"
    shutil.copytree(inputs, folder)
    (folder / "8.json.gz").write_bytes(b"no gzip")
    strict = SCRIPT.replace("settings=SETTINGS", "settings=dataclasses.replace(SETTINGS, reading=ReadOptions(on_bad_input='fail'))")
    path = tmp_path / "strict.py"
    path.write_text("import dataclasses\nfrom mates.preprocess.readers import ReadOptions\n" + strict)
    run = [mpirun(), "-n", "3", *command(path, tmp_path / "out", folder, bpe_dir, 1, 3)]
    done = subprocess.run(run, env=environment(), timeout=300, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "InputError" in done.stderr
    assert not list((tmp_path / "out").rglob("manifest.json"))


def test_what_one_rank_cannot_see_ends_all(tmp_path: Path, inputs: Path) -> None:
    """The command itself: one rank has no inputs, or no recipe. The others must not wait for it, and it is said once."""
    mates = str(Path(sys.executable).parent / "mates")
    (tmp_path / "here/x").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    shutil.copy(inputs / "0.jsonl", tmp_path / "here/x")
    (tmp_path / "here/recipe.yaml").write_text("seed: 1\n")
    for arguments, message in (
        (["--corpus.inputs", "[x/*.jsonl]"], "x/*.jsonl: no such file"),
        (["recipe.yaml"], "cannot be read as a recipe"),
    ):
        one = [mates, "preprocess", *arguments, "--run_dir", str(tmp_path / "run")]
        run = [mpirun(), "-n", "1", "-wdir", str(tmp_path / "here"), *one, ":", "-n", "1", "-wdir", str(tmp_path / "there"), *one]
        done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 2
        assert done.stderr.count(message) == 1
        assert "Traceback" not in done.stderr


def test_ranks_that_do_not_find_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher and an MPI library that do not belong together give N jobs of one rank."""
    mpirun()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(RanksError, match="started 4 ranks, MPI finds 1"):
        find_ranks()


# --- killed --------------------------------------------------------------------------------------------------------


def kill_at_random(runs: int, tmp_path: Path, inputs: Path, bpe_dir: Path, script: Path, expected: dict[str, str]) -> int:
    """SIGKILL processes at random points until ``runs`` kills have hit; returns how many runs were left to finish."""
    source = random.Random(runs)
    kills, finished = 0, 0
    seconds = run_seconds(tmp_path / "timing", inputs, bpe_dir, script)
    directory = tmp_path / "killed"
    while kills < runs:
        process = subprocess.Popen(
            command(script, directory, inputs, bpe_dir, source.choice((1, 2, 3))),
            env=environment(),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        whole_group = source.random() < 0.5  # else the workers are left behind by their parent
        try:
            process.wait(timeout=seconds * source.uniform(0.3, 1.1))
        except subprocess.TimeoutExpired:
            (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            check_never_wrong(directory, expected)
            continue
        assert process.returncode == 0
        finished += 1
        assert hashes(directory) == expected
        shutil.rmtree(directory)
    subprocess.run(command(script, directory, inputs, bpe_dir, 2), check=True, env=environment())
    assert hashes(directory) == expected
    return finished


def run_seconds(directory: Path, inputs: Path, bpe_dir: Path, script: Path) -> float:
    start = time.monotonic()
    subprocess.run(command(script, directory, inputs, bpe_dir, 2), check=True, env=environment())
    return time.monotonic() - start


def check_never_wrong(directory: Path, expected: dict[str, str]) -> None:
    """Whatever opens is right."""
    for split in SPLITS:
        folder = directory / split
        try:
            open_indexed(folder / "tokens")
        except ArtifactError:
            continue
        for name in ("tokens.bin", "tokens.idx"):
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected[f"{split}/{name}"]


def test_killed_runs_continue_to_the_same_bytes(
    tmp_path: Path, inputs: Path, bpe_dir: Path, script: Path, expected: dict[str, str]
) -> None:
    kill_at_random(6, tmp_path, inputs, bpe_dir, script, expected)


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_two_hundred_kills(tmp_path: Path, inputs: Path, bpe_dir: Path, script: Path, expected: dict[str, str]) -> None:
    kill_at_random(200, tmp_path, inputs, bpe_dir, script, expected)


def test_finished_parts_are_not_done_again(
    tmp_path: Path, inputs: Path, bpe_dir: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at every part in turn, each part is written once."""
    from mates.preprocess import parts

    written: list[int] = []
    whole = parts.PartWriter.__call__

    def one_then_interrupted(self: parts.PartWriter, part: parts.Part, progress: object = None) -> parts.PartRecord:
        if written and written[-1] >= 0:
            written.append(-1)
            raise KeyboardInterrupt
        record = whole(self, part)
        written.append(part.number)
        return record

    monkeypatch.setattr(parts.PartWriter, "__call__", one_then_interrupted)
    for _ in range(1_000):
        try:
            make(tmp_path, inputs, bpe_dir)
        except KeyboardInterrupt:
            continue
        break
    numbers = [number for number in written if number >= 0]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) > 12
    assert hashes(tmp_path) == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted_at_every_joined_part(
    tmp_path: Path, inputs: Path, bpe_dir: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    from mates.preprocess import join

    if workers == 1:
        remove, count = join.remove_part, 0

        def interrupted(files: PartFiles, record: PartRecord) -> None:
            nonlocal count
            count += 1
            if count % 3 == 0:
                raise KeyboardInterrupt  # the part is noted as joined and its files are still there
            remove(files, record)

        monkeypatch.setattr(join, "remove_part", interrupted)
    for _ in range(1_000):
        try:
            make(tmp_path, inputs, bpe_dir, workers=workers)
        except KeyboardInterrupt:
            continue
        break
    assert hashes(tmp_path) == expected


def test_joined_files_that_were_lost_are_made_again(
    tmp_path: Path, inputs: Path, bpe_dir: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mates.preprocess import corpus

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(corpus, "_finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, inputs, bpe_dir)
    next((tmp_path / "pool").glob(".tokens.bin.*.joining")).unlink()
    make(tmp_path, inputs, bpe_dir)
    assert hashes(tmp_path) == expected


@pytest.mark.parametrize("kind", ["*-train.bin", "*-pool.lengths", "*-holdout.parquet"])
@pytest.mark.parametrize("damage", ["zeros", "cut", "gone"])
def test_what_a_crash_of_the_machine_took_is_made_again(
    tmp_path: Path, inputs: Path, bpe_dir: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch, kind: str, damage: str
) -> None:
    """Parts are recorded before the disk has all of them."""
    from mates.preprocess import corpus

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(corpus, "_prepare_join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, inputs, bpe_dir)
    path = sorted(path for path in next(tmp_path.glob("unfinished-*")).glob(kind) if path.stat().st_size)[1]
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(bytes(path.stat().st_size) if damage == "zeros" else path.read_bytes()[:-1])
    make(tmp_path, inputs, bpe_dir)
    assert hashes(tmp_path) == expected


def test_work_of_other_settings_in_between_is_not_taken_for_ones_own(
    tmp_path: Path, inputs: Path, bpe_dir: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two settings that give files of the same sizes, each interrupted while joining, turn by turn."""
    from mates.preprocess import join

    other = dataclasses.replace(SETTINGS, reading=ReadOptions(max_document_bytes=1 << 20))

    def interrupted_after(count: int, settings: CorpusSettings) -> None:
        remove = join.remove_part

        def then_interrupted(files: PartFiles, record: PartRecord) -> None:
            nonlocal count
            count -= 1
            if count < 0:
                raise KeyboardInterrupt
            remove(files, record)

        with monkeypatch.context() as context:
            context.setattr(join, "remove_part", then_interrupted)
            with pytest.raises(KeyboardInterrupt):
                make(tmp_path, inputs, bpe_dir, settings=settings)

    for count in (3, 5):
        interrupted_after(count, SETTINGS)
        interrupted_after(1, other)
    make(tmp_path, inputs, bpe_dir)
    left = ("unfinished-", *(f"{split}/." for split in SPLITS))  # what the other settings' work leaves
    assert {name: value for name, value in hashes(tmp_path).items() if not name.startswith(left)} == expected
    for split in SPLITS:
        artifact.verify(tmp_path / split)


@pytest.mark.parametrize("name", ["tokens.bin", "tokens.idx", "documents/00000.parquet"])
def test_files_that_have_their_names_are_read_again_before_they_are_believed(
    tmp_path: Path, inputs: Path, bpe_dir: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Killed between the last name and the manifest; then something else wrote a file of the same size."""

    def interrupted(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(artifact, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, inputs, bpe_dir)
    path = tmp_path / "train" / name
    path.write_bytes(bytes(path.stat().st_size))
    if name.startswith("documents"):
        with pytest.raises(ArtifactError, match=r"not what was written; remove .*unfinished"):
            make(tmp_path, inputs, bpe_dir)
        shutil.rmtree(next(tmp_path.glob("unfinished-*")))
    make(tmp_path, inputs, bpe_dir)
    assert hashes(tmp_path) == expected


# --- in each other's way -------------------------------------------------------------------------------------------


def test_two_at_once_are_kept_apart(tmp_path: Path, inputs: Path, bpe_dir: Path) -> None:
    from mates.preprocess.workers import try_lock

    with (tmp_path / ".lock").open("ab") as handle:
        assert try_lock(handle, 0)
        with pytest.raises(CorpusError, match="another process is making these corpora"):
            make(tmp_path, inputs, bpe_dir)


def test_unfinished_work_of_other_settings_is_kept_and_named(tmp_path: Path, inputs: Path, bpe_dir: Path) -> None:
    other = tmp_path / "unfinished-0123456789abcdef"
    other.mkdir()
    (other / "000000.json").write_text("{}")
    said: list[str] = []
    make_corpora(tmp_path, inputs=find_inputs([str(inputs)]), settings=SETTINGS, tokenizer_dir=bpe_dir, say=said.append)
    assert (other / "000000.json").exists()
    assert any(str(other) in text and "other inputs or settings" in text for text in said)


def test_a_killed_worker_is_said(tmp_path: Path) -> None:
    with pytest.raises(WorkerDiedError, match="killed, most often for want of memory"):
        for_each([1, 2, 3], die, workers=2, done=lambda result: None)


def die(stop: Stop) -> Callable[[int], int]:
    return die_at_work


def die_at_work(piece: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return piece


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_input_ends_all_workers(tmp_path: Path, inputs: Path, bpe_dir: Path, workers: int) -> None:
    strict = CorpusSettings(shares=SETTINGS.shares, reading=ReadOptions(on_bad_input="fail"), features=())
    with pytest.raises(InputError, match=r"\.jsonl.*line \d+"):
        make(tmp_path, inputs, bpe_dir, workers=workers, settings=strict)


# --- the fast tokenizer is wrong -----------------------------------------------------------------------------------


def test_the_library_takes_over_from_a_wrong_engine(
    tmp_path: Path, inputs: Path, bpe_dir: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found late, in a document that is checked by the way: everything is done again by the library, and stays so after a kill."""
    right = encode.FastokensEngine.encode

    def wrong(self: encode.FastokensEngine, texts: Sequence[str], *, ends: bool = False) -> tuple[encode.Ids, encode.Offsets]:
        """A wrong id for one text, which is neither among the edge texts nor the first documents."""
        ids, offsets = right(self, texts, ends=ends)
        ids = ids.copy()
        for row, text in enumerate(texts):
            if text.startswith("2.600 "):
                ids[offsets[row]] += 1
        return ids, offsets

    monkeypatch.setattr(encode.FastokensEngine, "encode", wrong)
    monkeypatch.setattr(encode, "CHECK_ONE_IN", 1)
    said: list[str] = []

    def again() -> dict[str, Manifest]:
        return make_corpora(
            tmp_path,
            inputs=find_inputs([str(inputs)]),
            settings=SETTINGS,
            tokenizer_dir=bpe_dir,
            part_bytes=PART_BYTES,
            say=said.append,
        )

    made = again()
    assert hashes(tmp_path) == expected
    assert made["train"].info["engine"]["name"] == "library"
    assert [text for text in said if "WARNING" in text and "2.600" in text]


# --- full disks ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    with small_disk_at(tmp_path / "small", "1m") as disk:
        yield disk


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_said_and_the_run_continues_when_there_is_space(
    small_disk: Path, inputs: Path, bpe_dir: Path, expected: dict[str, str], workers: int
) -> None:
    """The space grows step by step, so that the disk is full in different places."""
    messages: list[str] = []
    for size in range(1, 40):
        try:
            make(small_disk / "out", inputs, bpe_dir, workers=workers)
        except DiskFullError as error:
            messages.append(str(error))
            resize(small_disk, f"{1024 + 400 * size}k")
        else:
            break
    assert len(messages) > 1
    assert all(re.search(r"the disk is full: [\d,]+ bytes free, about [\d,]+ are needed", message) for message in messages)
    assert hashes(small_disk / "out") == expected


def test_engine_errors_travel_between_processes() -> None:
    import pickle

    error = EngineDifferenceError("fastokens", "text", [1], [2])
    assert str(pickle.loads(pickle.dumps(error))) == str(error)

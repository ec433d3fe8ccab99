"""Claim: text is tokenized many times faster than by the tools in use, at nearly the speed of its parts, in little memory.

    python benchmarks/tokenize_corpus.py [--inputs FILE ...] [--tokenizer DIR] [--workers 1,2] [--datatrove_python PATH] ...

``mates preprocess`` tokenizes C4-like text at least 40 times faster than the design of Megatron's default tool (Hugging Face
``tokenizers``, one document at a time, in a multiprocessing pool that passes lists of ids between processes), at least 10 times
faster than datatrove's tokenizer step, at no less than 85% of the floor, within 400 MiB a worker, nearly linear on two cores.

- Input: the documents of the given files, no text twice, shuffled (so that every prefix has the same mixture) and written to shards
  once. The slow peers take a prefix, the subset, as uncompressed JSON lines; all rates are UTF-8 bytes of text a second.
- With N workers all processes of a contestant share the same N cores.
- Steady time is that of the call, imports done, less that of the same call on 64 documents a worker; process time is all of it, from
  the start of the interpreter. Contestants take turns; ratios are of the same turn, and their median and range are given.
- All contestants make tokens only, since the peers keep nothing else of a document; what it takes to keep url, timestamp and source
  as well, which is the default of ``mates``, is given beside it.
- The floor is what cannot be left out: decompress, parse, tokenize (on an engine that has seen nothing), write the tokens; each timed
  alone, then added up. Ours and these parts take turns in one process on one core, a share of the shards at a time, since the speed of a
  machine drifts; turns over all shards are ``--floor_repeats``, each in a fresh process and every other one in reverse order.
- Nearly linear is 90% of the speed-up that the floor's tokenizing has in separate processes, each on a core of its own: cores of a
  virtual machine may share caches, memory and more.
- Gate before any figure: on the subset the bytes of .bin and .idx are those of the pool of the reference library, on all shards they
  are the same for every number of workers, and the floor's engine counts the same tokens; else nothing is written and the exit code is 1.
- Memory is the largest resident set of any process over ``--memory_mb`` of text. Where the input has less, text is derived for this
  figure alone: documents put together anew from the shuffled sentences of all documents.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import measuring
from measuring import GateError
from surroundings import REPOSITORY, surroundings, without_paths

CLAIM = (
    "mates preprocess tokenizes C4-like text at least 40 times faster than the design of Megatron's default tool, at least 10 times "
    "faster than datatrove's tokenizer step, at no less than 85% of the floor, within 400 MiB a worker, nearly linear on two cores."
)
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
PACKAGES = ("fastokens", "tokenizers", "msgspec", "isal", "zstandard", "pyarrow", "xxhash", "megatron-core")
FIELDS = ("url", "timestamp", "source")
FORMATS = ("jsonl.zst", "json.gz", "jsonl", "parquet")
FLOOR = ("decompress", "parse", "tokenize", "write")
PEERS = ("pool", "datatrove", "megatron")
BLOCK_BYTES = 4 << 20
SUBSET_FILES = 4
START_DOCUMENTS = 64  # for each worker, in the runs that tell what starting costs
ROW_GROUP = 1_000  # documents, in Parquet shards
ALL_WORKERS, AT_ONCE = "ours with all workers", "tokenize at once"
NEARLY_LINEAR = 0.9  # of what processes that know nothing of each other gain on the same cores

Json = dict[str, Any]


class ContestantError(RuntimeError):
    """A process of the benchmark failed."""


# --- documents -----------------------------------------------------------------------------------------------------


def ending(path: str | Path) -> str:
    """Which of FORMATS a file has, by its name."""
    endings = {".zst": "jsonl.zst", ".gz": "json.gz", ".parquet": "parquet"}
    return endings.get(Path(path).suffix, "jsonl")


def decompressed(path: str | Path) -> Iterator[bytes]:
    """A JSON-lines file in pieces of at most BLOCK_BYTES."""
    with Path(path).open("rb") as raw:
        source: Any = raw
        if ending(path) == "jsonl.zst":
            import zstandard

            source = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        elif ending(path) == "json.gz":
            from isal import igzip

            source = igzip.GzipFile(fileobj=raw)
        while piece := source.read(BLOCK_BYTES):
            yield piece


def line_blocks(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes, cut at line ends."""
    rest = b""
    for piece in pieces:
        head, newline, tail = piece.rpartition(b"\n")
        if newline:
            yield rest + head + newline
            rest = tail
        else:
            rest += piece
    if rest:
        yield rest


def documents_of(path: str | Path) -> Iterator[Json]:
    """Documents with text; of each its text and FIELDS."""
    if ending(path) == "parquet":
        import pyarrow.parquet as pq

        rows = (row for batch in pq.ParquetFile(path).iter_batches(ROW_GROUP) for row in batch.to_pylist())
    else:
        import msgspec

        rows = (row for block in line_blocks(decompressed(path)) for row in msgspec.json.Decoder().decode_lines(block))
    for row in rows:
        if row.get("text"):
            yield {"text": row["text"]} | {name: row.get(name) for name in FIELDS}


def write_documents(path: Path, documents: Sequence[Json]) -> None:
    """Write a shard in the format that its name says."""
    if ending(path) == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema([(name, pa.string()) for name in ("text", *FIELDS)])
        pq.write_table(pa.Table.from_pylist(list(documents), schema=schema), path, row_group_size=ROW_GROUP, compression="zstd")
        return
    import gzip

    import msgspec
    import zstandard

    data = b"".join(msgspec.json.encode(document) + b"\n" for document in documents)
    if ending(path) == "jsonl.zst":
        data = zstandard.ZstdCompressor(level=3).compress(data)
    elif ending(path) == "json.gz":
        data = gzip.compress(data, 6)
    path.write_bytes(data)


def written(folder: Path, stem: str, form: str, documents: Sequence[Json], count: int) -> Json:
    """Deal documents to ``count`` files in turn, and say what they hold."""
    paths = [folder / f"{stem}-{number:03d}.{form}" for number in range(count)]
    for number, path in enumerate(paths):
        write_documents(path, documents[number::count])
    return {
        "paths": [str(path) for path in paths],
        "documents": len(documents),
        "text_bytes": sum(len(document["text"].encode()) for document in documents),
        "file_bytes": sum(path.stat().st_size for path in paths),
    }


def prepare(task: Json) -> Json:
    """Write the shards, the subset (in the shards' format, plain, and plain in one file) and a few documents a worker."""
    import xxhash

    documents: list[Json] = []
    seen, taken, repeated = set(), 0, 0
    for document in (document for path in task["inputs"] for document in documents_of(path)):
        digest = xxhash.xxh3_128_digest(document["text"].encode("utf-8", "surrogatepass"))
        if digest in seen:
            repeated += 1
            continue
        if task["text_bytes"] is not None and taken >= task["text_bytes"]:
            break
        seen.add(digest)
        documents.append(document)
        taken += len(document["text"].encode())
    random.Random(0).shuffle(documents)
    subset, size = 0, 0
    while subset < len(documents) and size < task["subset_bytes"]:
        size += len(documents[subset]["text"].encode())
        subset += 1
    folder, form, few = Path(task["folder"]), task["form"], START_DOCUMENTS * task["workers"]
    return {
        "repeated": repeated,
        "shards": written(folder, "shard", form, documents, task["shards"]),
        "subset": written(folder, "subset", form, documents[:subset], SUBSET_FILES),
        "plain": written(folder, "plain", "jsonl", documents[:subset], SUBSET_FILES),
        "one_file": written(folder, "whole", "jsonl", [d for n in range(SUBSET_FILES) for d in documents[:subset][n::SUBSET_FILES]], 1),
        "tiny": written(folder, "tiny", form, documents[:few], task["workers"]),
        "tiny_plain": written(folder, "tiny-plain", "jsonl", documents[:few], task["workers"]),
        "tiny_one_file": written(folder, "tiny-whole", "jsonl", documents[:few], 1),
    }


def derive(task: Json) -> Json:
    """More text than there is: documents of as many sentences as the real ones have, drawn from all of them without return."""
    sentences: list[str] = []
    counts: list[int] = []
    for document in (document for path in task["files"] for document in documents_of(path)):
        own = document["text"].replace("\n", "\n\0").replace(". ", ". \0").split("\0")
        sentences += own
        counts.append(len(own))
    source, taken, number, paths, documents = random.Random(1), 0, 0, [], 0
    while taken < task["text_bytes"]:
        source.shuffle(sentences)
        source.shuffle(counts)
        texts, start = [], 0
        for count in counts:
            texts.append("".join(sentences[start : start + count]))
            start += count
        for first in range(0, len(texts), max(1, len(texts) // len(task["files"]))):
            part = [text for text in texts[first : first + max(1, len(texts) // len(task["files"]))] if text.strip()]
            found = written(Path(task["folder"]), f"derived-{number:03d}", task["form"], [{"text": text} for text in part], 1)
            number, taken, documents = number + 1, taken + found["text_bytes"], documents + len(part)
            paths += found["paths"]
            if taken >= task["text_bytes"]:
                break
    return {"paths": paths, "documents": documents, "text_bytes": taken, "file_bytes": sum(Path(path).stat().st_size for path in paths)}


# --- contestants, each in a process of its own ---------------------------------------------------------------------


class Clock:
    """Wall seconds, and CPU seconds of this process and of those it has waited for."""

    def __enter__(self) -> Clock:
        self.wall, self.cpu = -time.perf_counter(), -_cpu_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter()
        self.cpu += _cpu_seconds()

    def times(self) -> Json:
        """As JSON."""
        return {"wall_s": self.wall, "cpu_s": self.cpu}


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def make_tokenizer(task: Json) -> Json:
    """The tokenizer artifact that all contestants use."""
    from mates.preprocess import tokenizer

    manifest = tokenizer.make_tokenizer(
        Path(task["out"]), path=task["path"], kind="bpe", vocab_size=0, train_bytes=0, end_of_document=None, texts=[], inputs={}
    )
    return dict(manifest.info)


def ours(task: Json) -> Json:
    """``mates preprocess`` with its default settings, but for one corpus instead of three, and for the metadata asked for."""
    from mates.preprocess.corpus import CorpusSettings, SplitShares, make_corpora
    from mates.preprocess.inputs import find_inputs
    from mates.preprocess.readers import ReadOptions

    settings = CorpusSettings(
        shares=SplitShares(pool=0.0, holdout=0.0, seed=0),
        reading=ReadOptions(metadata_fields=tuple(task["fields"])),
        features=(),
    )
    with Clock() as clock:
        done = make_corpora(
            Path(task["out"]),
            inputs=find_inputs(task["files"]),
            settings=settings,
            tokenizer_dir=Path(task["tokenizer"]),
            workers=task["workers"],
        )
    corpus = done["train"]
    return clock.times() | {"tokens": corpus.info["tokens"], "engine": corpus.info["engine"]["name"], "accounted_s": corpus.cost.seconds}


_encoder: Json = {}  # of a worker process of the pool


def _start_encoder(path: str) -> None:
    import tokenizers

    _encoder["tokenizer"] = tokenizers.Tokenizer.from_file(path)
    _encoder["tokenizer"].encode_special_tokens = True  # text that spells a special token is text, as ours has it


def _encode(end_of_document: int, line: str) -> tuple[list[int], list[int], int]:
    ids = _encoder["tokenizer"].encode(json.loads(line)["text"], add_special_tokens=False).ids
    if ids:
        ids.append(end_of_document)
    return ids, [len(ids)] if ids else [], len(line)


def _lines(paths: Sequence[str]) -> Iterator[str]:
    for path in paths:
        with Path(path).open(encoding="utf-8") as lines:
            yield from lines


def pool(task: Json) -> Json:
    """The design of Megatron's tools/preprocess_data.py; it reads plain JSON lines."""
    import multiprocessing

    import numpy as np

    from mates.preprocess.indexed import IndexedWriter, token_dtype

    dtype = token_dtype(task["vocab_size"])
    prefix = Path(task["out"])
    try:
        builder_of = importlib.import_module("megatron.core.datasets.indexed_dataset").IndexedDatasetBuilder
    except ImportError:
        builder_of = None
    with Clock() as clock, multiprocessing.Pool(task["workers"], _start_encoder, (task["tokenizer_file"],)) as workers:
        encoded = workers.imap(partial(_encode, task["end_of_document"]), _lines(task["files"]), 32)
        if builder_of:
            builder = builder_of(f"{prefix}.bin", dtype=dtype.type)
            for ids, lengths, _ in encoded:
                builder.add_document(ids, lengths)
            builder.finalize(f"{prefix}.idx")
        else:
            with IndexedWriter(prefix, dtype) as writer:
                for ids, _, _ in encoded:
                    writer.write(np.array(ids, dtype), np.array([len(ids)]))
        workers.close()
        workers.join()
    return clock.times() | {"writer": "megatron-core" if builder_of else "mates"}


def datatrove(task: Json) -> Json:
    """datatrove's tokenizer step on its local executor, without the second pass that shuffles. Imports nothing of this project."""
    executors, readers, tokens = (
        importlib.import_module(f"datatrove.{name}") for name in ("executor", "pipeline.readers", "pipeline.tokens")
    )
    out = Path(task["out"])
    folder = str(Path(task["files"][0]).parent)
    listed = out / "paths.txt"
    out.mkdir()
    listed.write_text("".join(f"{Path(path).name}\n" for path in task["files"]))
    with Clock() as clock:
        executors.LocalPipelineExecutor(
            pipeline=[
                readers.JsonlReader(folder, paths_file=str(listed)),
                tokens.DocumentTokenizer(
                    str(out / "tokens"),
                    tokenizer_name_or_path=task["tokenizer_file"],
                    eos_token=task["end_of_document_text"],
                    shuffle_documents=False,
                ),
            ],
            tasks=task["workers"],
            workers=task["workers"],
            logging_dir=str(out / "logs"),
        ).run()
    count = sum(int(path.read_text().splitlines()[1]) for path in (out / "tokens").glob("*.metadata"))
    return clock.times() | {"tokens": count, "version": version("datatrove")}


def megatron(task: Json) -> Json:
    """Megatron's own tool, from a source checkout."""
    command = [sys.executable, str(Path(task["checkout"]) / "tools" / "preprocess_data.py"), "--input", task["files"][0]]
    command += ["--output-prefix", task["out"], "--tokenizer-type", "HuggingFaceTokenizer", "--append-eod"]
    command += ["--tokenizer-model", task["tokenizer"], "--workers", str(task["workers"])]
    with Clock() as clock:
        subprocess.run(command, check=True, stdout=sys.stderr)
    return clock.times()


# --- the floor -----------------------------------------------------------------------------------------------------


def decompress_floor(task: Json) -> Json:
    """Decompress all shards, in memory already."""
    clocks = []
    for path in task["files"]:
        Path(path).read_bytes()
        with Clock() as clock:
            if ending(path) != "parquet":  # there it is part of parsing
                for _ in decompressed(path):
                    pass
        clocks.append(clock)
    return _sum(clocks)


def _parsed(path: str, clocks: list[Clock]) -> Iterator[list[str]]:
    """Texts of a file block by block; clocks are of parsing alone."""
    if ending(path) == "parquet":
        import pyarrow.parquet as pq

        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            with Clock() as clock:
                texts = file.read_row_group(group, columns=["text"], use_threads=False).column("text").to_pylist()
            clocks.append(clock)
            yield texts
        return
    import msgspec

    decoder = msgspec.json.Decoder(msgspec.defstruct("Line", [("text", str)]))
    for block in line_blocks(decompressed(path)):
        with Clock() as clock:
            texts = [line.text for line in decoder.decode_lines(block)]  # type: ignore[attr-defined]
        clocks.append(clock)
        yield texts


def parse_floor(task: Json) -> Json:
    """Parse what is decompressed already."""
    clocks: list[Clock] = []
    for path in task["files"]:
        for _ in _parsed(path, clocks):
            pass
    return _sum(clocks)


def tokenize_floor(task: Json) -> Json:
    """Tokenize texts that are parsed already, with an engine that has seen nothing."""
    os.environ |= {"FASTOKENS_BPE_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    fastokens: Any = importlib.import_module("fastokens")
    tokenizer = fastokens.Tokenizer.from_json_str(Path(task["tokenizer_file"]).read_text())
    clocks, tokens = [], 0
    for path in task["files"]:
        for texts in _parsed(path, []):
            with Clock() as clock:
                ids, _ = tokenizer.encode_batch_flat(texts, add_special_tokens=False, split_special_tokens=True)
            clocks.append(clock)
            tokens += memoryview(ids).nbytes // 4
    return _sum(clocks) | {"tokens": tokens}


def write_floor(task: Json) -> Json:
    """Write the bytes of all tokens: a write for each block of text, one fsync."""
    blocks = max(1, task["text_bytes"] // BLOCK_BYTES)
    piece = os.urandom(max(1, task["token_bytes"] // blocks))
    with Clock() as clock, Path(task["out"]).open("wb", buffering=0) as handle:
        for _ in range(blocks):
            handle.write(piece)
        os.fsync(handle.fileno())
    return clock.times()


def beside(task: Json) -> Json:
    """Ours and the parts of the floor in turns of a second or two on the same shards, added up.

    A machine's speed drifts within minutes; what is compared is to run under the same conditions.
    """
    os.environ |= {"FASTOKENS_BPE_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    out = task["out"]
    contestants: dict[str, Callable[[list[str]], Json]] = {
        "ours start": lambda files: ours(task | {"files": task["tiny"], "fields": ()}),
        "ours": lambda files: ours(task | {"files": files, "fields": ()}),
        "ours with metadata": lambda files: ours(task | {"files": files, "fields": FIELDS}),
        **{part: partial(_part_of_floor, part, task | {"out": f"{out}.bin"}) for part in FLOOR},
    }
    ours(task | {"files": task["tiny"], "fields": ()})  # imports
    runs: dict[str, list[Json]] = {name: [] for name in contestants}
    for group in range(task["groups"]):
        order = list(contestants)
        if (task["turn"] + group) % 2:
            order.reverse()
        for name in order:
            shutil.rmtree(out, ignore_errors=True)
            runs[name].append(contestants[name](task["files"][group :: task["groups"]]))
    return {"runs": {name: {clock: math.fsum(run[clock] for run in each) for clock in ("wall_s", "cpu_s")} for name, each in runs.items()}}


def _part_of_floor(part: str, task: Json, files: list[str]) -> Json:
    share = len(files) / len(task["files"])
    sizes = {name: int(task[name] * share) for name in ("text_bytes", "token_bytes")}
    return dict(TASKS[part](task | {"files": files} | sizes))


def _sum(clocks: Sequence[Clock]) -> Json:
    return {"wall_s": math.fsum(clock.wall for clock in clocks), "cpu_s": math.fsum(clock.cpu for clock in clocks)}


TASKS = {
    "prepare": prepare,
    "derive": derive,
    "make_tokenizer": make_tokenizer,
    "ours": ours,
    "pool": pool,
    "datatrove": datatrove,
    "megatron": megatron,
    "decompress": decompress_floor,
    "parse": parse_floor,
    "tokenize": tokenize_floor,
    "write": write_floor,
    "beside": beside,
}


def child(text: str) -> int:
    """A process of the benchmark: do one task and print what it found."""
    task = json.loads(text)
    if task["cores"]:
        os.sched_setaffinity(0, task["cores"])
    print(json.dumps(TASKS[task["task"]](task)))
    return 0


# --- running contestants -------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Peak:
    """Largest resident set of each process below one, MiB by process id."""

    mib: dict[int, float] = field(default_factory=dict)

    def watch(self, root: int, done: threading.Event) -> None:
        """Read VmHWM of all of them until ``done``."""
        while not done.wait(0.02):
            todo = [root]
            while todo:
                todo += self._look(todo.pop())

    def _look(self, process: int) -> list[int]:
        try:
            status = Path(f"/proc/{process}/status").read_text()
            found = [int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")]
            self.mib[process] = max([self.mib.get(process, 0.0), *found])
            return [int(item) for item in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
        except OSError:  # it ended meanwhile
            return []


def run_child(task: Json, *, cores: int = 0, first: int = 0, python: str = sys.executable, peak: Peak | None = None) -> Json:
    """Run a task in a fresh process on ``cores`` cores from the ``first`` on (0: on all), and time the process.

    Raises:
        ContestantError: it failed.
    """
    chosen = sorted(os.sched_getaffinity(0))[first : first + cores]
    command = [python, str(Path(__file__).resolve()), "--child", json.dumps(task | {"cores": chosen})]
    done = threading.Event()
    start = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
        watcher = threading.Thread(target=(peak or Peak()).watch, args=(process.pid, done))
        if peak:
            watcher.start()
        out, _ = process.communicate()
        seconds = time.perf_counter() - start
        done.set()
        if peak:
            watcher.join()
        if process.returncode:
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().splitlines()[-12:]
            raise ContestantError(f"{task['task']} ended with {process.returncode}:\n  " + "\n  ".join(last))
    return dict(json.loads(out.splitlines()[-1])) | {"process_s": seconds}


@dataclass(kw_only=True)
class Bench:
    """All that the measurements share."""

    folder: Path
    options: argparse.Namespace
    prepared: Json
    tokenizer: Json
    digests: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    token_bytes: int = 0

    def task(self, name: str, files: str, workers: int = 1) -> Json:
        """What a process is told."""
        folder = self.folder / "tokenizer"
        return {
            "task": name,
            "files": self.prepared[files]["paths"],
            "text_bytes": self.prepared[files]["text_bytes"],
            "workers": workers,
            "out": str(self.folder / "out"),
            "tokenizer": str(folder),
            "tokenizer_file": str(folder / self.tokenizer["file"]),
            "vocab_size": self.tokenizer["vocab_size"],
            "end_of_document": self.tokenizer["end_of_document"],
            "end_of_document_text": self.tokenizer["end_of_document_text"],
            "token_bytes": self.token_bytes,
            "checkout": str(self.options.megatron),
        }

    def clear(self) -> None:
        """Remove what the last process wrote, and let the disk settle."""
        for path in self.folder.glob("out*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        os.sync()

    def ours(self, files: str, workers: int, peak: Peak | None = None, fields: Sequence[str] = ()) -> Json:
        """Our run; its bytes must be those of the first run on these files."""
        self.clear()
        found = run_child(self.task("ours", files, workers) | {"fields": fields}, cores=workers, peak=peak)
        digest = digest_of(self.folder / "out" / "train" / "tokens")
        if self.digests.setdefault(files, digest) != digest:
            raise GateError(f"ours with {workers} workers on {files}: other bytes than in the first run")
        return found

    def peer(self, name: str, files: str, workers: int) -> Json:
        """A peer's run on the subset, plain."""
        self.clear()
        prefix = "tiny_" if files == "tiny" else ""
        names = {"pool": f"{prefix}plain", "datatrove": f"{prefix}plain", "megatron": f"{prefix}one_file"}
        python = str(self.options.datatrove_python or sys.executable) if name == "datatrove" else sys.executable
        found = run_child(self.task(name, names[name], workers), cores=workers, python=python)
        if name == "pool" and files != "tiny":
            digest = digest_of(self.folder / "out")
            if digest != self.digests.get("subset", digest):
                raise GateError("subset: the bytes of ours are not those of the pool of the reference library")
        return found


def digest_of(prefix: Path) -> str:
    """SHA-256 of .bin and .idx."""
    digest = hashlib.sha256()
    for suffix in (".bin", ".idx"):
        with prefix.with_name(prefix.name + suffix).open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


# --- measurement ---------------------------------------------------------------------------------------------------


def gate(bench: Bench) -> Json:
    """Check that all contestants do the same work. It also warms up the file cache.

    Raises:
        GateError: they do not.
    """
    workers = bench.options.workers
    for number in workers:
        bench.ours("subset", number)
    bench.peer("pool", "subset", max(workers))
    for number in workers:
        found = bench.ours("shards", number)
    documents = bench.prepared["shards"]["documents"]
    bench.tokens = found["tokens"]
    bench.token_bytes = (bench.folder / "out" / "train" / "tokens.bin").stat().st_size
    floor = run_child(bench.task("tokenize", "shards"), cores=1)
    if found["engine"] == "fastokens" and floor["tokens"] + documents != bench.tokens:
        raise GateError(f"ours made {bench.tokens} tokens, the floor {floor['tokens']} and {documents} ends of documents")
    return {"digests": bench.digests, "tokens": bench.tokens, "engine": found["engine"], "workers": workers}


def turns(bench: Bench, workers: int, peers: Sequence[str]) -> dict[str, list[Json]]:
    """All contestants in turn, ``repeats`` times."""
    found: dict[str, list[Json]] = {}

    def note(name: str, run: Json) -> None:
        found.setdefault(name, []).append(run)

    for turn in range(bench.options.repeats):
        print(f"{workers} workers, turn {turn + 1} of {bench.options.repeats}", file=sys.stderr)
        note("ours start", bench.ours("tiny", workers))
        note("ours", bench.ours("shards", workers))
        note("ours subset", bench.ours("subset", workers))
        for peer in peers:
            note(f"{peer} start", bench.peer(peer, "tiny", workers))
            note(peer, bench.peer(peer, "subset", workers))
    return found


def floor_turns(bench: Bench) -> dict[str, list[Json]]:
    """Ours with one worker, and the parts of the floor, a few shards at a time: ``floor_repeats`` turns over all shards."""
    found: dict[str, list[Json]] = {}
    task = bench.task("beside", "shards") | {"tiny": bench.prepared["tiny"]["paths"], "groups": bench.options.floor_groups}
    for turn in range(bench.options.floor_repeats):
        print(f"floor, turn {turn + 1} of {bench.options.floor_repeats}", file=sys.stderr)
        bench.clear()
        for name, run in run_child(task | {"turn": turn}, cores=1)["runs"].items():
            found.setdefault(name, []).append(run)
    return found


def scaling_turns(bench: Bench) -> dict[str, list[Json]]:
    """Ours with one worker and with all, and the floor's tokenizing in one process and in as many: ``repeats`` turns."""
    found: dict[str, list[Json]] = {}
    many = max(bench.options.workers)
    if many == 1:
        return found

    def note(name: str, run: Json) -> None:
        found.setdefault(name, []).append(run)

    for turn in range(bench.options.repeats):
        print(f"all workers, turn {turn + 1} of {bench.options.repeats}", file=sys.stderr)
        note("ours start", bench.ours("tiny", 1))
        note("ours", bench.ours("shards", 1))
        note(f"{ALL_WORKERS} start", bench.ours("tiny", many))
        note(ALL_WORKERS, bench.ours("shards", many))
        bench.clear()
        note("tokenize", run_child(bench.task("tokenize", "shards"), cores=1))
        note(AT_ONCE, at_once(bench, many))
    return found


def at_once(bench: Bench, processes: int) -> Json:
    """The floor's tokenizing of all shards, dealt to so many processes that know nothing of each other, each on a core of its own."""
    task = bench.task("tokenize", "shards")
    with ThreadPoolExecutor(processes) as threads:
        runs = threads.map(
            lambda number: run_child(task | {"files": task["files"][number::processes]}, cores=1, first=number), range(processes)
        )
        return {"wall_s": max(run["wall_s"] for run in runs)}


def steady(runs: dict[str, list[Json]], name: str, clock: str) -> list[float]:
    """Seconds of each turn's run less the median of the same contestant's on a few documents a worker.

    nan where that leaves no more than the starts differ among themselves: then there was too little text to tell.
    """
    starts = [run[clock] for run in runs[f"{name.removesuffix(' with metadata')} start"]]
    least = max(0.0, max(starts) - min(starts))
    rest = [run[clock] - statistics.median(starts) for run in runs[name]]
    return [seconds if seconds > least else math.nan for seconds in rest]


def spread(values: Sequence[float]) -> Json | None:
    """Median and range; None where a value is not known."""
    if any(map(math.isnan, values)):
        return None
    return measuring.spread(values)


def rates(bench: Bench, runs: dict[str, list[Json]], name: str) -> Json:
    """MB of text a second, steady and of the whole process, and the process' seconds on a few documents a worker."""
    text = bench.prepared["shards" if name == "ours" else "subset"]["text_bytes"] / 1e6
    found: Json = {"process_mb_s": spread([text / run["process_s"] for run in runs[name]]), "runs": runs[name]}
    if f"{name} start" in runs:
        found["start_s"] = spread([run["process_s"] for run in runs[f"{name} start"]])
        found["starts"] = runs[f"{name} start"]
        found["steady_mb_s"] = spread([text / seconds for seconds in steady(runs, name, "wall_s")])
    if name == "ours":  # its manifest's account: the time spent on parts, start-up left out, divided by the workers
        found["accounted_mb_s"] = spread([text / run["accounted_s"] for run in runs[name]])
    return found


def compare(bench: Bench, runs: dict[str, list[Json]], peers: Sequence[str]) -> Json:
    """Rates, and ratios of ours to each peer turn by turn."""
    shards, subset = (bench.prepared[name]["text_bytes"] for name in ("shards", "subset"))
    names = ["ours", "ours subset", *peers]
    found: Json = {"rates": {name: rates(bench, runs, name) for name in names}, "ours_over": dict.fromkeys(PEERS)}
    for peer in peers:
        pairs = zip(steady(runs, peer, "wall_s"), steady(runs, "ours", "wall_s"), strict=True)
        same_text = zip(runs[peer], runs["ours subset"], strict=True)
        found["ours_over"][peer] = {
            "steady": spread([theirs / mine * shards / subset for theirs, mine in pairs]),
            "process": spread([theirs["process_s"] / mine["process_s"] for theirs, mine in same_text]),
        }
    return found


def floor_share(bench: Bench, runs: dict[str, list[Json]]) -> Json:
    """Seconds of each part for a GB of text, and which share of ours the floor makes up, turn by turn."""
    gigabytes = bench.prepared["shards"]["text_bytes"] / 1e9
    found: Json = {"runs": runs}
    for clock in ("cpu_s", "wall_s"):
        parts = {part: [run[clock] / gigabytes for run in runs[part]] for part in FLOOR}
        floor = [sum(turn) for turn in zip(*parts.values(), strict=True)]
        mine = [seconds / gigabytes for seconds in steady(runs, "ours", clock)]
        more = [seconds / gigabytes for seconds in steady(runs, "ours with metadata", clock)]
        named = parts | {"floor": floor, "ours": mine, "ours with metadata": more}
        found[f"{clock}_per_gb"] = {name: spread(values) for name, values in named.items()}
        found[clock.replace("_s", "_share")] = spread([least / own for least, own in zip(floor, mine, strict=True)])
    return found


def scaling(runs: dict[str, list[Json]]) -> Json:
    """What all workers gain over one, and separate processes over one process, turn by turn."""
    if not runs:
        return {}
    pairs = zip(*(steady(runs, name, "wall_s") for name in ("ours", ALL_WORKERS)), strict=True)
    gain = spread([one / all_workers for one, all_workers in pairs])
    pairs = zip(*([run["wall_s"] for run in runs[name]] for name in ("tokenize", AT_ONCE)), strict=True)
    return {"gain": gain, "cores_gain": spread([one / together for one, together in pairs]), "runs": runs}


def memory(bench: Bench) -> Json:
    """Largest resident set of each process while it works on ``memory_mb`` of text."""
    shards, wanted = bench.prepared["shards"], bench.options.memory_mb * 10**6
    derived: Json = {"paths": [], "documents": 0, "text_bytes": 0}
    if shards["text_bytes"] < wanted:
        task = bench.task("derive", "shards") | {"folder": str(bench.folder), "form": bench.options.format}
        derived = run_child(task | {"text_bytes": wanted - shards["text_bytes"]})
    bench.prepared["memory"] = {
        "paths": shards["paths"] + derived["paths"],
        "text_bytes": shards["text_bytes"] + derived["text_bytes"],
    }
    found = {}
    for workers in bench.options.workers:
        peak = Peak()
        bench.ours("memory", workers, peak, FIELDS)
        found[str(workers)] = sorted((round(value, 1) for value in peak.mib.values()), reverse=True)
    return {
        "text_bytes": bench.prepared["memory"]["text_bytes"],
        "derived_text_bytes": derived["text_bytes"],
        "mib_of_each_process": found,
        "mib": max(values[0] for values in found.values()),
    }


# --- claims and results --------------------------------------------------------------------------------------------


def claims(by_workers: dict[str, Json], floor: Json, scaled: Json, used: Json) -> list[Json]:
    """Each claim with its figure and whether it holds; None where it was not measured."""

    def claim(text: str, values: Sequence[float | None], limit: float, *, at_most: bool = False) -> Json:
        known = [value for value in values if value is not None]
        worst = (max(known) if at_most else min(known)) if known else None
        holds = None if worst is None else (worst <= limit if at_most else worst >= limit)
        return {"claim": text, "found": worst, "limit": limit, "holds": holds}

    def median(value: Json | None) -> float | None:
        return None if value is None else value["median"]

    def over(peer: str) -> list[float | None]:
        return [median((found["ours_over"][peer] or {"steady": None})["steady"]) for found in by_workers.values()]

    many = max(map(int, by_workers))
    ideal = min(float(many), median(scaled.get("cores_gain")) or float(many))
    return [
        claim("times the speed of the pool of Hugging Face tokenizers, the design of Megatron's default tool", over("pool"), 40),
        claim("times the speed of Megatron's own tool", over("megatron"), 40),
        claim("times the speed of datatrove's tokenizer step", over("datatrove"), 10),
        claim("of the floor's speed, by CPU time, one worker", [median(floor["cpu_share"])], 0.85),
        claim("of the floor's speed, by wall time, one worker", [median(floor["wall_share"])], 0.85),
        claim("MiB in the largest process", [used["mib"]], 400, at_most=True),
        claim(f"times the speed with {many} workers of that with one", [median(scaled.get("gain"))], NEARLY_LINEAR * ideal),
    ]


def report_lines(found: Json) -> Iterator[str]:
    """The tables for a terminal."""
    corpus, subset, used = found["corpus"], found["subset"], found["memory"]
    yield f"{corpus['documents']:,} documents, {corpus['text_bytes'] / 1e6:.1f} MB of text in {corpus['files']} .{corpus['format']} files"
    yield f"peers read the first {subset['documents']:,} of them, {subset['text_bytes'] / 1e6:.1f} MB, as plain JSON lines"
    columns = ["MB/s steady (range)".ljust(25), "MB/s process".ljust(20), "start-up s".ljust(20), "ours over it: steady; process"]
    yield "  ".join(["workers", "contestant".ljust(13), *columns])
    for workers, part in found["by_workers"].items():
        for name, rate in part["rates"].items():
            ratio = part["ours_over"].get(name)
            text = f"{_shown(ratio['steady'], 1)}; {_shown(ratio['process'], 1)}" if ratio else ""
            columns = [workers.rjust(7), name.ljust(13), _shown(rate.get("steady_mb_s"), 1).ljust(25)]
            columns += [_shown(rate["process_mb_s"], 1).ljust(20), _shown(rate.get("start_s"), 2).ljust(20), text]
            yield "  ".join(columns).rstrip()
        yield f"{workers:>7}  ours by its own account, MB/s: {_shown(part['rates']['ours']['accounted_mb_s'], 1)}"
        for name in (name for name in PEERS if name not in part["rates"]):
            yield f"{workers:>7}  {name}: not measured"
    if found["scaling"]:
        gain, cores = (_shown(found["scaling"][name], 2) for name in ("gain", "cores_gain"))
        yield f"all workers over one: {gain}; separate processes on the same cores: {cores}"
    for clock in ("cpu", "wall"):
        each = ", ".join(f"{name} {_shown(value, 2)}" for name, value in found["floor"][f"{clock}_s_per_gb"].items())
        yield f"one worker, {clock} seconds a GB of text: {each}; floor over ours {_shown(found['floor'][f'{clock}_share'], 3)}"
    more = f", {used['derived_text_bytes'] / 1e6:.0f} MB of it derived by shuffling sentences" if used["derived_text_bytes"] else ""
    yield f"MiB of each process over {used['text_bytes'] / 1e6:.0f} MB of text{more}: {used['mib_of_each_process']}"
    for claim in found["claims"]:
        verdict = {True: "holds", False: "does not hold", None: "not measured"}[claim["holds"]]
        value = "-" if claim["found"] is None else f"{claim['found']:.3g}"
        yield f"{verdict.ljust(14)} {value.rjust(6)} {claim['claim']} (claimed: {claim['limit']:.3g})"


def _shown(value: Json | None, digits: int) -> str:
    if value is None:
        return "not known"
    low, high = value["range"]
    return f"{value['median']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def measure(bench: Bench) -> Json:
    """Everything, as JSON."""
    options, prepared = bench.options, bench.prepared
    peers = available_peers(options)
    checked = gate(bench)
    by_workers = {str(number): compare(bench, turns(bench, number, peers), peers) for number in options.workers}
    floor = floor_share(bench, floor_turns(bench))
    scaled = scaling(scaling_turns(bench))
    used = memory(bench)
    found = surroundings() | {
        "claim": CLAIM,
        "packages": {name: _version(name) for name in PACKAGES},
        "settings": {
            name: value
            for name, value in vars(options).items()
            if name in ("repeats", "floor_repeats", "floor_groups", "subset_mb", "text_mb", "memory_mb")
        },
        "corpus": _contents(prepared["shards"]) | {"format": options.format, "repeated_dropped": prepared["repeated"]},
        "subset": _contents(prepared["subset"]),
        "inputs": [Path(path).name for path in options.inputs],
        "gate": checked,
        "by_workers": by_workers,
        "floor": floor,
        "scaling": scaled,
        "memory": used,
        "claims": claims(by_workers, floor, scaled, used),
    }
    return dict(without_paths(found))


def _contents(files: Json) -> Json:
    return {name: value for name, value in files.items() if name != "paths"} | {"files": len(files["paths"])}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def available_peers(options: argparse.Namespace) -> list[str]:
    """The peers that can run here; what is missing is said."""
    peers = ["pool"]
    python = str(options.datatrove_python or sys.executable)
    if subprocess.run([python, "-c", "import datatrove.pipeline.tokens"], capture_output=True).returncode == 0:
        peers.append("datatrove")
    else:
        print(f"tokenize_corpus: datatrove is left out: {python} cannot import it (see --datatrove_python)", file=sys.stderr)
    if options.megatron:
        peers.append("megatron")
    else:
        print("tokenize_corpus: Megatron's own tool is left out (see --megatron)", file=sys.stderr)
    return peers


# --- command line --------------------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; SystemExit 2 for bad ones."""
    parser = argparse.ArgumentParser(description=CLAIM, allow_abbrev=False)
    add = parser.add_argument
    add("--inputs", nargs="+", help="files of documents; by default all web text of the shared data folder beside the checkout")
    add("--tokenizer", help="tokenizer file or folder; by default GPT-NeoX's of the shared data folder")
    add("--text_mb", type=float, help="take documents in order up to this much text (default all)")
    add("--format", choices=FORMATS, default=FORMATS[0], help="format of the shards")
    add("--shards", type=int, default=8, help="number of shards")
    add("--workers", default="1,2", help="numbers of workers, parted by commas")
    add("--repeats", type=int, default=5, help="turns of all contestants")
    add("--floor_repeats", type=int, default=9, help="turns of ours and the floor")
    add("--floor_groups", type=int, default=4, help="shares of the shards that ours and the floor take turns on")
    add("--subset_mb", type=float, default=20, help="text for the peers")
    add("--memory_mb", type=float, default=1000, help="text for the memory figure; derived where there is less")
    add("--datatrove_python", type=Path, help="Python interpreter that has datatrove, where this one does not")
    add("--megatron", type=Path, help="a source checkout of Megatron-LM, to measure its tools/preprocess_data.py as well")
    add("--work", type=Path, help="folder to work in, on the disk to be measured (default a temporary one)")
    add("--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / "tokenize.json", help="where the JSON goes")
    options = parser.parse_args(arguments)
    options.inputs = options.inputs or sorted(map(str, (SHARED_DATA / "web").glob("*.jsonl.zst")))
    options.tokenizer = options.tokenizer or str(SHARED_DATA / "tokenizers" / "gpt-neox")
    options.workers = sorted({int(number) for number in options.workers.split(",")})
    missing = [path for path in [*options.inputs, options.tokenizer] if not Path(path).exists()]
    if missing or not options.inputs:
        parser.error(f"no such file: {missing[0] if missing else 'shared web text'}; give --inputs and --tokenizer")
    if options.workers[0] < 1 or options.workers[-1] > len(os.sched_getaffinity(0)):
        parser.error(f"--workers: found {options.workers}, expected 1 to {len(os.sched_getaffinity(0))}, the cores of this process")
    if min(options.repeats, options.floor_repeats, options.floor_groups) < 1:
        parser.error("--repeats, --floor_repeats and --floor_groups are at least 1")
    if options.shards < max(options.workers[-1], options.floor_groups):
        parser.error(f"--shards: found {options.shards}, expected at least --floor_groups and the largest number of workers")
    return options


def prepared_bench(options: argparse.Namespace, folder: Path) -> Bench:
    """Write the input files and the tokenizer artifact."""
    task = {
        "task": "prepare",
        "inputs": options.inputs,
        "folder": str(folder),
        "form": options.format,
        "shards": options.shards,
        "text_bytes": None if options.text_mb is None else int(options.text_mb * 1e6),
        "subset_bytes": int(options.subset_mb * 1e6),
        "workers": max(options.workers),
    }
    prepared = run_child(task)
    tokenizer = run_child({"task": "make_tokenizer", "path": str(options.tokenizer), "out": str(folder / "tokenizer")})
    return Bench(folder=folder, options=options, prepared=prepared, tokenizer=tokenizer)


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 1 the gate is closed or a contestant failed, 2 bad options."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["--child"]:
        return child(given[1])
    options = parse(given)
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tokenize-", dir=options.work) as folder:
        try:
            found = measure(prepared_bench(options, Path(folder)))
        except GateError as error:
            print(f"tokenize_corpus: gate: {error}; nothing was written", file=sys.stderr)
            return 1
        except ContestantError as error:
            print(f"tokenize_corpus: {error}", file=sys.stderr)
            return 1
    from mates.preprocess.artifact import write_json

    write_json(options.out, found)
    print("\n".join(report_lines(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

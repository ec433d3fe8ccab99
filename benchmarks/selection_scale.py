"""Claim: a fifth of a billion candidates is chosen exactly, by Gumbel-top-k, in at most 2 GiB beside the mapped scores.

    python benchmarks/selection_scale.py [--candidates 1000000 10000000 100000000 1000000000] [--results DIR]

Each number of candidates is chosen from in a process of its own, with scores in one memory-mapped float32 file (drawn at random), sample
ids from a keyed permutation twice as long, and the index written to disk. Gate: at every number up to ``--brute`` the chosen ids are those
of the plain way, numpy's sort of all keys in memory, which is the peer that is timed beside it. Memory is the largest anonymous resident
size, so pages of mapped files are left out.

Writes ``selection_scale.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from measuring import GateError
from surroundings import REPOSITORY, surroundings

from mates.engine.data.blocks import Blocks
from mates.engine.data.index import INDEX_FILE, write_ids
from mates.engine.select.choose import PIECE, find_cut, gumbel_keys
from mates.preprocess.artifact import write_json

CLAIM = "A fifth of a billion candidates is chosen exactly in at most 2 GiB beside the mapped scores."
RATIO, TEMPERATURE, SEED, STAGE = 0.2, 0.5, 0, 1
Json = dict[str, Any]


class PeakMemory:
    """The largest anonymous resident size of this process while ``with PeakMemory() as peak:`` lasts, in bytes."""

    def __enter__(self) -> PeakMemory:
        self.bytes, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            (found,) = [line for line in lines if line.startswith("RssAnon:")]
            self.bytes = max(self.bytes, int(found.split()[1]) * 1024)

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def draw_scores(path: Path, n: int) -> None:
    """A file of n normal float32 scores."""
    with path.open("wb") as handle:
        np.lib.format.write_array_header_1_0(handle, {"descr": "<f4", "fortran_order": False, "shape": (n,)})
        source = np.random.default_rng(n)
        for start in range(0, n, PIECE):
            handle.write(source.standard_normal(min(PIECE, n - start), np.float32).data)


def choose(folder: Path, n: int) -> Json:
    """Ours: seconds and memory of choosing and writing the index."""
    blocks, scores = Blocks(2 * n, (0, n), SEED), np.load(folder / "scores.npy", mmap_mode="r")
    k, passes = int(n * RATIO), 0

    def piece(start: int, stop: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        nonlocal passes
        passes += start == 0
        ids = blocks.candidates(0, start, stop)
        return gumbel_keys(np.asarray(scores[start:stop]), ids, temperature=TEMPERATURE, seed=SEED, stage=STAGE), ids

    def chosen() -> Iterator[npt.NDArray[np.int64]]:
        for start in range(0, n, PIECE):
            keys, ids = piece(start, min(start + PIECE, n))
            yield ids[cut.chosen(keys, ids)]

    piece(0, 1 << 16)  # compiles
    passes = 0
    with PeakMemory() as peak:
        started = time.perf_counter()
        cut = find_cut(piece, n, k)
        write_ids(folder, chosen(), k)
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_bytes": peak.bytes, "passes": passes}


def sort(folder: Path, n: int) -> Json:
    """The plain way: all ids, keys and their order in memory."""
    scores, k = np.load(folder / "scores.npy", mmap_mode="r"), int(n * RATIO)
    Blocks(2 * n, (0, n), SEED).candidates(0, 0, 1 << 16)  # compiles
    with PeakMemory() as peak:
        started = time.perf_counter()
        ids = Blocks(2 * n, (0, n), SEED).candidates(0)
        keys = gumbel_keys(np.asarray(scores), ids, temperature=TEMPERATURE, seed=SEED, stage=STAGE)
        order = np.lexsort((ids, -keys))[:k]
        np.save(folder / "sorted.npy", ids[np.sort(order)])
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_bytes": peak.bytes}


def in_child(what: str, folder: Path, n: int) -> Json:
    """One contestant in a process of its own."""
    command = [sys.executable, "-P", __file__, "--child", what, str(folder), str(n)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{what} of {n:,}: {done.stderr[-2000:]}")
    found: Json = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(candidates: list[int], brute: int, scratch: Path | None) -> Json:
    """All numbers of candidates."""
    rows: Json = {}
    for n in candidates:
        with tempfile.TemporaryDirectory(dir=scratch) as name:
            folder = Path(name)
            draw_scores(folder / "scores.npy", n)
            row = in_child("choose", folder, n)
            row["candidates_per_s"] = n / row["seconds"]
            if n <= brute:
                row["sorting"] = in_child("sort", folder, n)
                if (folder / INDEX_FILE).read_bytes() != (folder / "sorted.npy").read_bytes():
                    raise GateError(f"{n:,} candidates: other ids are chosen than by sorting")
            rows[str(n)] = row
            print(line_of(n, row), flush=True)
    settings = {"ratio": RATIO, "temperature": TEMPERATURE, "brute": brute}
    return {"claim": CLAIM, "settings": settings, "candidates": rows, **surroundings()}


def line_of(n: int, row: Json) -> str:
    """A row for a terminal."""
    text = f"{n:>13,} candidates: {row['seconds']:8.1f} s, {row['peak_bytes'] / 2**20:7.0f} MiB, {row['passes']} passes"
    if "sorting" in row:
        peer = row["sorting"]
        text += f"; sorting {peer['seconds']:8.1f} s, {peer['peak_bytes'] / 2**20:7.0f} MiB; the same ids"
    return text


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["--child"]:
        what, folder, n = given[1:]
        print(json.dumps({"choose": choose, "sort": sort}[what](Path(folder), int(n))))
        return 0
    parser = argparse.ArgumentParser(description=CLAIM, allow_abbrev=False)
    parser.add_argument("--candidates", type=int, nargs="+", default=[10**6, 10**7, 10**8, 10**9], help="how many there are")
    parser.add_argument("--brute", type=int, default=10**7, help="up to so many are also sorted")
    parser.add_argument("--scratch", type=Path, help="where the files are made (4 bytes a candidate, and 8 a chosen one)")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results", help="where the JSON goes")
    options = parser.parse_args(given)
    write_json(options.results / "selection_scale.json", measure(options.candidates, options.brute, options.scratch))
    return 0


if __name__ == "__main__":
    sys.exit(main())

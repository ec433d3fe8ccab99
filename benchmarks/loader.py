"""Claim: batches come from the memory map several times faster than from megatron-core's GPTDataset, and at once after the start.

    python benchmarks/loader.py [--tokens 64000000] [--length 1024] [--batch 64] [--repeats 5]

The same ``.bin/.idx`` pair (random tokens, documents of some 700 tokens) is read by both, in random order and in the order of the file:
ours by a selection index through ``mates.engine.data.loader.Batches``, theirs by ``GPTDataset`` (attention mask off) through torch's
``DataLoader``. A batch counts when its tokens and labels are int64 tensors on the CPU. With N workers theirs has N processes and ours N
threads; without workers both read when they are asked. Gate: in the order of the file both give the same tokens and labels. Start-up is
from opening the files to the first batch: ours with an index of ``--index_samples`` samples (a sparse file), theirs for the corpus' own
epoch, with its index files made before.

Contestants take turns; ratios are of the same turn, their medians and ranges are given. Writes ``loader.json`` into ``--results``.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from measuring import spread
from surroundings import REPOSITORY, surroundings, without_paths

from mates.engine.data.corpus import open_corpus
from mates.engine.data.loader import Batches
from mates.preprocess import artifact
from mates.preprocess.artifact import Cost
from mates.preprocess.indexed import IndexedWriter

CLAIM = "Batches come from the memory map several times faster than from megatron-core's GPTDataset, and at once after the start."
ORDERS = ("random", "file")
Json = dict[str, Any]
Pair = tuple[torch.Tensor, torch.Tensor]


def write_corpus(directory: Path, tokens: int) -> None:
    """A corpus of random tokens."""
    source = np.random.default_rng(0)
    with IndexedWriter(directory / "tokens", np.dtype(np.uint16)) as writer:
        while tokens > 0:
            lengths = np.clip(source.lognormal(6, 1, 1_000), 8, 20_000).astype(np.int64)
            writer.write(source.integers(0, 50_000, lengths.sum()), lengths)
            tokens -= int(lengths.sum())
    artifact.commit(directory, kind="corpus", settings={}, inputs={}, info={}, cost=Cost())


# --- ours ----------------------------------------------------------------------------------------------------------


def ours(directory: Path, options: argparse.Namespace, ids: Path, workers: int, first: int = 0) -> Iterator[Pair]:
    """Batches of the samples that an index file names."""
    corpus = open_corpus(directory, options.length)
    with Batches(corpus, np.load(ids, mmap_mode="r"), options.batch, threads=workers, first=first) as batches:
        for windows in batches:
            whole = torch.from_numpy(windows).long()
            yield whole[:, :-1], whole[:, 1:]


# --- theirs --------------------------------------------------------------------------------------------------------


def theirs(directory: Path, options: argparse.Namespace, order: str, workers: int) -> Iterator[Pair]:
    """Batches of one epoch of GPTDataset, which shuffles by itself; for the order of the file its shuffling is taken out."""
    dataset = gpt_dataset(directory, options, order)
    loader = torch.utils.data.DataLoader(dataset, batch_size=options.batch, num_workers=workers, drop_last=True)
    for batch in loader:
        yield batch["tokens"], batch["labels"]


def gpt_dataset(directory: Path, options: argparse.Namespace, order: str) -> Any:
    """The dataset; its index files are kept beside the corpus."""
    from megatron.core.datasets import gpt_dataset as module
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        vocab_size, eod, pad, unique_identifiers = 50_000, 0, -1, {"class": "none"}

    config = module.GPTDatasetConfig(
        random_seed=1,
        sequence_length=options.length,
        path_to_cache=str(directory / f"cache-{order}"),
        tokenizer=Tokenizer(),
        split="1,0,0",
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = IndexedDataset(str(directory / "tokens"), mmap=True)
    documents = np.arange(len(indexed.document_indices) - 1, dtype=np.int32)
    arguments = (indexed, str(directory / "tokens"), documents, None, Split.train, config)
    if order == "random":
        return module.GPTDataset(*arguments)
    with patch.multiple(
        module,
        _build_document_index=lambda documents, epochs, state, separate: np.tile(documents, epochs),
        _build_shuffle_index=lambda samples, size, state: np.arange(size, dtype=np.uint32),
    ):
        return module.GPTDataset(*arguments)


# --- measurement ---------------------------------------------------------------------------------------------------


def gate(directory: Path, options: argparse.Namespace, ids: Path) -> int:
    """Number of batches that were compared; SystemExit 1 where they differ."""
    compared = 0
    for mine, other in zip(ours(directory, options, ids, 0), theirs(directory, options, "file", 0), strict=False):
        if not all(torch.equal(one, two) for one, two in zip(mine, other, strict=True)):
            sys.exit(f"loader: gate: batch {compared} differs; nothing was written")
        compared += 1
    if not compared:
        sys.exit("loader: gate: no batch; nothing was written")
    return compared


def rate(make: Callable[[], Iterator[Pair]], options: argparse.Namespace) -> float:
    """Samples a second of the batches after the first one."""
    batches = make()
    next(batches)
    start, count = time.perf_counter(), 0
    for _ in batches:
        count += options.batch
    return count / (time.perf_counter() - start)


def first_batch(make: Callable[[], Iterator[Pair]]) -> float:
    """Seconds from opening to the first batch."""
    start = time.perf_counter()
    batches = make()
    next(batches)
    return time.perf_counter() - start


def measure(options: argparse.Namespace, folder: Path) -> Json:
    """Everything, as JSON."""
    directory = folder / "corpus"
    directory.mkdir()
    write_corpus(directory, options.tokens)
    samples = open_corpus(directory, options.length).samples
    files = {order: folder / f"{order}.npy" for order in ORDERS}
    np.save(files["file"], np.arange(samples))
    np.save(files["random"], np.random.default_rng(1).permutation(samples))
    compared = gate(directory, options, files["file"])
    rows: Json = {}
    for order in ORDERS:
        for workers in map(int, options.workers.split(",")):
            rates: dict[str, list[float]] = {"ours": [], "theirs": []}
            for _ in range(options.repeats):
                rates["ours"].append(rate(lambda: ours(directory, options, files[order], workers), options))  # noqa: B023 - called at once
                rates["theirs"].append(rate(lambda: theirs(directory, options, order, workers), options))  # noqa: B023
            ratios = [mine / other for mine, other in zip(rates["ours"], rates["theirs"], strict=True)]
            rows[f"{order}, {workers} workers"] = {f"{who}_samples_per_s": spread(each) for who, each in rates.items()} | {
                "ratio": spread(ratios)
            }
    large = folder / "large.npy"
    np.lib.format.open_memmap(large, mode="w+", dtype=np.int64, shape=(options.index_samples,)).flush()
    last = options.index_samples // options.batch - 1
    starts = {
        "ours": [first_batch(lambda: ours(directory, options, large, 1, last)) for _ in range(options.repeats)],
        "theirs": [first_batch(lambda: theirs(directory, options, "random", 1)) for _ in range(options.repeats)],
    }
    return surroundings() | {
        "claim": CLAIM,
        "settings": {name: value for name, value in vars(options).items() if not isinstance(value, Path)},
        "gate": {"batches_compared": compared},
        "samples": samples,
        "rates": rows,
        "start_s": {name: spread(values) for name, values in starts.items()},
    }


def lines(found: Json) -> Iterator[str]:
    """The table for a terminal."""
    yield f"{found['samples']:,} samples of {found['settings']['length']} tokens in batches of {found['settings']['batch']}"
    for name, row in found["rates"].items():
        mine, other, ratio = (row[key] for key in ("ours_samples_per_s", "theirs_samples_per_s", "ratio"))
        low, high = ratio["range"]
        both = f"ours {mine['median']:9.0f}/s  theirs {other['median']:9.0f}/s"
        yield f"{name.ljust(18)} {both}  ratio {ratio['median']:.1f} ({low:.1f} to {high:.1f})"
    for name, index in (("ours", found["settings"]["index_samples"]), ("theirs", found["samples"])):
        start = found["start_s"][name]
        yield f"first batch of {name}, an index of {index:,} samples: {1e3 * start['median']:.1f} ms"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=CLAIM, allow_abbrev=False)
    add = parser.add_argument
    add("--tokens", type=int, default=64_000_000, help="tokens of the corpus")
    add("--length", type=int, default=1024, help="tokens of a sample")
    add("--batch", type=int, default=64, help="samples of a batch")
    add("--workers", default="0,1,2", help="numbers of workers, parted by commas")
    add("--index_samples", type=int, default=10**9, help="samples of the index that ours is started with")
    add("--repeats", type=int, default=5, help="turns")
    add("--work", type=Path, help="folder to work in (default a temporary one)")
    add("--results", type=Path, default=REPOSITORY / "benchmarks" / "results", help="where the JSON goes")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    options = parse(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        import megatron.core.datasets.gpt_dataset  # noqa: F401
    except ImportError as error:
        print(f"loader: megatron-core cannot be imported ({error}); nothing was measured", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        found = measure(options, Path(folder))
    artifact.write_json(options.results / "loader.json", without_paths(found))
    print("\n".join(lines(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

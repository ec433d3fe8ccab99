"""A corpus of real English that every installation already has: the documentation of what is installed.

Docstrings, comments, READMEs, licences and some code of the Python standard library and of the installed distributions
become a C4-style corpus of mixed quality, and a reference task in the manner of LAMBADA is made from prose that is held
out. Nothing is downloaded or imported. The bytes depend on the installed files and the settings alone.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import gc
import gzip
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import re
import signal
import sys
import sysconfig
import time
import urllib.parse
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mates.preprocess.artifact import (
    ArtifactError,
    Cost,
    Json,
    Manifest,
    atomic_file,
    commit,
    find_complete,
    fingerprint_of,
)
from mates.preprocess.sample_corpus_text import (
    BOILERPLATE,
    CLASSES,
    CODE,
    MIN_DOCUMENT_CHARACTERS,
    PROSE,
    Extract,
    Passage,
    Piece,
    Source,
    extract_all,
    is_text,
    keyed_hash,
    label_of,
    pack,
    paragraphs,
    passages,
)

KIND = "sample-corpus"
REVISION = 1  # counted up when other bytes come out of the same installation
TIMESTAMP = "1970-01-01T00:00:00Z"  # files of a package have no date of their own; C4's schema wants one

MIN_TEXT_BYTES = 10_000_000
MAX_DISTRIBUTION_BYTES = 24_000_000  # of source files; more of one package would drown the others
MAX_REFERENCE_ITEMS = 1_000  # of each split
HELD_OUT_SHARE = 0.65  # of the documents that passages can be made of
NGRAM = 13

_OWN_NAME = "mates"
_SKIPPED_FOLDER = re.compile(r"tests?|testing|idle_test|benchmarks|_vendor|_bundled|__pycache__|site-packages|dist-packages", re.IGNORECASE)
_SKIPPED_FILE = re.compile(r"test_.*\.py|.*_test\.py|conftest\.py|requirements.*\.txt|.*cmakelists\.txt")
_LICENCE_FILE = re.compile(r"(licen[cs]e|copying|notice|copyright|patents|authors)[^/]*")
_BATCH = 32  # sources a worker gets at a time
_MAX_WORKERS = 16
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Document:
    """A document of the corpus: text, where it is from, and its class (one of CLASSES)."""

    text: str
    url: str
    label: str

    @property
    def source(self) -> str:
        """The url of the file, without the part of it."""
        return self.url.partition("#")[0]


@dataclass(frozen=True, slots=True)
class Item:
    """A reference item: a passage, the url of its document, and its split."""

    passage: Passage
    url: str
    split: str


Drops = collections.Counter[str]


def write_sample_corpus(
    directory: Path,
    *,
    seed: int = 0,
    shards: int = 4,
    max_text_bytes: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write the sample corpus and its reference task as an artifact, or find it complete and return its manifest.

    Files: ``shard-00000-of-00004.json.gz``… with JSON lines of ``text``, ``timestamp`` and ``url``, documents in hashed
    order; ``reference-train.jsonl`` and ``reference-test.jsonl`` with lines of ``text``, ``url`` and ``split``, where
    each text ends with the word to be predicted. The splits share no source file and no 13-gram of words, and no
    document of the shards shares a 13-gram with either.

    Args:
        directory: the artifact's folder; made if missing.
        seed: decides which code, which prose and which subset is taken, and the order.
        shards: number of shard files, at least 1.
        max_text_bytes: upper limit on the UTF-8 bytes of text in the shards. Only about as many files are read as that
            takes, so a few MB take seconds; below about 2 MB there may be no reference items. None: everything.
        progress: called with a line of text as the work goes on.

    Raises:
        ArtifactError: less than 10 MB of text was found (without ``max_text_bytes``), no document is left, or the disk
            is full.
        ArtifactMismatchError: the folder holds a sample corpus with other settings or of another environment.
        ValueError: ``shards`` or ``max_text_bytes`` is less than 1.
    """
    if shards < 1 or (max_text_bytes is not None and max_text_bytes < 1):
        raise ValueError(f"shards and max_text_bytes must be at least 1, got {shards} and {max_text_bytes}")
    started = time.perf_counter()
    say = progress or (lambda line: None)
    distributions = _distributions()
    settings = {"seed": seed, "shards": shards, "max_text_bytes": max_text_bytes}
    inputs = {"environment": _environment(distributions)}
    if found := find_complete(directory, kind=KIND, settings=settings, inputs=inputs):
        return found
    drops: Drops = collections.Counter()
    documents = _read_documents(distributions, seed, max_text_bytes, drops, say)
    items = _hold_out(documents, seed, drops)
    say(f"sample-corpus: held out {len({item.url for item in items}):,} documents for {len(items):,} reference items")
    kept = _corpus(documents, items, seed, max_text_bytes, drops)
    if not kept:
        raise ArtifactError(f"{directory}: no document is left for the shards within max_text_bytes={max_text_bytes}")
    names = _write(directory, kept, items, shards)
    say(f"sample-corpus: wrote {len(kept):,} documents to {shards} shards")
    return commit(
        directory,
        kind=KIND,
        settings=settings,
        inputs=inputs,
        info=_info(kept, items, drops),
        cost=Cost(seconds=time.perf_counter() - started),
        files=names,
    )


# --- what is installed ---------------------------------------------------------------------------------------------


def _normal_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _distributions() -> dict[str, importlib.metadata.Distribution]:
    """Installed distributions by normalised name, this project aside.

    Only folders made by installers are searched: ``sys.path`` also holds the working directory, which must not matter.
    """
    found: dict[str, importlib.metadata.Distribution] = {}
    for folder in sys.path:
        if Path(folder).name in ("site-packages", "dist-packages"):
            here = [each for each in importlib.metadata.distributions(path=[folder]) if "Name" in each.metadata]
            for distribution in sorted(here, key=lambda each: (each.name, each.version)):
                found.setdefault(_normal_name(distribution.name), distribution)
    found.pop(_OWN_NAME, None)
    return dict(sorted(found.items()))


def _environment(distributions: dict[str, importlib.metadata.Distribution]) -> str:
    versions = [[name, distribution.version] for name, distribution in distributions.items()]
    return fingerprint_of([REVISION, platform.python_version(), versions])


def _kind_of(relative: str) -> str | None:
    """How a file is to be read (a key of ``READERS``) by its path in an installation; None to leave it."""
    *folders, name = relative.lower().split("/")
    if ".." in folders or any(map(_SKIPPED_FOLDER.fullmatch, folders)) or _SKIPPED_FILE.fullmatch(name):
        return None
    suffix = Path(name).suffix
    if suffix in (".py", ".pyi"):
        return "topics" if relative == "pydoc_data/topics.py" else "python"
    if "licenses" in folders or _LICENCE_FILE.fullmatch(name):
        return "licence"
    if folders and folders[0].endswith(".dist-info"):
        return "metadata" if name == "metadata" else None
    return "document" if suffix in (".md", ".rst", ".txt") else None


def _sources(distributions: dict[str, importlib.metadata.Distribution], seed: int) -> list[Source]:
    """All files to read, in the order of their urls."""
    found = [_library_sources(), *(_distribution_sources(each, seed) for each in distributions.values())]
    return sorted(itertools.chain.from_iterable(found), key=lambda source: source.url)


def _library_sources() -> list[Source]:
    root = Path(sysconfig.get_paths()["stdlib"])
    prefix = f"python://{sys.version_info.major}.{sys.version_info.minor}/lib/"
    sources = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not _SKIPPED_FOLDER.fullmatch(name)]
        for name in names:
            relative = Path(folder, name).relative_to(root).as_posix()
            if kind := _kind_of(relative):
                sources.append(Source(prefix + urllib.parse.quote(relative), kind, str(Path(folder, name))))
    return sources


def _distribution_sources(distribution: importlib.metadata.Distribution, seed: int) -> list[Source]:
    """The files that an installer recorded for a distribution; a hashed choice of them where they are very many."""
    prefix = f"pypi://{distribution.name}/{distribution.version}/"
    sources = {}
    for file in distribution.files or []:
        relative = file.as_posix()
        if kind := _kind_of(relative):
            url = prefix + urllib.parse.quote(relative)
            sources[url] = Source(url, kind, str(distribution.locate_file(file)))
    space = MAX_DISTRIBUTION_BYTES
    chosen = []
    for source in sorted(sources.values(), key=lambda each: keyed_hash(seed, "source", each.url)):
        path = Path(source.path)
        space -= path.stat().st_size if source.kind == "python" and path.is_file() else 0
        if space >= 0 or source.kind != "python":
            chosen.append(source)
    return chosen


# --- documents -----------------------------------------------------------------------------------------------------


def _read_documents(
    distributions: dict[str, importlib.metadata.Distribution],
    seed: int,
    max_text_bytes: int | None,
    drops: Drops,
    say: Progress,
) -> list[Document]:
    sources = _sources(distributions, seed)
    say(f"sample-corpus: {len(sources):,} files of Python {platform.python_version()} and {len(distributions)} distributions")
    # A quarter more than is asked for, because duplicates and held-out documents go away.
    limit = None if max_text_bytes is None else max_text_bytes * 5 // 4
    documents = list(_documents(_extracts(sources, seed, limit), drops))
    size = sum(len(document.text.encode()) for document in documents)
    say(f"sample-corpus: {len(documents):,} documents, {size:,} bytes of text")
    if not documents or (max_text_bytes is None and size < MIN_TEXT_BYTES):
        raise ArtifactError(
            f"sample corpus: {size:,} bytes of text found in the installed packages, {MIN_TEXT_BYTES:,} needed; "
            "install the project's dependencies, or set max_text_bytes to do with less"
        )
    return documents


def _extracts(sources: Sequence[Source], seed: int, limit: int | None) -> list[tuple[Source, Extract]]:
    """What the sources hold, in their order; with a limit, what a hashed choice of about that many characters holds."""
    ordered = list(sources)
    if limit is not None:
        ordered.sort(key=lambda source: keyed_hash(seed, "subset", source.url))
    found: list[tuple[Source, Extract]] = []
    size = 0
    with contextlib.closing(_in_processes(ordered, seed)) as extracts:
        for source, extracted in zip(ordered, extracts, strict=True):
            found.append((source, extracted))
            size += sum(len(block) for piece in extracted.pieces for block in piece.blocks)
            if limit is not None and size >= limit:
                break
    return sorted(found, key=lambda pair: pair[0].url)


def _start_worker() -> None:
    # Syntax trees have no cycles, and collecting takes a tenth of the time.
    gc.disable()
    if sys.platform == "linux":  # a worker waits for ever for a caller that was killed; the kernel can tell it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _in_processes(sources: Sequence[Source], seed: int) -> Generator[Extract, None, None]:
    """Extracts in the order of ``sources``, from worker processes.

    Even a single worker is a process: how deep the parser may go depends on the depth of the caller's stack. They are
    spawned, since a fork of a process with threads or CUDA is not safe. Only a few batches are under way at a time, so
    a caller that stops early wastes little.
    """
    workers = min(os.cpu_count() or 1, _MAX_WORKERS)
    batches = iter([sources[start : start + _BATCH] for start in range(0, len(sources), _BATCH)])
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        waiting: collections.deque[Future[list[Extract]]] = collections.deque()
        try:
            for batch in itertools.islice(batches, 3 * workers):
                waiting.append(pool.submit(extract_all, batch, seed))
            while waiting:
                yield from waiting.popleft().result()
                for batch in itertools.islice(batches, 1):
                    waiting.append(pool.submit(extract_all, batch, seed))
        finally:
            pool.shutdown(cancel_futures=True)


def _documents(extracts: Iterable[tuple[Source, Extract]], drops: Drops) -> Iterator[Document]:
    """Documents in the order of their sources, without text that came before."""
    seen: set[bytes] = set()
    texts: set[bytes] = set()
    for source, extracted in extracts:
        if extracted.dropped:
            drops[extracted.dropped] += 1
        for piece in extracted.pieces:
            for document in _documents_of(source, piece, seen, drops):
                if len(document.text) < MIN_DOCUMENT_CHARACTERS:
                    drops["short document"] += 1
                elif not is_text(document.text):
                    drops["document without words"] += 1
                elif not _is_new(document.text, texts):
                    drops["duplicate document"] += 1
                else:
                    yield document


def _documents_of(source: Source, piece: Piece, seen: set[bytes], drops: Drops) -> Iterator[Document]:
    blocks = [fresh for block in piece.blocks if (fresh := _fresh(block, piece.label, seen, drops))]
    texts = pack(blocks)
    for number, text in enumerate(texts, start=1):
        parts = [piece.fragment] if piece.fragment else []
        if len(texts) > 1:
            parts.append(str(number))
        url = source.url + ("#" + urllib.parse.quote("/".join(parts)) if parts else "")
        yield Document(text, url, piece.label or label_of(text))


def _is_new(text: str, seen: set[bytes]) -> bool:
    digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
    new = digest not in seen
    seen.add(digest)
    return new


def _fresh(block: str, label: str | None, seen: set[bytes], drops: Drops) -> str:
    """The block without paragraphs that came before; empty when nothing of substance is left.

    Short paragraphs are headings such as "Returns", which belong to what follows: they are not compared on their own.
    Code is compared whole, since it makes no sense with holes, and licences are not, since they are to be boilerplate.
    """
    if label == BOILERPLATE:
        return block
    parts = paragraphs(block)
    long = [" ".join(part.split()) for part in parts if len(part) >= 60]
    if label == CODE or not long:
        if _is_new(block, seen):
            return block
        drops["duplicate block"] += 1
        return ""
    kept = [part for part in parts if len(part) < 60 or _is_new(part, seen)]
    drops["duplicate paragraph"] += len(parts) - len(kept)
    return "\n\n".join(kept) if any(len(part) >= 60 for part in kept) else ""


# --- reference task ------------------------------------------------------------------------------------------------


def _hold_out(documents: Sequence[Document], seed: int, drops: Drops) -> list[Item]:
    """Reference items from documents chosen by hash, until both splits are full or HELD_OUT_SHARE is used.

    All documents of a file go to the same split: the shorter one when the file comes up first. At most a third of a
    document's passages, rounded up, have a last word that does not recur. Comments are left to the corpus, since their
    passages lack context.
    """
    prose = [document for document in documents if document.label == PROSE and "#comments" not in document.url]
    candidates = [(document, found) for document in prose if (found := passages(document.text))]
    candidates = [pair for pair in candidates if any(passage.recurs for passage in pair[1])]
    candidates.sort(key=lambda pair: (keyed_hash(seed, "held out", pair[0].text), pair[0].url))
    items: dict[str, list[Item]] = {"train": [], "test": []}
    split_of: dict[str, str] = {}
    for document, found in candidates[: int(HELD_OUT_SHARE * len(candidates))]:
        shorter = "test" if len(items["test"]) < len(items["train"]) else "train"
        split = split_of.setdefault(document.source, shorter)
        chosen = [passage for passage in found if passage.recurs]
        chosen += [passage for passage in found if not passage.recurs][: -(-len(chosen) // 2)]
        space = MAX_REFERENCE_ITEMS - len(items[split])
        items[split] += [Item(passage, document.url, split) for passage in chosen[:space]]
    train = NgramIndex([item.passage.text for item in items["train"]])
    clean = [item for item, hit in zip(items["test"], train.hits([item.passage.text for item in items["test"]]), strict=True) if not hit]
    drops["test item sharing a 13-gram with a train item"] += len(items["test"]) - len(clean)
    return _distinct(items["train"]) + _distinct(clean)


def _distinct(items: Sequence[Item]) -> list[Item]:
    seen: set[bytes] = set()
    return [item for item in items if _is_new(item.passage.text, seen)]


class NgramIndex:
    """The 13-grams of words of some texts, to find texts that share one.

    Words are runs of letters and digits in lower case. A gram is known by a 64-bit hash: no shared gram is missed, and
    a false hit anywhere among 10^7 grams against 10^5 has a chance of 1 in 10^7.
    """

    _WORDS = re.compile(r"[^\W_]+")
    _FACTOR = np.uint64(0x9E3779B97F4A7C15)

    def __init__(self, texts: Iterable[str]) -> None:
        words = [self._WORDS.findall(text.lower()) for text in texts]
        # Words that no indexed text holds are 0, and a window with a 0 in it cannot be a gram of the index.
        self._ids = {word: keyed_hash(0, "word", word) | 1 for word in itertools.chain.from_iterable(words)}
        hashes, _ = self._grams(self._numbers(itertools.chain.from_iterable([*line, ""] for line in words)))
        self._known = np.unique(hashes)

    def _numbers(self, words: Iterable[str]) -> npt.NDArray[np.uint64]:
        get = self._ids.get
        return np.fromiter((get(word, 0) for word in words), dtype=np.uint64)

    def _grams(self, ids: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.intp]]:
        """Hashes of the windows without a 0, and where they start."""
        if len(ids) < NGRAM:
            return np.empty(0, np.uint64), np.empty(0, np.intp)
        count = len(ids) - NGRAM + 1
        unknown = np.concatenate([[0], np.cumsum(ids == 0)])
        starts = np.flatnonzero(unknown[NGRAM:] == unknown[:count])
        hashes = np.zeros(len(starts), np.uint64)
        for offset in range(NGRAM):
            hashes = hashes * self._FACTOR + ids[starts + offset]
        return hashes, starts

    def hits(self, texts: Sequence[str]) -> list[bool]:
        """For each text, whether it shares a gram with the index."""
        ids = [np.append(self._numbers(self._WORDS.findall(text.lower())), np.uint64(0)) for text in texts]
        if not ids:
            return []
        hashes, starts = self._grams(np.concatenate(ids))
        ends = np.cumsum([len(each) for each in ids])
        owners = np.searchsorted(ends, starts[np.isin(hashes, self._known)], side="right")
        found = np.zeros(len(texts), bool)
        found[owners] = True
        return [bool(hit) for hit in found]


# --- writing -------------------------------------------------------------------------------------------------------


def _corpus(documents: Sequence[Document], items: Sequence[Item], seed: int, max_text_bytes: int | None, drops: Drops) -> list[Document]:
    """The documents of the shards in their final order."""
    held_out = {item.url for item in items}
    drops["held out for the reference task"] += len(held_out)
    rest = [document for document in documents if document.url not in held_out]
    hits = NgramIndex([item.passage.text for item in items]).hits([document.text for document in rest])
    drops["document sharing a 13-gram with a reference item"] += sum(hits)
    kept = [document for document, hit in zip(rest, hits, strict=True) if not hit]
    kept.sort(key=lambda document: (keyed_hash(seed, "order", document.url + "\0" + document.text), document.url))
    if max_text_bytes is None:
        return kept
    sizes = itertools.accumulate(len(document.text.encode()) for document in kept)
    within = sum(size <= max_text_bytes for size in sizes)
    drops["document beyond max_text_bytes"] += len(kept) - within
    return kept[:within]


def _write(directory: Path, documents: Sequence[Document], items: Sequence[Item], shards: int) -> list[str]:
    """Write all files; returns their names."""
    names = []
    for shard in range(shards):
        names.append(f"shard-{shard:05d}-of-{shards:05d}.json.gz")
        lines = ({"text": each.text, "timestamp": TIMESTAMP, "url": each.url} for each in documents[shard::shards])
        with (
            atomic_file(directory / names[-1]) as raw,
            # Neither name nor time, which gzip would put into the header.
            gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0) as handle,
        ):
            handle.write(_json_lines(lines))
    for split in ("train", "test"):
        names.append(f"reference-{split}.jsonl")
        lines = ({"text": item.passage.text, "url": item.url, "split": split} for item in items if item.split == split)
        with atomic_file(directory / names[-1]) as handle:
            handle.write(_json_lines(lines))
    return names


def _json_lines(lines: Iterable[dict[str, str]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def _info(documents: Sequence[Document], items: Sequence[Item], drops: Drops) -> dict[str, Json]:
    sizes = collections.Counter[str]()
    for document in documents:
        sizes[document.label] += len(document.text.encode())
    counts = collections.Counter(document.label for document in documents)
    return {
        "documents": len(documents),
        "text_bytes": sizes.total(),
        "classes": {label: {"documents": counts[label], "bytes": sizes[label]} for label in CLASSES},
        "dropped": {reason: drops[reason] for reason in sorted(drops)},
        "reference_items": len(items),
        "passages": {split: sum(item.split == split for item in items) for split in ("train", "test")},
        "passages_with_recurring_target": sum(item.passage.recurs for item in items),
    }

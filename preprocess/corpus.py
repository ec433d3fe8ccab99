"""The preprocess step: documents in, three indexed corpora out (train, pool and holdout), no document in two of them.

Inputs are cut into parts. Processes and MPI ranks tokenize parts in any order (:mod:`.parts`), then place them in the corpora
(:mod:`.join`). A killed run leaves finished parts behind and the next one continues with the others; the bytes of the result depend
on the inputs and settings alone.
"""

from __future__ import annotations

import heapq
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mates.preprocess import artifact
from mates.preprocess.artifact import Cost, DiskFullError, FileRecord, Manifest
from mates.preprocess.encode import CheckedEngine, EngineDifferenceError, LibraryEngine, choose_engine, open_engine
from mates.preprocess.features import NGRAM_BUCKETS
from mates.preprocess.indexed import IndexLayout, token_dtype
from mates.preprocess.inputs import InputError, InputFile
from mates.preprocess.join import TOKENS_NAME, JoinedCorpus, JoinedTokens, Placement, metadata_name, place_part, places
from mates.preprocess.ledger import REJECTS_NAME, make_ledgers, refuse_empty, write_rejects
from mates.preprocess.parts import (
    SPLITS,
    Part,
    PartFiles,
    PartRecord,
    PartSettings,
    PartWriter,
    SplitRecord,
    SplitShares,
    is_whole,
    read_record,
)
from mates.preprocess.ranks import Alone, Ranks, on_all, on_first
from mates.preprocess.readers import PartReader, ReadOptions, parts_of, read_texts
from mates.preprocess.scorer import SCORER_NAME, Scorer, ScorerTokenizer, read_scorer_tokenizer
from mates.preprocess.spans import TokenEnds
from mates.preprocess.tokenizer import SpecialTokenText, Tokenizer, open_tokenizer
from mates.preprocess.workers import WORKERS_LOCK, Stop, for_each, hold_worker_lock, try_lock

__all__ = ["SPLITS", "TOKENS_NAME", "CorpusError", "CorpusSettings", "SplitShares", "make_corpora", "texts_of"]

PART_BYTES = 256 << 20
FORMAT = 3  # of the folder of unfinished work
FIRST_DOCUMENTS = 64  # compared with the reference library before anything is written
NGRAMS_NAME = "ngram_counts.npy"

EngineName = Literal["fastokens", "library"]
Say = Callable[[str], None]
Progress = Callable[[int, str], None]


class CorpusError(RuntimeError):
    """Another process makes the same corpora."""


@dataclass(frozen=True, kw_only=True)
class CorpusSettings(PartSettings):
    """What is made of the documents.

    ``special_token_text`` says what text that spells a special token (a literal ``<|endoftext|>`` in a web page) becomes: the
    ``text`` that it is, or the ``special`` id as in Megatron's tool.
    """

    special_token_text: SpecialTokenText = "text"

    def as_json(self) -> dict[str, Any]:
        """For manifests."""
        reading = asdict(self.reading)
        shares = {"pool_share": self.shares.pool, "holdout_share": self.shares.holdout, "split_seed": self.shares.seed}
        return reading | shares | {"features": list(self.features), "special_token_text": self.special_token_text}


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One call of :func:`make_corpora`, the same on all ranks."""

    directory: Path
    tokenizer_dir: Path
    tokenizer: Tokenizer
    tokenizer_file: str
    scorer: ScorerTokenizer | None
    settings: CorpusSettings
    inputs: list[InputFile]
    parts: list[Part]
    asked: dict[str, Any]
    parents: dict[str, str]
    workers: int
    ranks: Ranks
    progress: Progress
    say: Say

    @cached_property
    def folder(self) -> Path:
        """Unfinished work. Its name is a hash of all it depends on, so that other settings never meet it."""
        plan = [FORMAT, self.asked, self.parents, [[part.file.name, part.file.bytes, part.index, part.of] for part in self.parts]]
        return self.directory / f"unfinished-{artifact.fingerprint_of(artifact.normalise(plan))[:16]}"

    @property
    def itemsize(self) -> int:
        """Bytes of a token."""
        return token_dtype(self.tokenizer.vocab_size).itemsize

    @property
    def scorer_itemsize(self) -> int | None:
        """Bytes of an encoder token, where these are made."""
        return self.scorer.dtype.itemsize if self.scorer else None

    @property
    def splits(self) -> tuple[str, ...]:
        return self.settings.shares.splits

    def alone(self, workers: int) -> bool:
        """Whether so many workers mean that this process does everything itself."""
        return workers <= 1 and self.ranks.size == 1

    def mine(self) -> list[Part]:
        """The parts of this rank: largest first, each to the rank with the fewest bytes."""
        load = [(0.0, rank) for rank in range(self.ranks.size)]
        chosen = []
        for part in sorted(self.parts, key=lambda part: (-part.file.bytes / part.of, part.number)):
            least, rank = load[0]
            heapq.heapreplace(load, (least + part.file.bytes / part.of + 1, rank))
            if rank == self.ranks.rank:
                chosen.append(part)
        return sorted(chosen, key=lambda part: part.number)


def make_corpora(
    directory: Path,
    *,
    inputs: list[InputFile],
    settings: CorpusSettings,
    tokenizer_dir: Path,
    scorer_tokenizer: Path | None = None,
    workers: int = 1,
    part_bytes: int = PART_BYTES,
    ranks: Ranks | None = None,
    origin: str | None = None,
    progress: Progress = lambda done_bytes, text: None,
    say: Say = lambda text: None,
) -> dict[str, Manifest]:
    """Tokenize documents into ``directory``/train, /pool and /holdout. Called by all ranks alike.

    Args:
        directory: where the corpora go, shared by all ranks.
        inputs: files, read in order.
        settings: how documents are read and divided. A share of 0 leaves that corpus out.
        tokenizer_dir: a tokenizer artifact.
        scorer_tokenizer: folder or file of an encoder's tokenizer, whose tokens are written too (:mod:`.scorer`).
        workers: processes of each rank. part_bytes: size of the parts that large uncompressed and Parquet files are cut in.
        ranks: the MPI ranks that work together, from :func:`.ranks.find_ranks`.
        origin: fingerprint of what wrote the inputs, where that is known (the sample corpus); files are otherwise recognised by
            path and size, and their BLAKE3 digest is recorded.
        progress: told the bytes of finished inputs and a line of text. say: told what a user must see.

    Returns:
        The manifests by split; at once where all are complete and fit.

    Raises:
        InputError: a damaged input where it is not to be skipped, or one of the corpora would be empty.
        ArtifactMismatchError: corpora of other inputs or settings stand there. DiskFullError: with the bytes that are missing.
        CorpusError: another process makes them. workers.WorkerDiedError: a process was killed.
        TokenizerError: the scorer's tokenizer cannot be used, or not together with the other.
    """
    ranks = ranks or Alone()
    inputs = on_first(ranks, lambda: inputs)  # a folder may have been listed at different times
    found = []  # a tokenizer cannot be sent
    on_all(ranks, lambda: found.append(open_tokenizer(tokenizer_dir, special_token_text=settings.special_token_text)))
    tokenizer, tokenizer_manifest = found[0]
    scorer = on_first(ranks, lambda: _read_scorer(scorer_tokenizer, tokenizer))
    counted = [(file, index, of) for file in inputs for of in [parts_of(file, part_bytes)] for index in range(of)]
    job = _Job(
        directory=directory,
        tokenizer_dir=tokenizer_dir,
        tokenizer=tokenizer,
        tokenizer_file=tokenizer_manifest.info["file"],
        scorer=scorer,
        settings=settings,
        inputs=inputs,
        parts=[Part(number=number, file=file, index=index, of=of) for number, (file, index, of) in enumerate(counted)],
        asked=settings.as_json() | {"inputs": origin or [{"path": file.name, "bytes": file.bytes} for file in inputs]},
        parents={"tokenizer": tokenizer_manifest.fingerprint} | ({"scorer_tokenizer": scorer.files} if scorer else {}),
        workers=workers,
        ranks=ranks,
        progress=progress,
        say=say,
    )
    done = on_first(job.ranks, lambda: _find(job))
    if len(done) == len(job.splits):
        return done
    with _lock(job):
        _make(job, complete=list(done))
    return on_all(job.ranks, lambda: _find(job))[job.ranks.rank]


def _read_scorer(path: Path | None, tokenizer: Tokenizer) -> ScorerTokenizer | None:
    if path is None:
        return None
    TokenEnds(tokenizer, LibraryEngine.name)  # what it cannot do is said before anything is made
    return read_scorer_tokenizer(path)


def _find(job: _Job) -> dict[str, Manifest]:
    """The corpora that are complete."""
    found = {
        split: artifact.find_complete(job.directory / split, kind="corpus", settings=job.asked | {"split": split}, inputs=job.parents)
        for split in job.splits
    }
    done = {split: manifest for split, manifest in found.items() if manifest}
    if len(done) == len(job.splits) and job.ranks.rank == 0:
        shutil.rmtree(job.folder, ignore_errors=True)  # of a run that was killed after its last manifest
    return done


@contextmanager
def _lock(job: _Job) -> Iterator[None]:
    """One job at a time makes these corpora; the kernel takes the lock away with the process that holds it."""

    def take() -> bool:
        job.directory.mkdir(parents=True, exist_ok=True)
        handles.append((job.directory / ".lock").open("ab"))
        handles.append((job.directory / WORKERS_LOCK).open("ab"))
        if not try_lock(handles[0], 0):
            raise CorpusError(f"{job.directory}: another process is making these corpora; wait for it, or choose another folder")
        if not try_lock(handles[1], 60):
            raise CorpusError(f"{job.directory}: processes of an earlier run are still working here; end them first")
        handles.pop().close()
        return True

    handles: list[Any] = []
    try:
        on_first(job.ranks, take)
        yield
    finally:
        for handle in handles:
            handle.close()


def _make(job: _Job, complete: list[str]) -> None:
    start = time.perf_counter()
    opened: list[CheckedEngine | LibraryEngine] = []  # of rank 0; not told to others, since it cannot be sent
    try:
        engine, why = on_first(job.ranks, lambda: _prepare(job, opened))
        records = _tokenize(job, engine, opened)
        on_first(job.ranks, lambda: refuse_empty(job.splits, job.inputs, records))
        corpora = _corpora(job, records)
        if not on_first(job.ranks, lambda: _prepare_join(job, records, corpora, complete)):
            job.say(f"preprocess: {job.directory} lost files that parts had been joined into; those parts are done again")
            records = _tokenize(job, engine, opened)
            on_first(job.ranks, lambda: _prepare_join(job, records, corpora, complete))
        joining = time.perf_counter()
        _join(job, records, corpora)
        seconds = sum(record.seconds for record in records) / (job.workers * job.ranks.size) + time.perf_counter() - joining
        on_first(job.ranks, lambda: _finish(job, records, corpora, seconds, why))
    except (DiskFullError, OSError) as error:
        if isinstance(error, DiskFullError) or artifact.is_disk_full(error):
            raise _disk_full(job) from error
        raise
    job.say(f"preprocess: {time.perf_counter() - start:.1f} s")


# --- the folder of unfinished work ---------------------------------------------------------------------------------


def _prepare(job: _Job, opened: list[CheckedEngine | LibraryEngine]) -> tuple[EngineName, str]:
    """Make the folder, and say which engine tokenizes and why; it is put into ``opened`` where it was made on the way."""
    for other in sorted(job.directory.glob("unfinished-*")):
        if other != job.folder:
            job.say(f"preprocess: {other} holds unfinished work of other inputs or settings; remove it if it is not needed")
    job.folder.mkdir(exist_ok=True)
    for corpus in job.splits:
        for left in (job.directory / corpus).glob(".*.joining"):  # of unfinished work that is gone
            if not (job.directory / f"unfinished-{left.name.split('.')[-2]}").exists():
                left.unlink()
    for folder in (job.folder, job.directory, *(job.directory / split for split in job.splits)):
        for left in folder.glob(".*.tmp"):  # of killed processes: the lock says that none is at work
            left.unlink()
    if known := _known_difference(_difference_file(job)):
        return "library", str(known)
    choice = choose_engine(job.tokenizer, Path(job.tokenizer_file))
    if choice.alarm:
        _say_difference(job, choice.why)
    if isinstance(choice.opened, CheckedEngine):
        try:
            choice.opened.check(_first_documents(job))
        except EngineDifferenceError as error:
            _note_difference(job, error)
            return "library", str(error)
    opened.append(choice.opened)
    return choice.engine, choice.why


def _first_documents(job: _Job) -> list[str]:
    """The first few texts; what is wrong with the input is said when it is read in earnest."""
    try:
        block = next(iter(PartReader(job.inputs[0], job.settings.reading)), None)
    except InputError:
        return []
    return block.texts[:FIRST_DOCUMENTS] if block else []


def _difference_file(job: _Job) -> Path:
    return job.folder / "difference.json"


def _known_difference(path: Path) -> EngineDifferenceError | None:
    """What made the reference library take over in an earlier attempt, or on another rank."""
    return EngineDifferenceError(*artifact.read_json(path)) if path.is_file() else None


def _note_difference(job: _Job, error: EngineDifferenceError) -> None:
    artifact.write_json(_difference_file(job), error.args)
    _say_difference(job, str(error))


def _say_difference(job: _Job, difference: str) -> None:
    job.say(f"preprocess: WARNING: the fast tokenizer differs from the reference library, which takes over (slower): {difference}")


def _disk_full(job: _Job) -> DiskFullError:
    """How much space the rest needs, by what the finished parts took."""
    done = [(part, record) for part in job.parts if (record := _record(job, part, None)) is not None]
    written = sum(_written_bytes(job, split) for _, record in done for split in record.splits.values())
    read = sum(part.file.bytes / part.of for part, _ in done)
    # before anything is done: about 4.4 bytes of text a token, and compressed text unfolds to some 2.7 times its size
    itemsize = job.itemsize + (job.scorer_itemsize + 1 if job.scorer_itemsize else 0)
    ratio = written / read if read else itemsize * (1.2 if job.inputs[0].name.endswith((".gz", ".zst")) else 0.5) / 2
    left = sum(part.file.bytes / part.of for part in job.parts) - read
    free = shutil.disk_usage(job.directory).free
    needed = max(int(ratio * left), sum(split.documents * 20 for _, record in done for split in record.splits.values()), 1 << 20)
    return DiskFullError(
        f"{job.directory}: the disk is full: {free:,} bytes free, about {needed:,} are needed for the {len(job.parts) - len(done)} of "
        f"{len(job.parts)} parts that are left and for joining. What is finished is kept; make space and run the same command again"
    )


def _written_bytes(job: _Job, split: SplitRecord) -> int:
    written = split.tokens * job.itemsize + split.documents * 24 + split.metadata_bytes
    return written + split.scorer_tokens * job.scorer_itemsize + split.tokens + split.documents * 24 if job.scorer_itemsize else written


def _record(job: _Job, part: Part, engine: str | None) -> PartRecord | None:
    return read_record(PartFiles(job.folder, part.number), part, engine)


def _whole_record(job: _Job, engine: str, part: Part) -> PartRecord | None:
    """The record of a part that is done and whose files are whole."""
    record = _record(job, part, engine)
    if record is None or record.joined or is_whole(PartFiles(job.folder, part.number), record, job.itemsize, job.scorer_itemsize):
        return record
    return None


# --- tokenizing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _MakeWriter:
    """Makes the function that a worker process does parts with; picklable."""

    folder: Path
    settings: CorpusSettings
    tokenizer_dir: Path
    engine: EngineName
    vocab_size: int
    scorer: ScorerTokenizer | None
    difference: Path = field(kw_only=True)
    alone: bool = field(kw_only=True)
    told: Callable[[int], None] | None = field(default=None, kw_only=True)
    opened: CheckedEngine | LibraryEngine | None = field(default=None, kw_only=True)

    def __call__(self, stop: Stop) -> Callable[[Part], PartRecord]:
        if not self.alone:  # as many processes as cores: threads of the libraries would only be in each other's way
            os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
        engine, scorer = self.opened, None
        if engine is None or self.scorer is not None:
            tokenizer, _ = open_tokenizer(self.tokenizer_dir, special_token_text=self.settings.special_token_text)
            engine = engine or open_engine(tokenizer, self.engine)
            scorer = Scorer(self.scorer, tokenizer, engine.name) if self.scorer else None
        writer = PartWriter(self.folder, self.settings, engine, vocab_size=self.vocab_size, stop=stop, scorer=scorer)
        told = self.told or (lambda documents: None)

        mark = None if self.alone else hold_worker_lock(self.folder.parent)

        def work(part: Part) -> PartRecord:
            assert mark is None or not mark.closed
            if engine.name != "library" and (known := _known_difference(self.difference)):
                raise known  # another rank's
            return writer(part, told)

        return work


def _tokenize(job: _Job, engine: EngineName, opened: list[CheckedEngine | LibraryEngine]) -> list[PartRecord]:
    """All parts' records, after doing those that are not done."""
    try:
        gathered = on_all(job.ranks, lambda: _tokenize_mine(job, engine, opened))
    except EngineDifferenceError as error:
        found = error
        on_first(job.ranks, lambda: _note_difference(job, found))
        gathered = on_all(job.ranks, lambda: _tokenize_mine(job, "library", []))
    return sorted((record for records in gathered for record in records), key=lambda record: record.number)


def _tokenize_mine(job: _Job, engine: EngineName, opened: list[CheckedEngine | LibraryEngine]) -> list[PartRecord]:
    records: list[PartRecord] = []
    todo: list[Part] = []
    finished_bytes = 0.0
    mine = job.mine()
    with ThreadPoolExecutor(job.workers) as threads:
        found = list(threads.map(partial(_whole_record, job, engine), mine))
    for part, record in zip(mine, found, strict=True):
        if record is None:
            todo.append(part)
        else:
            records.append(record)
            finished_bytes += part.file.bytes / part.of
    size_of = {part.number: part.file.bytes / part.of for part in todo}

    def done(record: PartRecord) -> None:
        nonlocal finished_bytes
        records.append(record)
        finished_bytes += size_of[record.number]
        job.progress(int(finished_bytes), f"{Path(record.file).name}: {record.documents:,} documents")

    workers = min(job.workers, len(todo))
    make = _MakeWriter(
        job.folder,
        job.settings,
        job.tokenizer_dir,
        engine,
        job.tokenizer.vocab_size,
        job.scorer,
        difference=_difference_file(job),
        alone=job.alone(workers),
        told=(lambda documents: job.progress(int(finished_bytes), f"{documents:,} documents")) if workers <= 1 else None,
        opened=opened[0] if opened and job.alone(workers) else None,
    )
    try:
        for_each(todo, make, workers=workers, done=done)
    except EngineDifferenceError as error:
        artifact.write_json(_difference_file(job), error.args)  # the other ranks need not go on
        raise
    return records


# --- joining -------------------------------------------------------------------------------------------------------


def _named_file(job: _Job) -> Path:
    """Records of the files that were about to be given their names; written when all parts are in."""
    return job.folder / "named.json"


def _named(job: _Job) -> dict[str, dict[str, FileRecord]]:
    if not _named_file(job).is_file():
        return {}
    raw = artifact.read_json(_named_file(job))
    return {split: {name: FileRecord.from_json(record) for name, record in files.items()} for split, files in raw.items()}


def _corpora(job: _Job, records: Sequence[PartRecord]) -> dict[str, JoinedCorpus]:
    corpora = {}
    for split in job.splits:
        directory, total, scorer = job.directory / split, places(records, split)[-1], None
        layout = IndexLayout(dtype=token_dtype(job.tokenizer.vocab_size), sequences=total.sequence, documents=total.document)
        main = JoinedTokens(prefix=directory / TOKENS_NAME, layout=layout, tokens=total.token)
        if job.scorer:
            layout = IndexLayout(dtype=job.scorer.dtype, sequences=total.scorer_sequence, documents=total.document)
            scorer = JoinedTokens(prefix=directory / SCORER_NAME, layout=layout, tokens=total.scorer_token)
        corpora[split] = JoinedCorpus(directory=directory, main=main, scorer=scorer, job=job.folder.name[-16:])
    return corpora


def _prepare_join(job: _Job, records: Sequence[PartRecord], corpora: Mapping[str, JoinedCorpus], complete: list[str]) -> bool:
    """Make the files that parts are placed in. False where parts had been placed in files that are gone: these are to be redone."""
    for split in complete:
        artifact.unmake(job.directory / split)
    joined = [record for record in records if record.joined]
    if not joined:
        for corpus in corpora.values():
            corpus.prepare()
        return True
    named = _named(job)
    if all(corpus.holds(named.get(split)) for split, corpus in corpora.items()):
        return True
    _named_file(job).unlink(missing_ok=True)
    for record in joined:
        PartFiles(job.folder, record.number).record.unlink()
    return False


def _join(job: _Job, records: list[PartRecord], corpora: Mapping[str, JoinedCorpus]) -> None:
    at = {split: places(records, split) for split in corpora}
    mine = {part.number for part in job.mine()}
    todo = [
        Placement(record=record, at={split: at[split][number] for split in corpora})
        for number, record in enumerate(records)
        if record.number in mine and not record.joined
    ]

    def join_mine() -> None:
        with ExitStack() as stack:
            if job.ranks.size > 1:
                stack.enter_context(hold_worker_lock(job.directory))
            threads = stack.enter_context(ThreadPoolExecutor(job.workers))  # copying and syncing leave the interpreter alone
            for _ in threads.map(partial(place_part, job.folder, corpora), todo):
                pass

    on_all(job.ranks, join_mine)


def _finish(job: _Job, records: list[PartRecord], corpora: Mapping[str, JoinedCorpus], seconds: float, why: str) -> None:
    ledgers = make_ledgers(job.parts, records)
    write_rejects(job.directory / REJECTS_NAME, job.parts, records)
    total = sum(corpus.main.tokens for corpus in corpora.values())
    engines = sorted({record.engine for record in records})
    if not _named_file(job).is_file():
        sealed = {split: _file_records(records, split, corpus) for split, corpus in corpora.items()}
        artifact.write_json(
            _named_file(job), {split: {name: item.as_json() for name, item in files.items()} for split, files in sealed.items()}
        )
    named = _named(job)
    for split, corpus in corpora.items():
        tokens = corpus.main
        metadata = {
            metadata_name(number, len(records)): (
                PartFiles(job.folder, record.number).metadata(split),
                FileRecord(bytes=record.splits[split].metadata_bytes, blake3=record.splits[split].metadata_digest),
            )
            for number, record in enumerate(records)
            if record.splits[split].documents
        }
        corpus.name(metadata)
        hashed = {name: record for name, (_, record) in metadata.items()} | named[split]
        names = [*hashed]
        if "ngrams" in job.settings.features:
            _write_ngrams(job, split, records)
            names.append(NGRAMS_NAME)
        artifact.commit(
            corpus.directory,
            kind="corpus",
            settings=job.asked | {"split": split},
            inputs=job.parents,
            info={
                "tokenizer": {"vocab_size": job.tokenizer.vocab_size, "end_of_document": job.tokenizer.end_of_document},
                "engine": {"name": engines[0], "why": why},
                "dtype": str(tokens.layout.dtype),
                "documents": tokens.layout.documents,
                "sequences": tokens.layout.sequences,
                "tokens": tokens.tokens,
                "input_files": ledgers,
            }
            | ({"scorer": job.scorer.info | {"tokens": corpus.scorer.tokens}} if job.scorer and corpus.scorer else {}),
            files=names,
            identity=[path.name for path in corpus.sizes],
            hashed=hashed,
            # one pass makes all corpora; its time is divided by tokens so that sums over artifacts are right
            cost=Cost(seconds=seconds * tokens.tokens / max(1, total), tokens=tokens.tokens),
        )
    shutil.rmtree(job.folder)


def _file_records(records: Sequence[PartRecord], split: str, corpus: JoinedCorpus) -> dict[str, FileRecord]:
    """Records of the token files, from the hashes of their parts, and of the indices, which are complete with this."""
    parts, itemsize = [record.splits[split] for record in records], corpus.main.layout.dtype.itemsize
    found = corpus.seal()
    found[corpus.main.bin.name] = FileRecord.of_sections((part.tokens * itemsize, part.digest) for part in parts)
    if corpus.scorer:
        itemsize = corpus.scorer.layout.dtype.itemsize
        found[corpus.scorer.bin.name] = FileRecord.of_sections((part.scorer_tokens * itemsize, str(part.scorer_digest)) for part in parts)
        found[corpus.counts.name] = FileRecord.of_sections((part.tokens, str(part.counts_digest)) for part in parts)
    return found


def _write_ngrams(job: _Job, split: str, records: Sequence[PartRecord]) -> None:
    totals = np.zeros(NGRAM_BUCKETS, np.int64)
    for record in records:
        totals += np.load(PartFiles(job.folder, record.number).ngrams(split), allow_pickle=False)
    artifact.write_array(job.directory / split / NGRAMS_NAME, totals)


def texts_of(inputs: list[InputFile], reading: ReadOptions, shares: SplitShares) -> Iterator[str]:
    """Texts of the train split's documents, in order: what a tokenizer is trained on."""
    for file in inputs:
        for text in read_texts(file, reading):
            if shares.split_of(text) == "train":
                yield text

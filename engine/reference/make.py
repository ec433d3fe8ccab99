"""Reference artifacts out of files of items."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mates.engine.config import TaskFormat
from mates.engine.reference.formats import read_items
from mates.engine.reference.overlap import read_avoided, without_overlap
from mates.engine.reference.task import IGNORED, Half, Passage, choose, drop_overlapping, pack
from mates.preprocess import artifact
from mates.preprocess.artifact import Cost, Manifest, Request
from mates.preprocess.inputs import InputError
from mates.preprocess.tokenizer import Tokenizer, open_tokenizer

FILES = ("tokens.npy", "labels.npy", "offsets.npy")
Avoided = Sequence[tuple[TaskFormat, Path]]


def make_reference(
    directory: Path,
    *,
    sources: list[Path],
    name: str,
    items: dict[Half, int],
    tokenizer_dir: Path,
    max_tokens: int,
    seed: int,
    form: TaskFormat = "lambada",
    avoid: Avoided = (),
) -> dict[Half, Manifest]:
    """Write the reference artifacts ``directory``/train and ``directory``/test.

    Passages of the train half that overlap with an evaluation file of ``avoid`` are dropped before the choice.

    Raises:
        InputError: too few passages, or a bad line. ArtifactMismatchError: others stand there.
    """
    tokenizer, inputs = _open_inputs(tokenizer_dir, "reference.source", sources, avoid)
    settings: dict[str, Any] = {
        "name": name,
        "items": items["train"],
        "test_items": items["test"],
        "max_tokens": max_tokens,
        "seed": seed,
    }
    if form != "lambada":  # a manifest that says no format is one of LAMBADA's form
        settings["format"] = form
    halves: tuple[Half, Half] = ("train", "test")
    requests = {
        half: Request(directory=directory / half, kind="reference", settings=settings | {"half": half}, inputs=inputs) for half in halves
    }
    complete = {half: manifest for half, request in requests.items() if (manifest := request.find())}
    if len(complete) == 2:
        return complete
    start = time.perf_counter()
    for half in complete:
        artifact.unmake(directory / half)
    chosen = _halves(sources, form=form, items=items, seed=seed, avoid=avoid)
    result: dict[Half, Manifest] = {}
    for half, request in requests.items():
        result[half] = _write(request, chosen[half], tokenizer, start)
        start = time.perf_counter()
    return result


def make_further_reference(
    directory: Path,
    *,
    source: Path,
    name: str,
    form: TaskFormat,
    items: int,
    tokenizer_dir: Path,
    max_tokens: int,
    seed: int,
    avoid: Avoided = (),
) -> Manifest:
    """Write the reference artifact ``directory`` from all items of a training split, none of them held out.

    Items that overlap with an evaluation file of ``avoid`` are dropped before the choice.

    Raises:
        InputError: too few items, or a bad line. ArtifactMismatchError: another stands there.
    """
    task = f"reference.more ({name})"
    tokenizer, inputs = _open_inputs(tokenizer_dir, f"{task}.source", [source], avoid)
    settings = {"name": name, "format": form, "items": items, "max_tokens": max_tokens, "seed": seed, "half": "all"}
    request = Request(directory=directory, kind="reference", settings=settings, inputs=inputs)
    if done := request.find():
        return done
    start = time.perf_counter()
    passages = [Passage(passage.context, passage.target, "train") for passage in read_items(source, form, seed)]
    kept, avoided = without_overlap(_unique(passages), read_avoided(avoid))
    chosen = choose(kept, "train", items, seed)
    if len(chosen) < items:
        raise InputError(f"{source}: {len(chosen)} different items{_said(avoided)}, {task}.items asks for {items}")
    return _write(request, _Chosen(chosen, avoided), tokenizer, start)


@dataclass(frozen=True)
class _Chosen:
    """Passages for an artifact, and how many others were dropped for overlap."""

    passages: list[Passage]
    dropped: int


def _halves(sources: list[Path], *, form: TaskFormat, items: dict[Half, int], seed: int, avoid: Avoided) -> dict[Half, _Chosen]:
    """The main task's two halves. InputError as :func:`make_reference`."""
    passages = _unique(passage for source in sources for passage in read_items(source, form, seed))
    own = [passage for passage in passages if passage.half == "train"]
    kept, avoided = without_overlap(own, read_avoided(avoid))
    reference = choose(kept, "train", items["train"], seed)
    if len(reference) < items["train"]:
        raise InputError(
            f"{sources[0]}: {len(reference)} passages in the train half{_said(avoided)}, reference.items asks for {items['train']}"
        )
    held_out, overlapping = drop_overlapping([passage for passage in passages if passage.half == "test"], reference)
    test = choose(held_out, "test", items["test"], seed)
    if len(test) < 2:
        raise InputError(f"{sources[0]}: {len(test)} passages left in the test half, at least 2 are needed")
    return {"train": _Chosen(reference, avoided), "test": _Chosen(test, overlapping)}


def _said(avoided: int) -> str:
    return f" after {avoided} that overlap with reference.avoid" if avoided else ""


def _unique(passages: Iterable[Passage]) -> list[Passage]:
    """Each text once: sources may share passages, and tasks repeat items."""
    unique: dict[str, Passage] = {}
    for passage in passages:
        unique.setdefault(passage.text, passage)
    return list(unique.values())


def _open_inputs(tokenizer_dir: Path, field: str, sources: Sequence[Path], avoid: Avoided) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer, and the fingerprints of all that a reference is made from."""
    for place, path in [*((field, source) for source in sources), *(("reference.avoid", path) for _, path in avoid)]:
        if not path.is_file():
            raise InputError(f"{place}: {path}: no such file")
    tokenizer, manifest = open_tokenizer(tokenizer_dir)
    inputs = {
        "tokenizer": manifest.fingerprint,
        "source": artifact.fingerprint_of([artifact.digest_of(source) for source in sources]),
    }
    if avoid:
        inputs["avoid"] = artifact.fingerprint_of([[form, artifact.digest_of(path)] for form, path in avoid])
    return tokenizer, inputs


def _write(request: Request, chosen: _Chosen, tokenizer: Tokenizer, start: float) -> Manifest:
    """Pack the passages and commit the artifact; its seconds count from ``start``."""
    tokens, labels, offsets = pack(chosen.passages, tokenizer, request.settings["max_tokens"])
    arrays: Mapping[str, npt.NDArray[Any]] = dict(zip(FILES, (tokens, labels, offsets), strict=True))
    for name, values in arrays.items():
        with artifact.atomic_file(request.directory / name) as handle:
            np.save(handle, values, allow_pickle=False)
    info = {
        "items": len(chosen.passages),
        "tokens": len(tokens),
        "label_tokens": int(np.count_nonzero(labels != IGNORED)),
        "dropped_for_overlap": chosen.dropped,
    }
    cost = Cost(seconds=time.perf_counter() - start, tokens=len(tokens))
    return request.commit(info=info, cost=cost, files=list(FILES))

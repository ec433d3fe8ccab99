"""Corpora that were made apart, read as one: an artifact that holds no tokens, only where they are."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mates.engine.layout import Layout
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, Cost, Manifest, Request
from mates.preprocess.corpus import SPLITS

PARTS_NAME, PLACES_NAME = "parts.json", "places.json"  # what they are, which is the union's identity, and where


def take_tokenizer(directory: Path, source: Path) -> Manifest:
    """Copy a tokenizer artifact."""
    started, taken = time.perf_counter(), artifact.load(source, "tokenizer")
    request = Request(directory=directory, kind="tokenizer", settings=taken.settings, inputs={"tokenizer": taken.fingerprint})
    if done := request.find():
        return done
    directory.mkdir(parents=True, exist_ok=True)
    for name in taken.files:
        shutil.copyfile(source / name, directory / name)
    return request.commit(info=taken.info, cost=Cost(seconds=time.perf_counter() - started), files=taken.files)


def union_request(layout: Layout, split: str, sources: Sequence[Path]) -> Request:
    """The union of a split of the corpora of other data folders, in their order."""
    inputs = {f"part {number:04d}": part.fingerprint for number, part in enumerate(_parts(split, sources))}
    return Request(directory=layout.corpus(split), kind="corpus", settings={"union": len(sources)}, inputs=inputs)


def unite_corpora(layout: Layout, sources: Sequence[Path]) -> dict[str, Manifest]:
    """Write the unions of the train, pool and holdout corpora of other data folders.

    Args:
        layout: where they are written. sources: data folders (``data_dir`` of other recipes), each made with the same tokenizer.

    Raises:
        ArtifactError: a corpus is missing, or their tokenizers differ.
    """
    return {split: _unite(layout, split, sources) for split in SPLITS}


def _unite(layout: Layout, split: str, sources: Sequence[Path]) -> Manifest:
    started, request = time.perf_counter(), union_request(layout, split, sources)
    if done := request.find():
        return done
    parts = _parts(split, sources)
    tokenizers = [artifact.load(source / "tokenizer", "tokenizer").fingerprint for source in sources]
    for source, tokenizer in zip(sources, tokenizers, strict=True):
        if tokenizer != tokenizers[0]:
            raise ArtifactError(
                f"{source}: its tokenizer {tokenizer[:16]}… is not that of {sources[0]}, {tokenizers[0][:16]}…; corpora are read as one "
                "only where one tokenizer made them: set tokenizer.path of all their recipes to the same file"
            )
    request.directory.mkdir(parents=True, exist_ok=True)
    artifact.write_json(request.directory / PARTS_NAME, [part.fingerprint for part in parts])
    artifact.write_json(request.directory / PLACES_NAME, [str((source / "corpus" / split).resolve()) for source in sources])
    info: dict[str, Any] = {name: sum(part.info[name] for part in parts) for name in ("documents", "sequences", "tokens")}
    kept = {name: parts[0].info[name] for name in ("tokenizer", "dtype")}
    return request.commit(info=info | kept, cost=Cost(seconds=time.perf_counter() - started), identity=[PARTS_NAME])


def _parts(split: str, sources: Sequence[Path]) -> list[Manifest]:
    return [artifact.load(source / "corpus" / split, "corpus") for source in sources]


def part_directories(directory: Path, manifest: Manifest) -> list[Path]:
    """Where the tokens of a corpus are: in its own folder, or in those that it is the union of.

    Raises:
        ArtifactError: one of them is missing, or no longer what it was.
    """
    if PARTS_NAME not in manifest.files:
        return [directory]
    found = []
    expected, places = artifact.read_json(directory / PARTS_NAME), artifact.read_json(directory / PLACES_NAME)
    for fingerprint, place in zip(expected, map(Path, places), strict=True):
        part = artifact.load(place, "corpus")
        if part.fingerprint != fingerprint:
            raise ArtifactError(
                f"{place}: a corpus with the fingerprint {part.fingerprint[:16]}…, but {directory} is a union with {fingerprint[:16]}…; "
                f"bring that one back, or remove {directory} and run `mates preprocess` again"
            )
        found += part_directories(place, part)
    return found

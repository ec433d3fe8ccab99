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


SPLIT_SETTINGS = ("pool_share", "holdout_share", "split_seed")


def unite_corpora(layout: Layout, sources: Sequence[Layout]) -> dict[str, Manifest]:
    """Write the unions of the train, pool and holdout corpora of other data folders.

    Args:
        layout: where they are written. sources: data folders (``data_dir`` of other recipes), each made with the same tokenizer and split
            in the same way. Where a union of the same corpora is there already, only their places are noted anew.

    Raises:
        ArtifactError: a corpus is missing, given twice, or does not fit the others.
    """
    return {split: _unite(layout, split, sources) for split in SPLITS}


def _unite(layout: Layout, split: str, sources: Sequence[Layout]) -> Manifest:
    started, directory = time.perf_counter(), layout.corpus(split)
    folders = [source.corpus(split).resolve() for source in sources]
    parts = [artifact.load(folder, "corpus") for folder in folders]
    tokenizer = artifact.load(layout.tokenizer, "tokenizer").fingerprint
    for source, part in zip(sources, parts, strict=True):
        _check_part(source.data, part, sources[0].data, parts[0], tokenizer)
    leaves = [leaf for folder, part in zip(folders, parts, strict=True) for leaf in part_directories(folder, part)]
    for number, leaf in enumerate(leaves):
        if leaf in leaves[:number]:
            raise ArtifactError(f"{leaf}: this corpus is in corpus.union twice, and would be trained on twice; name it once")
    split_by = {name: parts[0].settings[name] for name in SPLIT_SETTINGS}
    inputs = {f"part {number:04d}": part.fingerprint for number, part in enumerate(parts)} | {"tokenizer": tokenizer}
    request = Request(directory=directory, kind="corpus", settings={"union": len(sources), **split_by}, inputs=inputs)
    done, places = request.find(), [str(folder) for folder in folders]
    if done and artifact.read_json(directory / PLACES_NAME) == places:
        return done
    directory.mkdir(parents=True, exist_ok=True)
    artifact.unmake(directory)
    artifact.write_json(directory / PARTS_NAME, [part.fingerprint for part in parts])
    artifact.write_json(directory / PLACES_NAME, places)
    info: dict[str, Any] = {name: sum(part.info[name] for part in parts) for name in ("documents", "sequences", "tokens")}
    kept = {name: parts[0].info[name] for name in ("tokenizer", "dtype")}
    cost = Cost(seconds=time.perf_counter() - started)
    return request.commit(info=info | kept, cost=cost, files=[PARTS_NAME, PLACES_NAME], identity=[PARTS_NAME])


def _check_part(source: Path, part: Manifest, first_source: Path, first: Manifest, tokenizer: str) -> None:
    """ArtifactError where a part's token ids mean something else than the first one's, or its documents were split in another way."""
    made_with = part.inputs["tokenizer"]
    if made_with != tokenizer:
        raise ArtifactError(
            f"{source}: its corpora were made with the tokenizer {made_with[:16]}…, the union's, that of {first_source}, is "
            f"{tokenizer[:16]}…; set tokenizer.path of all their recipes to the same file, and make the corpora anew"
        )
    for name in SPLIT_SETTINGS:
        if part.settings[name] != first.settings[name]:
            raise ArtifactError(
                f"{source}: corpus.{name} is {part.settings[name]}, in {first_source} it is {first.settings[name]}; with different splits "
                "a document that is held out of one may be trained on in the other. Make the corpora with the same one"
            )


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
        try:
            part = artifact.load(place, "corpus")
        except ArtifactError as error:
            raise ArtifactError(
                f"{directory}: a union of corpora, one of which was at {place}: {error}\nIf it is elsewhere now, name its data folder in "
                "corpus.union and run `mates preprocess` again"
            ) from error
        if part.fingerprint != fingerprint:
            raise ArtifactError(
                f"{place}: a corpus with the fingerprint {part.fingerprint[:16]}…, but {directory} is a union with {fingerprint[:16]}…; "
                f"bring that one back, or remove {directory} and run `mates preprocess` again"
            )
        found += part_directories(place, part)
    return found

"""Explaining and verifying any artifact."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mates.engine.data.corpus import open_corpus
from mates.engine.data.index import INDEX_FILE, load_array
from mates.engine.influence.score import open_scores
from mates.engine.pretrain.checkpoint import read_losses
from mates.engine.probe.stage import read_labels
from mates.engine.reference.task import open_reference
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, Manifest
from mates.preprocess.tokenizer import open_tokenizer

ABOUT = {
    "sample-corpus": "English documents of this installation as C4-schema shards, and a last-word reference task",
    "tokenizer": "the language model's tokenizer",
    "corpus": "tokenized documents as a memory-mapped .bin/.idx pair (Megatron's layout)",
    "reference": "a reference task as packed tokens with labels",
    "checkpoint": "a stage's model: DeepSpeed's folder, hf/ export, state/ with fp32 weights and moments by name",
    "partial checkpoint": "a checkpoint inside a stage, to resume from",
    "labels": "oracle influences of probed samples, in nats; negative helps",
    "influence model": "predicts influence from a sample's tokens, in label standard deviations",
    "scores": "scores of a stage's candidates: an influence model's, in label standard deviations, or a baseline's in its own unit",
    "selection index": "sample ids a stage trains on, in training order",
    "evaluation": "held-out measurements of a checkpoint after its decay branch",
}


def artifacts_below(path: Path) -> list[Path]:
    """Folders of all artifacts at or below a path. ArtifactError where there is none."""
    if path.is_file():
        path = path.parent
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such file or folder")
    found = [manifest.parent for manifest in sorted(path.rglob(artifact.MANIFEST_NAME))]
    if not found:
        raise ArtifactError(f"{path}: no artifact at or below this folder (no {artifact.MANIFEST_NAME})")
    return found


def describe(directory: Path, *, verify: bool = True) -> Iterator[str]:
    """Lines about one artifact, after its contents were opened and, with ``verify``, every file was hashed against its manifest.

    Raises:
        ArtifactError: damaged.
    """
    try:
        yield from _lines(directory, verify)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{directory / artifact.MANIFEST_NAME}: lacks what a manifest of its kind says ({error!r})") from error


def _lines(directory: Path, verify: bool) -> Iterator[str]:
    manifest = artifact.verify(directory) if verify else artifact.load(directory)
    yield f"{directory}: {manifest.kind} — {ABOUT.get(manifest.kind, 'of an unknown kind')}"
    yield f"  fingerprint  {manifest.fingerprint}"
    size = sum(record.bytes for record in manifest.files.values())
    yield f"  files        {len(manifest.files)}, {size:,} bytes, {'all BLAKE3 verified' if verify else 'sizes checked'}"
    for name, value in manifest.inputs.items():
        yield f"  from         {name} {value[:16]}…"
    yield from (f"  setting      {line}" for line in _flat(manifest.settings))
    yield from (f"  found        {line}" for line in _flat(manifest.info))
    cost = manifest.cost
    yield f"  cost         {cost.flops:.3e} FLOPs, {cost.seconds:.1f} s, {cost.tokens:,} tokens"
    yield from (f"  contents     {line}" for line in _contents(directory, manifest))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping) and len(value) <= 12:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            text = json.dumps(value, ensure_ascii=False)
            yield f"{prefix}{key} = {text if len(text) <= 100 else text[:97] + '...'}"


def _contents(directory: Path, manifest: Manifest) -> Iterator[str]:
    if manifest.kind == "corpus":
        corpus = open_corpus(directory, 1)
        lengths = np.concatenate([indexed.lengths for _, indexed in corpus.parts])
        spread = f"{int(lengths.min())} to {int(lengths.max()):,} tokens, median {np.median(lengths):.0f}"
        documents = sum(indexed.documents for _, indexed in corpus.parts)
        of = f", a union of {len(corpus.parts)} corpora" if len(corpus.parts) > 1 else ""
        yield f"{documents:,} documents, {len(lengths):,} with tokens: {spread}; {corpus.dtype}{of}"
    elif manifest.kind == "tokenizer":
        tokenizer, _ = open_tokenizer(directory)
        text = "The quick brown fox"
        yield f"{text!r} → {tokenizer.encode_batch([text])[0].tolist()}"
    elif manifest.kind == "reference":
        reference = open_reference(directory)
        yield f"{reference.items} items, {np.diff(reference.offsets).mean():.1f} tokens each"
    elif manifest.kind == "labels":
        for name in manifest.info["references"]:
            _, values, _ = read_labels(directory, {name: 1.0})
            quartiles = ", ".join(f"{value:+.2e}" for value in np.percentile(values, [25, 50, 75]))
            yield f"{name}: {len(values)} influences, quartiles {quartiles} nats"
    elif manifest.kind == "scores":
        scores = open_scores(directory, manifest.inputs["corpus"])
        first = scores.read(0, min(scores.samples, 1 << 20))
        yield f"{scores.samples:,} candidates x {first.shape[1]} references; of the first {len(first):,} all finite"
    elif manifest.kind == "selection index":
        ids = load_array(directory / INDEX_FILE, np.dtype(np.int64), 1)
        yield f"{len(ids):,} sample ids, first {ids[:5].tolist()}; {len(np.unique(ids)):,} different"
    elif manifest.kind in ("checkpoint", "partial checkpoint"):
        losses = read_losses(directory)
        yield (f"loss of the stage's {len(losses)} steps: {losses[0]:.4f} → {losses[-1]:.4f} nats" if len(losses) else "no steps yet")

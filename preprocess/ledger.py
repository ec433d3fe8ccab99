"""What became of every document of the inputs: documents in = written + dropped, by reason, for every file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mates.preprocess import artifact
from mates.preprocess.inputs import InputError, InputFile
from mates.preprocess.parts import Part, PartRecord

REJECTS_NAME = "rejects.jsonl"


def _by_file(parts: Sequence[Part], records: Sequence[PartRecord]) -> Iterator[tuple[InputFile, Sequence[PartRecord]]]:
    start = 0
    while start < len(parts):
        part = parts[start]
        yield part.file, records[start : start + part.of]
        start += part.of


def make_ledgers(parts: Sequence[Part], records: Sequence[PartRecord]) -> list[dict[str, Any]]:
    """The ledger of each input file, for the manifest.

    Args:
        parts: all parts of all files, in order. records: what became of each.
    """
    return [_ledger(file, own) for file, own in _by_file(parts, records)]


def _ledger(file: InputFile, records: Sequence[PartRecord]) -> dict[str, Any]:
    written = {split: sum(record.splits[split].documents for record in records) for split in records[0].splits}
    dropped: Counter[str] = sum((Counter(record.dropped) for record in records), Counter())
    documents = sum(record.documents for record in records)
    assert documents == sum(written.values()) + dropped.total(), "the ledger must balance"
    hashes = [record.input_digest for record in records]
    return {
        "path": file.name,
        "bytes": file.bytes,
        "blake3": hashes[0] if len(hashes) == 1 else hashes,
        "documents": documents,
        "written": written,
        "dropped": dict(dropped),
        "damage": "; ".join(record.damage for record in records if record.damage) or None,
    }


def write_rejects(path: Path, parts: Sequence[Part], records: Sequence[PartRecord]) -> None:
    """Keep the first examples of what was dropped, a JSON object a line: path, line, reason, excerpt."""
    rows: list[dict[str, Any]] = []
    for file, own in _by_file(parts, records):
        before = 0
        for record in own:
            rows += [_reject(file, before + item["line"], item["reason"], item["excerpt"]) for item in record.rejects]
            before += record.lines
            if record.damage:
                rows.append(_reject(file, before, "damaged file", record.damage))
    if not rows:
        path.unlink(missing_ok=True)
        return
    with artifact.atomic_file(path) as handle:
        handle.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def _reject(file: InputFile, line: int, reason: str, excerpt: str) -> dict[str, Any]:
    return {"path": file.name, "line": line, "reason": reason, "excerpt": excerpt}


def refuse_empty(splits: Iterable[str], inputs: Sequence[InputFile], records: Sequence[PartRecord]) -> None:
    """Raise InputError where a corpus would hold no token."""
    for split in splits:
        if any(record.splits[split].tokens for record in records):
            continue
        found = sum(record.documents for record in records)
        dropped: Counter[str] = sum((Counter(record.dropped) for record in records), Counter())
        share = f"a larger corpus.{split}_share" if split != "train" else "smaller corpus.pool_share and corpus.holdout_share"
        if 2 * dropped["no text field"] > found:
            share = "the name of the text's field in corpus.text_field"
        raise InputError(
            f"no document for the {split} corpus: {len(inputs)} files from {inputs[0].name} on hold {found} documents, "
            f"dropped {dict(dropped)}. Give more documents, or {share}"
        )

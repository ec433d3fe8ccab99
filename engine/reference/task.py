"""Last-word prediction tasks (LAMBADA's form) as packed tokens with labels.

Passages go to the train half (the reference that probes measure) or the test half (held out for evaluation) by a hash of their text,
or by their own ``split`` field where they have one. Test passages that share a 13-gram with the reference are dropped.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mates.engine.data.index import load_array
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, Cost, Manifest
from mates.preprocess.readers import InputError
from mates.preprocess.tokenizer import Tokenizer, open_tokenizer

Half = Literal["train", "test"]
IGNORED = -100  # label of positions that carry no loss, PyTorch's default ignore_index
OVERLAP = 13  # words; GPT-3's contamination rule
WORDS = re.compile(r"\w+")


@dataclass(frozen=True)
class Passage:
    """One item: predict ``target`` after ``context``."""

    context: str
    target: str
    half: Half

    @property
    def text(self) -> str:
        """The whole passage."""
        return self.context + self.target


@dataclass(frozen=True)
class Reference:
    """Items packed end to end.

    ``tokens`` [N] int32 are model inputs; ``labels`` [N] int32 the next token where it belongs to the target, else −100;
    item i is positions offsets[i] … offsets[i + 1] of both. ``offsets`` is [items + 1] int64.
    """

    name: str
    manifest: Manifest
    tokens: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]

    @property
    def items(self) -> int:
        """Number of items."""
        return len(self.offsets) - 1


def read_passages(path: Path, seed: int) -> list[Passage]:
    """Read a JSON-lines file of passages; its last word is the target.

    Raises:
        InputError: no such file, a line that is not an object with a ``text``, or a passage of one word.
    """
    if not path.is_file():
        raise InputError(f"reference.source: {path}: no such file")
    passages, seen = [], set()
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):  # str.splitlines would also split at U+2028 inside a text
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = row["text"].strip()
            text.encode()  # a lone surrogate could not be hashed or tokenized
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            found = line[:80].decode(errors="replace")
            raise InputError(f"{path}:{number}: expected a JSON object with a 'text' of words, found {found!r}") from error
        context, _, word = text.rpartition(" ")
        if not context.strip():
            raise InputError(f"{path}:{number}: a passage needs at least two words, found {text!r}")
        if text not in seen:
            seen.add(text)
            passages.append(Passage(context, " " + word, _half_of(row.get("split"), text, seed, path, number)))
    return passages


def _half_of(split: object, text: str, seed: int, path: Path, number: int) -> Half:
    if split == "train" or split == "test":
        return split
    if split is not None:
        raise InputError(f"{path}:{number}: split {split!r}, expected 'train' or 'test' (or none)")
    return "train" if _hash(text, seed, b"mates-half") & 1 else "test"


def _hash(text: str, seed: int, person: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=seed.to_bytes(8, "little"), person=person).digest(), "little")


def choose(passages: list[Passage], half: Half, items: int, seed: int) -> list[Passage]:
    """``items`` passages of one half in a keyed order (all of them where there are fewer)."""
    own = [passage for passage in passages if passage.half == half]
    return sorted(own, key=lambda passage: (_hash(passage.text, seed, b"mates-order"), passage.text))[:items]


def ngrams(text: str, n: int = OVERLAP) -> Iterator[tuple[str, ...]]:
    """Runs of ``n`` lower-cased words of a text."""
    words = WORDS.findall(text.lower())
    return (tuple(words[start : start + n]) for start in range(len(words) - n + 1))


def drop_overlapping(held_out: list[Passage], reference: list[Passage]) -> tuple[list[Passage], int]:
    """Held-out passages that share no 13-gram with the reference, and how many were dropped."""
    known = {gram for passage in reference for gram in ngrams(passage.text)}
    kept = [passage for passage in held_out if not any(gram in known for gram in ngrams(passage.text))]
    return kept, len(held_out) - len(kept)


def pack(
    passages: list[Passage], tokenizer: Tokenizer, max_tokens: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Tokens, labels and offsets (see :class:`Reference`). Contexts longer than ``max_tokens`` lose their beginning.

    The target's tokens are those of the whole passage beyond the tokens of its context, as lm_eval counts them: white space at the
    context's end belongs to the target.
    """
    contexts = tokenizer.encode_batch([passage.context.rstrip() for passage in passages])
    wholes = tokenizer.encode_batch([passage.text for passage in passages])
    tokens, labels = [], []
    for context, whole in zip(contexts, wholes, strict=True):
        first = min(len(context), len(whole) - 1)  # where tokens merge across the boundary the last one is still predicted
        first = max(first, 1)
        is_target = np.arange(1, len(whole)) >= first
        tokens.append(whole[:-1][-max_tokens:])
        labels.append(np.where(is_target, whole[1:], IGNORED)[-max_tokens:])
    lengths = [len(item) for item in tokens]
    return (
        np.concatenate(tokens).astype(np.int32),
        np.concatenate(labels).astype(np.int32),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def make_reference(
    directory: Path,
    *,
    sources: list[Path],
    name: str,
    items: dict[Half, int],
    tokenizer_dir: Path,
    max_tokens: int,
    seed: int,
) -> dict[Half, Manifest]:
    """Write the reference artifacts ``directory``/train and ``directory``/test.

    Raises:
        InputError: too few passages, or a bad line. ArtifactMismatchError: others stand there.
    """
    tokenizer, tokenizer_manifest = open_tokenizer(tokenizer_dir)
    for source in sources:
        if not source.is_file():
            raise InputError(f"reference.source: {source}: no such file")
    hashes = artifact.fingerprint_of([artifact.digest_of(source) for source in sources])
    inputs = {"tokenizer": tokenizer_manifest.fingerprint, "source": hashes}
    settings = {
        "name": name,
        "items": items["train"],
        "test_items": items["test"],
        "max_tokens": max_tokens,
        "seed": seed,
    }
    halves: tuple[Half, Half] = ("train", "test")
    found = {
        half: artifact.find_complete(directory / half, kind="reference", settings=settings | {"half": half}, inputs=inputs)
        for half in halves
    }
    complete = {half: manifest for half, manifest in found.items() if manifest}
    if len(complete) == 2:
        return complete
    start = time.perf_counter()
    for half in complete:
        artifact.unmake(directory / half)
    unique: dict[str, Passage] = {}
    for passage in (passage for source in sources for passage in read_passages(source, seed)):
        unique.setdefault(passage.text, passage)  # sources may share passages
    passages = list(unique.values())
    reference = choose(passages, "train", items["train"], seed)
    if len(reference) < items["train"]:
        raise InputError(f"{sources[0]}: {len(reference)} passages in the train half, reference.items asks for {items['train']}")
    held_out, overlapping = drop_overlapping([passage for passage in passages if passage.half == "test"], reference)
    test = choose(held_out, "test", items["test"], seed)
    if len(test) < 2:
        raise InputError(f"{sources[0]}: {len(test)} passages left in the test half, at least 2 are needed")
    result: dict[Half, Manifest] = {}
    chosen_of: dict[Half, list[Passage]] = {"train": reference, "test": test}
    for half, chosen in chosen_of.items():
        tokens, labels, offsets = pack(chosen, tokenizer, max_tokens)
        arrays: dict[str, npt.NDArray[Any]] = {"tokens": tokens, "labels": labels, "offsets": offsets}
        for array_name, values in arrays.items():
            with artifact.atomic_file(directory / half / f"{array_name}.npy") as handle:
                np.save(handle, values, allow_pickle=False)
        info: dict[str, Any] = {
            "items": len(chosen),
            "tokens": len(tokens),
            "label_tokens": int(np.count_nonzero(labels != IGNORED)),
            "dropped_for_overlap": overlapping if half == "test" else 0,
        }
        result[half] = artifact.commit(
            directory / half,
            kind="reference",
            settings=settings | {"half": half},
            inputs=inputs,
            info=info,
            cost=Cost(seconds=time.perf_counter() - start, tokens=info["tokens"]),
            files=["tokens.npy", "labels.npy", "offsets.npy"],
        )
        start = time.perf_counter()
    return result


def open_reference(directory: Path) -> Reference:
    """Open a reference artifact. ArtifactError where its arrays contradict each other."""
    manifest = artifact.load(directory, "reference")
    tokens = load_array(directory / "tokens.npy", np.dtype(np.int32), 1)
    labels = load_array(directory / "labels.npy", np.dtype(np.int32), 1)
    offsets = load_array(directory / "offsets.npy", np.dtype(np.int64), 1)
    rising = len(offsets) >= 2 and offsets[0] == 0 and not bool((np.diff(offsets) < 0).any())
    if len(tokens) != len(labels) or not rising or offsets[-1] != len(tokens):
        raise ArtifactError(
            f"{directory}: {len(tokens)} tokens, {len(labels)} labels and offsets {offsets[:1].tolist()} to {offsets[-1:].tolist()} "
            "do not belong together"
        )
    return Reference(manifest.settings["name"], manifest, tokens, labels, offsets)

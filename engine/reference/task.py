"""A reference task: passages with a target, and the packed tokens and labels that they become.

Passages of the main task go to the train half (the reference that probes measure) or the test half (held out for evaluation) by a hash
of their text, or by their own ``split`` field where they have one. Test passages that share a 13-gram with the reference are dropped.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from mates.engine.config import Recipe
from mates.engine.data.index import load_array
from mates.engine.layout import layout_of
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, Manifest
from mates.preprocess.tokenizer import Tokenizer

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

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Items, tokens and labels."""
        return self.items, len(self.tokens), int(np.count_nonzero(self.labels != IGNORED))

    def over_passages(self) -> Reference:
        """The same with every token but an item's first to be predicted."""
        labels, last = np.append(self.tokens[1:], self.tokens[:1]), self.offsets[1:] - 1
        labels[last] = self.labels[last]  # the target's last token is no input
        return replace(self, labels=labels)


def half_of(text: str, seed: int) -> Half:
    """The half that a text belongs to, by its keyed hash."""
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


def reference_folders(recipe: Recipe) -> list[Path]:
    """Folders of the references that a recipe probes on, the main one first."""
    layout = layout_of(recipe)
    return [layout.reference("train"), *(layout.further_reference(task.name) for task in recipe.reference.more)]


def open_references(recipe: Recipe) -> list[Reference]:
    """The references that a recipe probes on, in the order of :func:`reference_folders`, with labels where it measures the loss."""
    found = [open_reference(folder) for folder in reference_folders(recipe)]
    spans = [recipe.reference.loss_over, *(task.loss_over for task in recipe.reference.more)]
    return [one.over_passages() if span == "passage" else one for one, span in zip(found, spans, strict=True)]


def reference_weights(recipe: Recipe) -> list[float]:
    """Weights of the references in the same order, as the recipe says them: their sum is above 0, not 1."""
    return [recipe.reference.weight, *(task.weight for task in recipe.reference.more)]

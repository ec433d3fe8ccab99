"""A reference as padded batches for a model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from mates.engine.reference.task import IGNORED, Reference


@dataclass(frozen=True)
class LabelBatch:
    """``tokens`` [B, T] int64 padded on the right; ``positions`` [P] flat positions of labels; ``targets`` [P]; ``items`` [P], the
    reference item of each label."""

    tokens: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    items: torch.Tensor


def label_batches(
    reference: Reference, *, batch_tokens: int, device: torch.device, items: npt.NDArray[np.int64] | None = None
) -> list[LabelBatch]:
    """Batches of similar length under a budget of padded tokens (one item at least); the division depends on nothing else.

    Args:
        reference: what is batched. batch_tokens: the budget. device: where the batches go.
        items: numbers of the items that are wanted; all by default.
    """
    lengths = np.diff(reference.offsets)
    wanted = np.arange(len(lengths)) if items is None else np.sort(items)
    order = wanted[np.lexsort((wanted, lengths[wanted]))]
    batches, current = [], []  # type: tuple[list[LabelBatch], list[int]]
    for item in order:
        if current and (len(current) + 1) * int(lengths[item]) > batch_tokens:
            batches.append(_batch(reference, current, device))
            current = []
        current.append(int(item))
    batches.append(_batch(reference, current, device))
    return batches


def _batch(reference: Reference, items: list[int], device: torch.device) -> LabelBatch:
    spans = [(int(reference.offsets[item]), int(reference.offsets[item + 1])) for item in items]
    width = max(stop - start for start, stop in spans)
    tokens = np.zeros((len(items), width), np.int64)
    labels = np.full((len(items), width), IGNORED, np.int64)
    for row, (start, stop) in enumerate(spans):
        tokens[row, : stop - start] = reference.tokens[start:stop]
        labels[row, : stop - start] = reference.labels[start:stop]
    positions = np.flatnonzero(labels.ravel() != IGNORED)
    return LabelBatch(
        torch.from_numpy(tokens).to(device),
        torch.from_numpy(positions).to(device),
        torch.from_numpy(labels.ravel()[positions]).to(device),
        torch.from_numpy(np.asarray(items)[positions // width]).to(device),
    )

"""What an encoder reads of a sample: fixed-size chunks of token ids with a mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from mates.engine.config import FitConfig
from mates.engine.data.corpus import Corpus
from mates.engine.influence.model import Samples
from mates.preprocess.tokenizer import Tokenizer, encoding_hash, vocabulary_difference, without_additions

TokenIds = npt.NDArray[np.integer[Any]]
Source = Literal["stored", "ids", "text"]
SOURCES: dict[Source, str] = {
    "stored": "the tokens that preprocessing wrote for it",
    "ids": "the corpus' token ids as they are",
    "text": "samples decoded and tokenized again; corpus.scorer_tokenizer would write its tokens once",
}


@dataclass(frozen=True)
class EncoderBatch:
    """Chunks of a batch of samples: ``ids`` [C, T] int64 and ``mask`` [C, T] bool; ``sample`` [C] says which sample (0 … B − 1) a
    chunk belongs to. A sample's chunks lie side by side. ``extra`` [B, F] fp32 are features beside the text."""

    ids: torch.Tensor
    mask: torch.Tensor
    sample: torch.Tensor
    samples: int
    extra: torch.Tensor | None = None

    def to(self, device: torch.device) -> EncoderBatch:
        """The batch on a device."""
        extra = None if self.extra is None else self.extra.to(device)
        return EncoderBatch(self.ids.to(device), self.mask.to(device), self.sample.to(device), self.samples, extra)


class EncoderInputs(Protocol):
    """Turns samples into encoder chunks."""

    vocab_size: int
    pad: int
    """Id that fills chunks up."""

    def source(self, corpus: Corpus) -> Source:
        """Where the tokens of a corpus' samples come from."""

    def sequences(self, samples: Samples) -> list[TokenIds]:
        """What the encoder reads of each of some samples: token ids of its own vocabulary, as many as it reads at most."""


def chunk(sequences: Sequence[TokenIds], chunk_tokens: int, pad: int) -> EncoderBatch:
    """Cut sequences into chunks of at most ``chunk_tokens``."""
    pieces, owners = [], []
    for number, sequence in enumerate(sequences):
        for start in range(0, max(1, len(sequence)), chunk_tokens):
            pieces.append(sequence[start : start + chunk_tokens])
            owners.append(number)
    width = max(1, max(len(piece) for piece in pieces))
    ids = np.full((len(pieces), width), pad, np.int64)
    mask = np.zeros((len(pieces), width), bool)
    for row, piece in enumerate(pieces):
        ids[row, : len(piece)] = piece
        mask[row, : len(piece)] = True
    return EncoderBatch(torch.from_numpy(ids), torch.from_numpy(mask), torch.tensor(owners), len(sequences))


def groups(sequences: Sequence[TokenIds], chunk_tokens: int, budget: int) -> Iterator[npt.NDArray[np.int64]]:
    """Rows of sequences that are read together: of like lengths, so that hardly anything is padded, the longest first.

    Args:
        sequences: token ids. chunk_tokens: of a chunk at most.
        budget: tokens of a group, padding included; a single sequence may have more.
    """
    lengths = np.array([max(1, len(sequence)) for sequence in sequences])
    order, chunks = np.argsort(-lengths, kind="stable"), -(-lengths // chunk_tokens)
    start = 0
    while start < len(order):
        width = min(lengths[order[start]], chunk_tokens)
        held = np.cumsum(chunks[order[start:]]) * width
        stop = start + max(1, int(np.searchsorted(held, budget, side="right")))
        yield order[start:stop]
        start = stop


class CorpusIds:
    """For an encoder whose vocabulary is the language model's: it reads the corpus as it is."""

    pad = 0

    def __init__(self, config: FitConfig, vocab_size: int) -> None:
        self._limit = config.chunk_tokens * config.max_chunks
        self.vocab_size = vocab_size

    def source(self, corpus: Corpus) -> Source:
        """See :class:`EncoderInputs`."""
        return "ids"

    def sequences(self, samples: Samples) -> list[TokenIds]:
        """See :class:`EncoderInputs`."""
        return list(samples.windows[:, : self._limit])


class OwnTokens:
    """For an encoder with a tokenizer of its own. What it reads of a sample comes from the first of these that can be had:

    - the tokens that preprocessing wrote for it (``corpus.scorer_tokenizer``);
    - the corpus' ids, where both vocabularies name the same tokens by them (ModernBERT's descends from GPT-NeoX's);
    - the sample's text, decoded and tokenized again.

    The special tokens that the encoder was pretrained with stand around the whole sample, and between documents of shared ids.
    """

    def __init__(self, config: FitConfig, tokenizer: Tokenizer, encoder: str | Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = tokenizer
        self._encoder_tokenizer: Any = AutoTokenizer.from_pretrained(encoder)
        self.vocab_size = len(self._encoder_tokenizer)
        self.pad: int = self._encoder_tokenizer.pad_token_id or 0
        self._before, self._after = _around(self._encoder_tokenizer)
        self._limit = config.chunk_tokens * config.max_chunks - len(self._before) - len(self._after)
        library = without_additions(self._encoder_tokenizer.backend_tokenizer)
        self._hash = encoding_hash(library)
        self._shares_ids = not vocabulary_difference(tokenizer, library).text

    def source(self, corpus: Corpus) -> Source:
        """Where the tokens of a corpus' samples come from."""
        if corpus.has_scorer_tokens and corpus.scorer_hash == self._hash:
            return "stored"
        return "ids" if self._shares_ids else "text"

    def sequences(self, samples: Samples) -> list[TokenIds]:
        """See :class:`EncoderInputs`."""
        return [self.framed(ids) for ids in self._inner(samples)]

    def framed(self, ids: TokenIds) -> TokenIds:
        """Tokens [n] of a text, as many as are read, with the special tokens around them."""
        framed: TokenIds = np.concatenate([self._before, ids[: self._limit], self._after])
        return framed

    def _inner(self, samples: Samples) -> Sequence[TokenIds]:
        source = self.source(samples.corpus)
        if source == "stored":
            return samples.corpus.scorer_tokens(samples.ids, self._limit)
        if source == "ids":
            ids = samples.windows[:, : self._limit].astype(np.int64)
            ids[ids == self._tokenizer.end_of_document] = self._after[0] if len(self._after) else self.pad
            return list(ids)
        texts = [self._tokenizer.decode(window.tolist()) for window in samples.windows]
        encoded = self._encoder_tokenizer(texts, truncation=True, max_length=self._limit, add_special_tokens=False)["input_ids"]
        return [np.asarray(ids, np.int64) for ids in encoded]

    def save(self, directory: Path) -> None:
        """Keep the tokenizer with the model."""
        self._encoder_tokenizer.save_pretrained(directory)


def _around(tokenizer: Any) -> tuple[TokenIds, TokenIds]:
    """Special tokens that an encoder's tokenizer puts before and after a text."""
    bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    start = next(start for start in range(len(whole)) if whole[start : start + len(bare)] == bare)
    return np.asarray(whole[:start], np.int64), np.asarray(whole[start + len(bare) :], np.int64)

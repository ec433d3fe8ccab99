"""What an encoder reads of a sample: fixed-size chunks of token ids with a mask."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from mates.engine.config import FitConfig
from mates.preprocess.tokenizer import Tokenizer


@dataclass(frozen=True)
class EncoderBatch:
    """Chunks of a batch of samples: ``ids`` [C, T] int64 and ``mask`` [C, T] bool; ``sample`` [C] says which sample (0 … B − 1) a
    chunk belongs to. A sample's chunks lie side by side."""

    ids: torch.Tensor
    mask: torch.Tensor
    sample: torch.Tensor
    samples: int

    def to(self, device: torch.device) -> EncoderBatch:
        """The batch on a device."""
        return EncoderBatch(self.ids.to(device), self.mask.to(device), self.sample.to(device), self.samples)


class EncoderInputs(Protocol):
    """Turns samples into encoder chunks."""

    vocab_size: int

    def batch(self, windows: npt.NDArray[np.int64]) -> EncoderBatch:
        """Chunks of samples [B, L]."""


def chunk(sequences: list[npt.NDArray[np.int64]], chunk_tokens: int, max_chunks: int, pad: int) -> EncoderBatch:
    """Cut sequences into chunks of at most ``chunk_tokens``; what lies beyond ``max_chunks`` is not read."""
    pieces, owners = [], []
    for number, sequence in enumerate(sequences):
        for start in range(0, max(1, min(len(sequence), chunk_tokens * max_chunks)), chunk_tokens):
            pieces.append(sequence[start : min(start + chunk_tokens, chunk_tokens * max_chunks)])
            owners.append(number)
    width = max(1, max(len(piece) for piece in pieces))
    ids = np.full((len(pieces), width), pad, np.int64)
    mask = np.zeros((len(pieces), width), bool)
    for row, piece in enumerate(pieces):
        ids[row, : len(piece)] = piece
        mask[row, : len(piece)] = True
    return EncoderBatch(torch.from_numpy(ids), torch.from_numpy(mask), torch.tensor(owners), len(sequences))


class CorpusIds:
    """For an encoder whose vocabulary is the language model's: it reads the corpus as it is."""

    def __init__(self, config: FitConfig, vocab_size: int) -> None:
        self._config = config
        self.vocab_size = vocab_size

    def batch(self, windows: npt.NDArray[np.int64]) -> EncoderBatch:
        """See :class:`EncoderInputs`."""
        return chunk(list(windows), self._config.chunk_tokens, self._config.max_chunks, pad=0)


class Retokenized:
    """For an encoder with a tokenizer of its own: a sample's text is decoded, and tokenized again."""

    def __init__(self, config: FitConfig, tokenizer: Tokenizer, encoder: str | Path) -> None:
        from transformers import AutoTokenizer

        self._config, self._tokenizer = config, tokenizer
        self._encoder_tokenizer: Any = AutoTokenizer.from_pretrained(encoder)
        self.vocab_size = len(self._encoder_tokenizer)

    def batch(self, windows: npt.NDArray[np.int64]) -> EncoderBatch:
        """See :class:`EncoderInputs`. The special tokens that the encoder was pretrained with stand around the whole sample."""
        texts = [self._tokenizer.decode(window.tolist()) for window in windows]
        limit = self._config.chunk_tokens * self._config.max_chunks
        encoded = self._encoder_tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
        pad = self._encoder_tokenizer.pad_token_id or 0
        return chunk([np.asarray(ids, np.int64) for ids in encoded], self._config.chunk_tokens, self._config.max_chunks, pad)

    def save(self, directory: Path) -> None:
        """Keep the tokenizer with the model."""
        self._encoder_tokenizer.save_pretrained(directory)

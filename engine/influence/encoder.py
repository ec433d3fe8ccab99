"""The encoder influence model: token vectors averaged over a sample's chunks, then a linear regression head.

As in MATES (arXiv 2406.06046, section 3.2): a BERT reads a sample in chunks of 512 tokens, and the mean of all token vectors is
mapped to the standardised influence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mates.engine.config import FitConfig, Recipe, ScoreConfig, require
from mates.engine.flops import EncoderShape, shape_of
from mates.engine.influence.features import NO_FEATURES, ExtraFeatures
from mates.engine.influence.inputs import CorpusIds, EncoderBatch, EncoderInputs, OwnTokens, TokenIds, chunk, groups
from mates.engine.influence.model import Samples, Scores
from mates.preprocess import artifact
from mates.preprocess.tokenizer import Tokenizer

HEAD_FILE = "head.safetensors"
BLOCK = 4096
BATCH_TOKENS = {False: 4_096, True: 32_768}  # on a CPU, on a GPU


class InfluenceEncoder(nn.Module):
    """An encoder with a mean-pooling regression head, which also sees a sample's extra features where there are any.

    The head works in fp32 whatever the encoder's arithmetic.
    """

    def __init__(self, encoder: nn.Module, outputs: int = 1, extra: int = 0) -> None:
        """Take an encoder, and the numbers of reference tasks R and of extra features F."""
        super().__init__()
        self.encoder, self.extra = encoder, extra
        width: int = encoder.config.hidden_size  # type: ignore[union-attr,assignment]
        self.head = nn.Linear(width + extra, outputs)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: EncoderBatch) -> torch.Tensor:
        """Predicted influences in label standard deviations: [B, R] fp32."""
        hidden = self.encoder(input_ids=batch.ids, attention_mask=batch.mask.long()).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            return self._predict(hidden.float(), batch)

    def _predict(self, hidden: torch.Tensor, batch: EncoderBatch) -> torch.Tensor:
        mask = batch.mask[..., None].float()
        width = hidden.shape[-1]
        sums = hidden.new_zeros(batch.samples, width).index_add_(0, batch.sample, (hidden * mask).sum(1))
        counts = hidden.new_zeros(batch.samples, 1).index_add_(0, batch.sample, mask.sum(1))
        pooled = sums / counts.clamp(min=1.0)
        if batch.extra is not None:
            pooled = torch.cat([pooled, batch.extra], dim=1)
        return nn.functional.linear(pooled, self.head.weight.float(), self.head.bias.float())

    def shape(self) -> EncoderShape:
        """For FLOPs."""
        return shape_of(self.encoder.config.to_dict())  # type: ignore[union-attr,operator]

    def save(self, directory: Path) -> None:
        """Write a Hugging Face folder, and the head beside it."""
        self.encoder.save_pretrained(directory)  # type: ignore[operator]
        save_file({name: value.contiguous() for name, value in self.head.state_dict().items()}, directory / HEAD_FILE)


@dataclass(frozen=True)
class EncoderModel:
    """An encoder, what it reads and where it runs: an :class:`InfluenceModel`."""

    module: InfluenceEncoder
    reader: EncoderInputs
    fit: FitConfig
    score: ScoreConfig
    device: torch.device
    extra: ExtraFeatures = NO_FEATURES

    def prepare(self, samples: Samples) -> Callable[[], Scores]:
        """See :class:`Scorer`. What is read together depends on the samples alone, in blocks of 4,096."""
        batches = list(self._batches(samples))
        return lambda: self._predict(len(samples), batches)

    def _batches(self, samples: Samples) -> Iterator[tuple[npt.NDArray[np.int64], EncoderBatch]]:
        """Rows of samples that are read together, and what is read."""
        budget = self.score.batch_tokens or BATCH_TOKENS[self.device.type == "cuda"]
        for start in range(0, len(samples), BLOCK):
            block = samples[start : start + BLOCK]
            sequences, extra = self.reader.sequences(block), self.extra.compute(block)
            for rows in groups(sequences, self.fit.chunk_tokens, budget):
                yield start + rows, self.batch([sequences[row] for row in rows], extra[rows])

    def _predict(self, samples: int, batches: Iterable[tuple[npt.NDArray[np.int64], EncoderBatch]]) -> Scores:
        scores = np.empty((samples, self.module.head.out_features), np.float32)
        autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.score.precision == "bf16")
        with torch.no_grad(), autocast:
            for rows, batch in batches:
                scores[rows] = self.module(batch.to(self.device)).float().cpu().numpy()
        return scores

    def batch(self, sequences: Sequence[TokenIds], extra: npt.NDArray[np.float32]) -> EncoderBatch:
        """Sequences and extra features [B, F] for the module, in the host's memory."""
        batch = chunk(sequences, self.fit.chunk_tokens, self.reader.pad)
        return replace(batch, extra=torch.from_numpy(extra) if extra.shape[1] else None)

    def forward_flops(self, samples: int, length: int) -> float:
        """See :class:`Scorer`."""
        read = min(length, self.fit.chunk_tokens * self.fit.max_chunks)
        own = self.module.shape().forward(tokens=samples * read, length=min(read, self.fit.chunk_tokens))
        return own + self.extra.flops(samples, length)

    def save(self, directory: Path) -> None:
        """See :class:`InfluenceModel`."""
        self.module.save(directory)
        self.extra.save(directory)
        if isinstance(self.reader, OwnTokens):
            self.reader.save(directory)


def new_encoder(config: FitConfig, vocab_size: int, outputs: int = 1, extra: int = 0) -> InfluenceEncoder:
    """The recipe's encoder: pretrained by name or path, or a fresh BERT over the language model's vocabulary.

    Args:
        config: the section fit. vocab_size: of the language model. outputs: reference tasks. extra: features beside the text.
    """
    from transformers import BertConfig, BertModel

    if config.encoder is not None:
        encoder = _pretrained(config.encoder)
        positions = getattr(encoder.config, "max_position_embeddings", config.chunk_tokens)
        require(
            config.chunk_tokens <= positions,
            "fit.chunk_tokens",
            config.chunk_tokens,
            f"at most the {positions} positions of {config.encoder}",
        )
        return InfluenceEncoder(encoder, outputs, extra)
    bert = BertConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=4 * config.hidden_size,
        max_position_embeddings=config.chunk_tokens,
        attention_probs_dropout_prob=0.0,  # fused attention knows none on a CPU
    )
    return InfluenceEncoder(BertModel(bert, add_pooling_layer=False), outputs, extra)


def load_encoder(directory: Path) -> InfluenceEncoder:
    """An encoder from an influence-model folder."""
    encoder, head = _pretrained(directory, local_files_only=True), load_file(directory / HEAD_FILE)
    outputs, width = head["weight"].shape
    model = InfluenceEncoder(encoder, outputs, width - encoder.config.hidden_size)  # type: ignore[union-attr]
    model.head.load_state_dict(head)
    return model


def open_encoder(directory: Path, recipe: Recipe, tokenizer: Tokenizer, device: torch.device) -> EncoderModel:
    """The encoder of an influence-model folder, to score with."""
    reader = encoder_inputs(recipe.fit, tokenizer, tokenizer.vocab_size, directory)
    return EncoderModel(load_encoder(directory).to(device).eval(), reader, recipe.fit, recipe.score, device, ExtraFeatures.load(directory))


def _pretrained(source: str | Path, **options: Any) -> nn.Module:
    """An encoder in fp32, without BERT's pooling layer, which nothing here uses."""
    from transformers import AutoModel

    options["dtype"] = torch.float32
    try:
        model: nn.Module = AutoModel.from_pretrained(source, add_pooling_layer=False, **options)
    except TypeError:  # a family that has no such layer, nor the option
        model = AutoModel.from_pretrained(source, **options)
    return model


def encoder_fingerprint(folder: Path) -> str:
    """BLAKE3 (hex) of a local encoder's configuration and weights."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin") or path.name == "config.json")
    return artifact.fingerprint_of({path.name: artifact.digest_of(path) for path in files})


def encoder_inputs(config: FitConfig, tokenizer: Tokenizer, vocab_size: int, saved: Path | None = None) -> EncoderInputs:
    """How samples reach the recipe's encoder; ``saved`` is an influence-model folder that keeps the encoder's own tokenizer."""
    if config.encoder is None:
        return CorpusIds(config, vocab_size)
    return OwnTokens(config, tokenizer, saved or config.encoder)

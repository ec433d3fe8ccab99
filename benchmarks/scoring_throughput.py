"""Claim: scoring is 1.3 times as fast as the published way on full windows of 1,024 tokens, and 3 times on documents of C4's lengths.

    python benchmarks/scoring_throughput.py [--hidden_size 256 --layers 4 | --encoder DIR] [--threads N]

The published way decodes each sample, tokenizes the text for the encoder, pads it to 1,024 tokens, which the encoder reads as two chunks of
512, 128 samples at a time, and writes Arrow files. Ours reads the encoder's tokens that preprocessing wrote, forms batches of samples of
like lengths under ``score.batch_tokens``, and writes ``.npy`` files. Both have the same weights, cores and samples of real C4 text, and
take turns. Gate: scores of documents agree to 1e-4 of their SD; those of windows, whose first and last words the published way tokenizes
in pieces, by a Spearman of at least 0.99. In a third turn ours decodes and tokenizes too, which shows what the written tokens are worth.

Writes ``scoring_throughput.json`` into ``--results``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from measuring import GateError, spread
from scipy import stats
from surroundings import REPOSITORY, SHARED_DATA, surroundings, without_paths

from mates.engine.config import CorpusConfig, FitConfig, ModelConfig, PretrainConfig, Recipe, ScoreConfig, TokenizerConfig
from mates.engine.data.corpus import Corpus, open_corpus
from mates.engine.influence.encoder import EncoderModel, InfluenceEncoder, new_encoder
from mates.engine.influence.inputs import EncoderInputs, OwnTokens, Source, TokenIds
from mates.engine.influence.model import Samples, predict
from mates.preprocess.artifact import write_array, write_json
from mates.preprocess.tokenizer import Tokenizer, open_tokenizer

CLAIM = "Scoring is 1.3 times as fast as the published way on full windows of 1,024 tokens, and 3 times on documents of C4's lengths."
LENGTH, CHUNK, BATCH = 1024, 512, 128
Json = dict[str, Any]
Scores = npt.NDArray[np.float32]
Ways = Mapping[str, Callable[[Path], Scores]]


def make_encoder(options: argparse.Namespace) -> Path:
    """A BERT with random weights and a real tokenizer, as a Hugging Face folder; or the one that was given."""
    from transformers import BertConfig, BertModel

    if options.encoder:
        return Path(options.encoder)
    folder: Path = options.run_dir / f"bert-{options.hidden_size}x{options.layers}"
    folder.mkdir(parents=True, exist_ok=True)
    for file in options.encoder_tokenizer.iterdir():
        shutil.copy(file, folder)
    torch.manual_seed(0)
    shape = BertConfig(
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64,
        intermediate_size=4 * options.hidden_size,
    )
    BertModel(shape, add_pooling_layer=False).save_pretrained(folder)
    return folder


def prepare(options: argparse.Namespace, encoder: Path) -> Recipe:
    """A corpus of C4 text with the encoder's tokens; made once."""
    from mates.engine.data.steps import preprocess_step, tokenizer_step

    recipe = Recipe(
        run_dir=str(options.run_dir),
        corpus=CorpusConfig(inputs=[str(options.text)], pool_share=0.01, holdout_share=0.01, scorer_tokenizer=str(encoder)),
        tokenizer=TokenizerConfig(path=str(options.tokenizer)),
        model=ModelConfig(max_positions=LENGTH),
        pretrain=PretrainConfig(sequence_length=LENGTH),
    )
    tokenizer_step(recipe)
    preprocess_step(recipe)
    return recipe


class Documents:
    """Whole documents of a corpus in the place of its windows: sample i is document i, cut at 1,024 tokens."""

    def __init__(self, corpus: Corpus) -> None:
        from mates.preprocess.indexed import open_indexed

        ((folder, self._own),) = corpus.parts
        self._encoder = open_indexed(folder / "scorer")
        self.length = LENGTH

    def text_tokens(self, number: int) -> npt.NDArray[np.integer[Any]]:
        """The language model's, without the end-of-document token."""
        return self._own.document(number)[:-1][:LENGTH]

    def encoder_tokens(self, number: int) -> npt.NDArray[np.integer[Any]]:
        """The encoder's."""
        return self._encoder.document(number)

    def whole(self, count: int) -> list[int]:
        """The first so many documents that are not cut."""
        found = [number for number in range(self._own.documents) if len(self._own.document(number)) <= LENGTH * 9 // 10]
        return found[:count]


@dataclass
class Read:
    """What the encoder reads of documents: an :class:`EncoderInputs`."""

    documents: Documents
    around: OwnTokens
    vocab_size: int
    pad: int

    def source(self, corpus: Corpus) -> Source:
        """See :class:`EncoderInputs`."""
        return "stored"

    def sequences(self, samples: Samples) -> list[TokenIds]:
        """See :class:`EncoderInputs`."""
        return [self.around.framed(self.documents.encoder_tokens(int(number))) for number in samples.ids]


def published(module: InfluenceEncoder, texts: Sequence[npt.NDArray[np.integer[Any]]], tools: Tools, target: Path) -> Scores:
    """Decode, tokenize, pad to 1,024, batches of 128, Arrow."""
    scores = []
    for start in range(0, len(texts), BATCH):
        decoded = [tools.tokenizer.decode(tokens.tolist()) for tokens in texts[start : start + BATCH]]
        batch = tools.encoder(decoded, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        ids, mask = batch["input_ids"].view(-1, CHUNK), batch["attention_mask"].view(-1, CHUNK)
        with torch.no_grad():
            hidden = module.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            weights = mask[..., None].float()
            sums, counts = (hidden * weights).view(len(decoded), LENGTH, -1).sum(1), weights.view(len(decoded), LENGTH, 1).sum(1)
            scores.append(module.head(sums / counts)[:, 0].numpy())
    joined = np.concatenate(scores)
    with pa.OSFile(str(target / "scores.arrow"), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("score", pa.float32())])) as writer:
        writer.write_batch(pa.record_batch([pa.array(joined)], names=["score"]))
    return joined


@dataclass(frozen=True)
class Tools:
    """The language model's tokenizer, and the encoder's as transformers has it."""

    tokenizer: Tokenizer
    encoder: Any


def ours(model: EncoderModel, samples: Samples, target: Path) -> Scores:
    """Through the step's own code, chunk by chunk."""
    scores = []
    for start in range(0, len(samples), 2048):
        found = predict(model, samples[start : start + 2048])
        write_array(target / f"{start}.npy", found)
        scores.append(found)
    return np.concatenate(scores)[:, 0]


class Decoding(OwnTokens):
    """Ours without the tokens that preprocessing wrote."""

    def source(self, corpus: Corpus) -> Source:
        """Always the text."""
        return "text"


def in_turn(ways: Ways, rounds: int) -> tuple[dict[str, list[float]], dict[str, Scores]]:
    """Seconds of each way in each round after one that is not timed, and its scores."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    scores = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            for name, way in ways.items():
                started = time.perf_counter()
                scores[name] = way(Path(folder))
                if number:
                    seconds[name].append(time.perf_counter() - started)
    return seconds, scores


def compare(ways: Ways, samples: int, tokens: int, rounds: int, gate: Callable[[Scores, Scores], Json]) -> Json:
    """Rates and ratios of one kind of samples."""
    seconds, scores = in_turn(ways, rounds)
    agreement = {name: gate(scores["published"], own) for name, own in scores.items() if name != "published"}
    return {
        "samples": samples,
        "tokens": tokens,
        "agreement": agreement,
        "samples_per_s": {name: spread([samples / value for value in values]) for name, values in seconds.items()},
        "times_faster": {
            name: spread([theirs / own for theirs, own in zip(seconds["published"], values, strict=True)])
            for name, values in seconds.items()
            if name != "published"
        },
    }


def equal(published_scores: Scores, own: Scores) -> Json:
    """GateError unless scores are the same up to fp32's rounding."""
    gap = float(np.abs(published_scores - own).max() / published_scores.std())
    if gap > 1e-4:
        raise GateError(f"scores of documents differ by {gap:.1e} SD")
    return {"largest_difference_sd": gap}


def alike(published_scores: Scores, own: Scores) -> Json:
    """GateError unless scores rank samples alike."""
    found = float(stats.spearmanr(published_scores, own).statistic)
    if not found >= 0.99:
        raise GateError(f"Spearman of the scores of windows is {found:.4f}")
    return {"spearman": found}


def measure(options: argparse.Namespace) -> Json:
    """Windows and documents."""
    from transformers import AutoTokenizer

    from mates.engine.layout import layout_of

    torch.set_num_threads(options.threads)
    encoder = make_encoder(options)
    recipe = prepare(options, encoder)
    corpus = open_corpus(layout_of(recipe).corpus("train"), LENGTH)
    tokenizer, _ = open_tokenizer(layout_of(recipe).tokenizer)
    tools = Tools(tokenizer, AutoTokenizer.from_pretrained(encoder))
    config = FitConfig(encoder=str(encoder), chunk_tokens=CHUNK, max_chunks=LENGTH // CHUNK)
    torch.manual_seed(0)
    module = new_encoder(config, len(tools.encoder)).eval()
    torch.nn.init.normal_(module.head.weight)
    reader, decoding = (kind(config, tokenizer, encoder) for kind in (OwnTokens, Decoding))
    if reader.source(corpus) != "stored":
        raise GateError("the corpus does not hold the encoder's tokens")

    def model(inputs: EncoderInputs) -> EncoderModel:
        return EncoderModel(module, inputs, config, ScoreConfig(batch_tokens=options.batch_tokens), torch.device("cpu"))

    samples = Samples(corpus, np.sort(np.random.default_rng(0).permutation(corpus.samples)[: options.windows]))
    windows = {
        "published": lambda target: published(module, list(samples.windows), tools, target),
        "ours": lambda target: ours(model(reader), samples, target),
        "ours, decoding": lambda target: ours(model(decoding), samples, target),
    }
    found = {"windows": compare(windows, len(samples), samples.windows.size, options.rounds, alike)}
    documents = Documents(corpus)
    chosen = documents.whole(options.documents)
    whole = Samples(documents, np.array(chosen))  # type: ignore[arg-type]
    texts = [documents.text_tokens(number) for number in chosen]
    read = Read(documents, reader, reader.vocab_size, reader.pad)
    ways = {
        "published": lambda target: published(module, texts, tools, target),
        "ours": lambda target: ours(model(read), whole, target),
    }
    found["documents"] = compare(ways, len(chosen), sum(map(len, texts)), options.rounds, equal)
    shape = module.shape()
    return {
        "claim": CLAIM,
        "encoder": {"hidden_size": shape.hidden_size, "layers": shape.layers, "flops_per_token": shape.forward(tokens=1, length=CHUNK)},
        "settings": without_paths({name: str(value) for name, value in vars(options).items() if name not in ("run_dir", "results")}),
        **found,
        **surroundings(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=CLAIM, allow_abbrev=False)
    add = parser.add_argument
    add("--text", type=Path, default=SHARED_DATA / "web" / "c4.jsonl.zst", help="documents")
    add("--tokenizer", type=Path, default=SHARED_DATA / "tokenizers" / "gpt-neox", help="the language model's")
    add("--encoder_tokenizer", type=Path, default=SHARED_DATA / "tokenizers" / "bert-base-uncased", help="the encoder's")
    add("--encoder", type=Path, help="a pretrained encoder instead of a BERT with random weights")
    add("--hidden_size", type=int, default=256, help="of the BERT with random weights")
    add("--layers", type=int, default=4, help="of the BERT with random weights")
    add("--batch_tokens", type=int, help="score.batch_tokens")
    add("--windows", type=int, default=256, help="windows that are scored in a round")
    add("--documents", type=int, default=512, help="documents that are scored in a round")
    add("--rounds", type=int, default=5, help="rounds after the one that is not timed")
    add("--threads", type=int, default=torch.get_num_threads(), help="cores")
    add("--run_dir", type=Path, default=REPOSITORY / "runs" / "scoring-throughput", help="where the corpus goes")
    add("--results", type=Path, default=REPOSITORY / "benchmarks" / "results", help="where the JSON goes")
    options = parser.parse_args(arguments)
    missing = [str(path) for path in (options.text, options.tokenizer, options.encoder_tokenizer) if not path.exists()]
    if missing:
        parser.error(f"not there: {', '.join(missing)}")
    options.threads = int(options.threads)
    result = measure(options)
    for kind in ("windows", "documents"):
        row = result[kind]
        times = ", ".join(f"{name} {value['median']:.2f} x" for name, value in row["times_faster"].items())
        print(f"{kind:<10} published {row['samples_per_s']['published']['median']:.1f} samples/s; {times}")
    write_json(options.results / "scoring_throughput.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())

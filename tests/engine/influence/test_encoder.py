"""The encoder influence model: against transformers' own BERT, through a save and a load, and with a tokenizer of its own."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import in_threads
from synthetic_run import build_data, make_recipe
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mates.engine.config import FitConfig, ScoreConfig
from mates.engine.distributed import World
from mates.engine.flops import EncoderShape, shape_of
from mates.engine.influence.encoder import EncoderModel, InfluenceEncoder, encoder_fingerprint, load_encoder, new_encoder
from mates.engine.influence.fit import agreement, split_labels
from mates.engine.influence.inputs import CorpusIds, OwnTokens, Source, chunk, groups
from mates.engine.influence.model import Samples, predict
from mates.engine.influence.training import EncoderFit
from mates.engine.layout import layout_of
from mates.engine.pretrain.stage import open_train_corpus
from mates.preprocess.artifact import ArtifactError
from mates.preprocess.tokenizer import open_tokenizer

CONFIG = FitConfig(hidden_size=32, layers=2, heads=4, chunk_tokens=16, max_chunks=2)


@pytest.fixture
def model() -> InfluenceEncoder:
    torch.manual_seed(0)
    return new_encoder(CONFIG, vocab_size=100).eval()


def by_hand(model: InfluenceEncoder, sample: np.ndarray, chunk_tokens: int) -> float:
    """One sample: each chunk through transformers' BERT alone, unpadded; the mean over all token vectors; the head."""
    vectors = []
    for start in range(0, len(sample), chunk_tokens):
        ids = torch.from_numpy(sample[start : start + chunk_tokens])[None]
        vectors.append(model.encoder(input_ids=ids).last_hidden_state[0])
    pooled = torch.cat(vectors).mean(0)
    return float((pooled @ model.head.weight[0] + model.head.bias[0]).detach())


class Given:
    """A corpus of given samples."""

    has_scorer_tokens = False

    def __init__(self, windows: np.ndarray) -> None:
        self._windows, self.length = windows, windows.shape[1]

    def stored(self, ids: np.ndarray) -> np.ndarray:
        return np.pad(self._windows[ids], ((0, 0), (0, 1)))


def samples_of(windows: np.ndarray) -> Samples:
    return Samples(Given(windows), np.arange(len(windows)))  # type: ignore[arg-type]


def test_forward_is_the_mean_over_chunks_of_an_unpadded_bert(model: InfluenceEncoder) -> None:
    source = np.random.default_rng(0)
    samples = [source.integers(0, 100, length) for length in (32, 20, 16, 5, 1)]
    with torch.no_grad():
        found = model(chunk(samples, CONFIG.chunk_tokens, pad=0))[:, 0].tolist()
    assert found == pytest.approx([by_hand(model, sample, CONFIG.chunk_tokens) for sample in samples], abs=1e-5)


def test_what_lies_beyond_the_last_chunk_is_not_read(model: InfluenceEncoder) -> None:
    sample = np.arange(50) % 100
    scorer = EncoderModel(model, CorpusIds(CONFIG, 100), CONFIG, ScoreConfig(), torch.device("cpu"))
    assert predict(scorer, samples_of(sample[None])).tolist() == predict(scorer, samples_of(sample[None, :32])).tolist()


def test_save_and_load_keep_every_bit(model: InfluenceEncoder, tmp_path: Path) -> None:
    model.save(tmp_path)
    loaded = load_encoder(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert len(model.state_dict()) == len(loaded.state_dict())


def test_scores_do_not_depend_on_the_batch(model: InfluenceEncoder) -> None:
    reader = CorpusIds(CONFIG, 100)
    samples = np.random.default_rng(1).integers(0, 100, (50, 32))
    models = [EncoderModel(model, reader, CONFIG, ScoreConfig(batch_tokens=size), torch.device("cpu")) for size in (1, 200, 10_000)]
    scores = [predict(one, samples_of(samples)) for one in models]
    assert all(np.abs(scores[0] - other).max() <= 1e-5 for other in scores[1:])
    assert scores[0].dtype == np.float32


def test_the_head_works_in_fp32_under_bf16(model: InfluenceEncoder) -> None:
    samples = samples_of(np.random.default_rng(4).integers(0, 100, (200, 32)))
    narrow = EncoderModel(model, CorpusIds(CONFIG, 100), CONFIG, ScoreConfig(precision="bf16"), torch.device("cpu"))
    scores = predict(narrow, samples)[:, 0]
    assert len(np.unique(scores)) == 200
    assert (scores != torch.from_numpy(scores).bfloat16().float().numpy()).mean() > 0.9


class Ragged:
    """Samples of different lengths: the number in the first place says how many tokens are read."""

    vocab_size, pad = 100, 0

    def source(self, corpus: Any) -> Source:
        return "ids"

    def sequences(self, samples: Samples) -> list[Any]:
        return [window[: window[0]] for window in samples.windows]


@pytest.mark.parametrize("budget", [1, 40, 100, 10_000])
def test_samples_of_any_lengths_are_scored_as_alone(model: InfluenceEncoder, budget: int) -> None:
    source = np.random.default_rng(2)
    samples = source.integers(0, 100, (60, 40))
    samples[:, 0] = source.integers(1, 41, 60)
    scorer = EncoderModel(model, Ragged(), CONFIG, ScoreConfig(batch_tokens=budget), torch.device("cpu"))
    expected = [by_hand(model, sample[: sample[0]], CONFIG.chunk_tokens) for sample in samples]
    assert predict(scorer, samples_of(samples))[:, 0] == pytest.approx(expected, abs=1e-5)


@given(lengths=st.lists(st.integers(0, 70), min_size=1, max_size=40), budget=st.integers(1, 300))
def test_groups_hold_every_sequence_once_and_keep_to_the_budget(lengths: list[int], budget: int) -> None:
    sequences = [np.zeros(length, np.int64) for length in lengths]
    found = list(groups(sequences, 16, budget))
    assert sorted(np.concatenate(found).tolist()) == list(range(len(lengths)))
    for rows in found:
        assert len(rows) == 1 or chunk([sequences[row] for row in rows], 16, 0).ids.numel() <= budget
    flat = [max(1, lengths[row]) for rows in found for row in rows]  # an empty one takes a place
    assert flat == sorted(flat, reverse=True)


@pytest.fixture(scope="module")
def bert_dir(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with a word-piece vocabulary."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    words = sorted({word for text in texts[:50] for word in text.lower().split() if word.isalpha()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    shape = BertConfig(vocab_size=5 + len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertModel(shape).save_pretrained(folder)
    return folder


def test_an_encoder_with_its_own_tokenizer(bpe_dir: Path, bert_dir: Path, texts: list[str]) -> None:
    config = replace(CONFIG, encoder=str(bert_dir), chunk_tokens=32)
    tokenizer, _ = open_tokenizer(bpe_dir)
    reader = OwnTokens(config, tokenizer, bert_dir)
    ids = tokenizer.encode_batch([texts[0]])[0]
    samples = samples_of(ids[None])
    assert reader.source(samples.corpus) == "text"
    (found,) = reader.sequences(samples)
    expected = AutoTokenizer.from_pretrained(bert_dir)(texts[0], truncation=True, max_length=64)["input_ids"]
    assert found.tolist() == expected
    model = EncoderModel(new_encoder(config, reader.vocab_size).eval(), reader, config, ScoreConfig(), torch.device("cpu"))
    score = predict(model, samples)
    assert score.shape == (1, 1)
    assert np.isfinite(score).all()


def test_an_encoder_reads_what_preprocessing_wrote_for_it(bert_dir: Path, tmp_path: Path) -> None:
    """Without a decoder; over the seams of words the same as the text of the sample would give."""
    made = make_recipe(tmp_path)
    made = replace(made, corpus=replace(made.corpus, scorer_tokenizer=str(bert_dir)))
    build_data(made)
    corpus = open_train_corpus(made)
    tokenizer, _ = open_tokenizer(layout_of(made).tokenizer)
    reader = OwnTokens(replace(CONFIG, chunk_tokens=32, max_chunks=4), tokenizer, bert_dir)
    assert reader.source(corpus) == "stored"
    found = reader.sequences(Samples(corpus, np.arange(corpus.samples)))
    stored = corpus.scorer_tokens(np.arange(corpus.samples), 126)
    assert all(one[0] == 2 and one[-1] == 3 and one[1:-1].tolist() == own.tolist() for one, own in zip(found, stored, strict=True))
    text = tokenizer.decode(corpus.windows(np.arange(40))[:, :-1].ravel().tolist())
    whole = AutoTokenizer.from_pretrained(bert_dir)(text, add_special_tokens=False)["input_ids"]
    inner = np.concatenate([one[1:-1] for one in found[:40]]).tolist()
    assert inner[: len(whole) // 2] == whole[: len(whole) // 2]


def test_an_encoder_of_the_same_vocabulary_reads_the_corpus_as_it_is(bpe_dir: Path, texts: list[str], tmp_path: Path) -> None:
    """As ModernBERT's, which has special tokens of its own behind those of the language model."""
    tokenizer, _ = open_tokenizer(bpe_dir)
    library = Tokenizer.from_file(str(bpe_dir / "tokenizer.json"))
    library.add_special_tokens(["[CLS]", "[SEP]", "[PAD]"])
    cls, sep = library.token_to_id("[CLS]"), library.token_to_id("[SEP]")
    library.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", cls), ("[SEP]", sep)])
    PreTrainedTokenizerFast(tokenizer_object=library, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]").save_pretrained(tmp_path)
    reader = OwnTokens(replace(CONFIG, chunk_tokens=64), tokenizer, tmp_path)
    one, two = (tokenizer.encode_batch([text])[0][:30] for text in texts[:2])
    end = tokenizer.end_of_document
    samples = samples_of(np.concatenate([one, [end], two])[None])
    assert reader.source(samples.corpus) == "ids"
    assert reader.sequences(samples)[0].tolist() == [cls, *one.tolist(), sep, *two.tolist(), sep]


def test_labels_stay_in_their_part() -> None:
    config = FitConfig()
    parts = split_labels(np.arange(2000), config, seed=3)
    rows = np.concatenate(list(parts.values()))
    assert sorted(rows) == list(range(2000))
    assert len(parts["test"]) == pytest.approx(400, abs=4 * np.sqrt(2000 * 0.2 * 0.8))
    some = split_labels(np.arange(1000, 2000)[::-1], config, seed=3)
    assert {1999 - row for row in some["test"]} == {row for row in parts["test"] if row >= 1000}


def test_agreement_by_hand() -> None:
    found = agreement(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 10.0]))
    assert found["spearman"] == pytest.approx(0.8)
    assert found["pearson"] == pytest.approx(np.corrcoef([1, 2, 3, 4], [1, 3, 2, 10])[0, 1])
    assert agreement(np.ones(4), np.arange(4.0)) == {"spearman": None, "pearson": None}


@pytest.mark.parametrize("batch", [8, 3, 1])
def test_ranks_share_a_batch(model: InfluenceEncoder, batch: int) -> None:
    """Three ranks have the gradients of one that reads the whole batch, also where some of them have no sample."""
    source = np.random.default_rng(3)
    samples, targets = samples_of(source.integers(0, 100, (10, 32))), source.normal(size=(10, 1)).astype(np.float32)
    parts = {"train": np.arange(8), "validation": np.array([8]), "test": np.array([9])}

    def gradients(world: World) -> tuple[float, list[torch.Tensor]]:
        own = EncoderModel(copy.deepcopy(model).double(), CorpusIds(CONFIG, 100), CONFIG, ScoreConfig(), torch.device("cpu"))
        fit = EncoderFit(CONFIG, own, samples, targets.astype(np.float64), parts, world, seed=0, stage=1)
        loss = fit._backward(np.arange(batch))
        return loss, [parameter.grad for parameter in own.module.parameters() if parameter.grad is not None]

    loss, expected = gradients(World(0, 1, torch.device("cpu")))
    for own_loss, found in in_threads(3, gradients):
        assert own_loss == pytest.approx(loss, rel=1e-6)
        assert len(found) == len(expected)
        largest = max(float(one.abs().max()) for one in expected)
        assert all(float((one - other).abs().max()) <= 1e-6 * largest for one, other in zip(found, expected, strict=True))


def test_a_fit_that_diverges_says_so(model: InfluenceEncoder) -> None:
    samples, targets = samples_of(np.random.default_rng(5).integers(0, 100, (12, 32))), np.full((12, 1), 1.0, np.float32)
    parts = {"train": np.arange(8), "validation": np.array([8, 9]), "test": np.array([10, 11])}
    config = replace(CONFIG, lr=1e30)
    own = EncoderModel(model, CorpusIds(config, 100), config, ScoreConfig(), torch.device("cpu"))
    fit = EncoderFit(config, own, samples, targets, parts, World(0, 1, torch.device("cpu")), seed=0, stage=1)
    with pytest.raises(ArtifactError, match=r"fit: the validation error in epoch 1 is nan; lower fit.lr \(1e\+30\)"):
        fit.train("fit")


@pytest.mark.parametrize("names", [("hidden_size", "num_hidden_layers", "intermediate_size"), ("dim", "n_layers", "hidden_dim")])
def test_shapes_of_encoders_by_other_names(names: tuple[str, str, str]) -> None:
    assert shape_of(dict(zip(names, (8, 2, 32), strict=True))) == EncoderShape(hidden_size=8, layers=2, intermediate_size=32)
    with pytest.raises(KeyError, match="none of hidden_size, dim, d_model"):
        shape_of({names[1]: 2, names[2]: 32})


def test_other_weights_in_the_encoders_folder_are_noticed(bert_dir: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(bert_dir, tmp_path / "bert"))
    assert encoder_fingerprint(copied) == encoder_fingerprint(bert_dir)
    weights = next(copied.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert encoder_fingerprint(copied) != encoder_fingerprint(bert_dir)

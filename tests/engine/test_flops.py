"""FLOPs and parameter counts against what torch counts on transformers' models."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mates.engine.config import ModelConfig
from mates.engine.flops import BERT_BASE, EncoderShape, decoder_forward, decoder_training
from mates.engine.pretrain.model import LabelledLoss, model_config
from mates.engine.pretrain.shapes import PRESETS, ModelShape, resolve_shape

VOCABULARY, BATCH, LENGTH = 320, 2, 96

SHAPES = {
    "gpt_neox": ModelShape(family="gpt_neox", hidden_size=96, layers=3, heads=4, kv_heads=4, intermediate_size=320, max_positions=LENGTH),
    "llama": ModelShape(family="llama", hidden_size=96, layers=3, heads=6, kv_heads=6, intermediate_size=200, max_positions=LENGTH),
    "llama, grouped queries": ModelShape(
        family="llama", hidden_size=96, layers=3, heads=6, kv_heads=2, intermediate_size=200, max_positions=LENGTH
    ),
    "llama, one key": ModelShape(
        family="llama", hidden_size=128, layers=2, heads=8, kv_heads=1, intermediate_size=300, max_positions=LENGTH
    ),
}


def model_of(shape: ModelShape, vocab_size: int = VOCABULARY, device: str = "cpu") -> Any:
    """transformers' own model, its attention written out as matrix products: each is seen and none is recomputed."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        return AutoModelForCausalLM.from_config(model_config(shape, vocab_size, 0), attn_implementation="eager", dtype=torch.float32)


def counted(run: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SHAPES)
def test_decoder_passes_are_what_torch_counts(name: str, tokens: torch.Tensor) -> None:
    shape = SHAPES[name]
    model = model_of(shape)
    with torch.no_grad():
        forward = counted(lambda: model(input_ids=tokens))
    assert decoder_forward(shape, VOCABULARY, tokens=BATCH * LENGTH, length=LENGTH) == pytest.approx(forward, rel=0.002)

    def train() -> None:
        logits = model(input_ids=tokens).logits
        torch.autograd.backward(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()))

    assert decoder_training(shape, VOCABULARY, tokens=BATCH * LENGTH, length=LENGTH) == pytest.approx(counted(train), rel=0.002)


@pytest.mark.parametrize("name", SHAPES)
def test_attention_grows_with_the_length_as_torch_counts(name: str) -> None:
    """As many tokens in sequences of 8 and of 96: the difference is attention alone, which a whole pass would hide."""
    shape = SHAPES[name]
    model = model_of(shape)

    def both(length: int) -> tuple[int, float]:
        ids = torch.zeros((BATCH * LENGTH // length, length), dtype=torch.int64)
        with torch.no_grad():
            found = counted(lambda: model(input_ids=ids))
        return found, decoder_forward(shape, VOCABULARY, tokens=BATCH * LENGTH, length=length)

    (short, short_formula), (long, long_formula) = both(8), both(LENGTH)
    assert long_formula - short_formula == pytest.approx(long - short, rel=0.002)


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
@pytest.mark.parametrize("labels", [1, 17, BATCH * LENGTH])
def test_logits_at_some_positions_only(family: str, labels: int, tokens: torch.Tensor) -> None:
    shape = SHAPES[family]
    loss = LabelledLoss(model_of(shape))
    positions = torch.arange(labels)
    with torch.no_grad():
        found = counted(lambda: loss(tokens, positions, positions % VOCABULARY))
    formula = decoder_forward(shape, VOCABULARY, tokens=BATCH * LENGTH, length=LENGTH, logit_tokens=labels)
    assert formula == pytest.approx(found, rel=0.002)
    whole = decoder_forward(shape, VOCABULARY, tokens=BATCH * LENGTH, length=LENGTH)
    assert whole - formula == 2 * (BATCH * LENGTH - labels) * shape.hidden_size * VOCABULARY


@pytest.mark.parametrize(("hidden", "layers", "inner", "length"), [(64, 2, 256, 96), (96, 3, 200, 64), (48, 1, 192, 128)])
def test_encoder_passes_are_what_torch_counts(hidden: int, layers: int, inner: int, length: int) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=inner,
        max_position_embeddings=length,
        attn_implementation="eager",
    )
    encoder = BertModel(config, add_pooling_layer=False).eval()
    ids = torch.zeros((BATCH, length), dtype=torch.int64)
    with torch.no_grad():
        found = counted(lambda: encoder(input_ids=ids))
    shape = EncoderShape(hidden_size=hidden, layers=layers, intermediate_size=inner)
    assert shape.forward(tokens=BATCH * length, length=length) == pytest.approx(found, rel=0.002)


def test_bert_base() -> None:
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        encoder = BertModel(BertConfig(attn_implementation="eager"), add_pooling_layer=False).eval()
        ids = torch.zeros((1, 512), dtype=torch.int64)
        with torch.no_grad():
            found = counted(lambda: encoder(input_ids=ids))
    assert BERT_BASE.forward(tokens=512, length=512) == pytest.approx(found, rel=0.002)


# --- parameters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tied"), list(itertools.product(SHAPES, [False, True])))
def test_parameters_are_those_of_the_model(name: str, tied: bool) -> None:
    shape = replace(SHAPES[name], tie_embeddings=tied)
    model = model_of(shape)
    assert shape.parameters(VOCABULARY) == sum(parameter.numel() for parameter in model.parameters())
    matrices = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    assert shape.matmul_parameters(VOCABULARY) == matrices


@pytest.mark.parametrize("preset", ["pythia-14m", "pythia-70m"])
def test_parameters_of_presets(preset: str) -> None:
    shape = resolve_shape(ModelConfig(preset=preset))
    model = model_of(shape, 50_304, device="meta")
    assert shape.parameters(50_304) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("preset", "vocab_size", "published"),
    [  # total parameters as the Pythia repository's table and the model cards have them
        ("pythia-14m", 50_304, 14_067_712),
        ("pythia-31m", 50_304, 30_494_720),
        ("pythia-70m", 50_304, 70_426_624),
        ("pythia-160m", 50_304, 162_322_944),
        ("pythia-410m", 50_304, 405_334_016),
        ("pythia-1b", 50_304, 1_011_781_632),
        ("pythia-1.4b", 50_304, 1_414_647_808),
        ("pythia-2.8b", 50_304, 2_775_208_960),
        ("pythia-6.9b", 50_432, 6_857_302_016),
        ("pythia-12b", 50_688, 11_846_072_320),
        ("smollm-135m", 49_152, 134_515_008),
        ("smollm-360m", 49_152, 361_821_120),
        ("smollm-1.7b", 49_152, 1_711_376_384),
        ("tinyllama-1.1b", 32_000, 1_100_048_384),
        ("llama-2-7b", 32_000, 6_738_415_616),
        ("llama-3-8b", 128_256, 8_030_261_248),
    ],
)
def test_presets_have_the_published_sizes(preset: str, vocab_size: int, published: int) -> None:
    assert PRESETS[preset].parameters(vocab_size) == published
    assert len(PRESETS) == 16

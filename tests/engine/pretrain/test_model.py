"""Models as they are built: shapes from files, initial weights, documents kept apart, and the loss in pieces."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mates.engine.config import ModelConfig, RecipeError
from mates.engine.pretrain.model import (
    build_from_weights,
    build_model,
    document_positions,
    model_config,
    reset_at_documents,
    weights_fingerprint,
)
from mates.engine.pretrain.shapes import resolve_shape
from mates.preprocess.artifact import ArtifactError

VOCAB = 512
# as published ones were written by older versions: rotary settings at the top level, and what is not the default's
PYTHIA = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "classifier_dropout": 0.1,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 192,
    "layer_norm_eps": 1e-3,
    "max_position_embeddings": 128,
    "model_type": "gpt_neox",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "rotary_emb_base": 5000,
    "rotary_pct": 0.5,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "use_parallel_residual": False,
    "vocab_size": VOCAB,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-3,
    "rope_scaling": None,
    "rope_theta": 20000.0,
    "tie_word_embeddings": True,
    "vocab_size": VOCAB,
}


@pytest.fixture(params=[PYTHIA, LLAMA], ids=["gpt_neox", "llama"])
def raw(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.param
    return found


def write(folder: Path, raw: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def tokens(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, columns), generator=torch.Generator().manual_seed(0))


def test_a_file_and_weights_give_transformers_own_model(raw: dict[str, Any], tmp_path: Path) -> None:
    folder = write(tmp_path, raw)
    peer = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="sdpa", dtype=torch.float32).eval()
    peer.save_pretrained(tmp_path / "saved")
    for model in (
        ModelConfig(config=str(folder)),
        ModelConfig(config=str(folder / "config.json")),
        ModelConfig(weights=str(tmp_path / "saved")),
    ):
        built = build_from_weights(model_config(resolve_shape(model), VOCAB, 0), tmp_path / "saved").eval()
        assert torch.equal(built(input_ids=tokens(2, 40)).logits, peer(input_ids=tokens(2, 40)).logits)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, LLAMA)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(tmp_path)
    shape = resolve_shape(ModelConfig(weights=str(tmp_path)))
    with pytest.raises(ArtifactError, match=r"embed_tokens.weight is \(512, 64\), expected \(576, 64\); .* model.vocab_multiple"):
        build_from_weights(model_config(shape, 576, 0), tmp_path)
    deeper = write(tmp_path / "deeper", LLAMA | {"num_hidden_layers": 3})
    with pytest.raises(ArtifactError, match=r"lacks model.layers.2.*\(9 in all\)"):
        build_from_weights(model_config(resolve_shape(ModelConfig(config=str(deeper))), VOCAB, 0), tmp_path)
    shallow = write(tmp_path / "shallow", LLAMA | {"num_hidden_layers": 1})
    with pytest.raises(ArtifactError, match=r"holds, beyond the model's tensors, model.layers.1.*\(9 in all\)"):
        build_from_weights(model_config(resolve_shape(ModelConfig(config=str(shallow))), VOCAB, 0), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ArtifactError, match=r"model.safetensors: not there; load the model with transformers"):
        build_from_weights(model_config(shape, VOCAB, 0), tmp_path)


def test_the_fingerprint_of_weights_is_that_of_their_contents(tmp_path: Path) -> None:
    found = []
    for name, rope, seed in (("a", 1e4, 0), ("b", 1e4, 0), ("c", 1e4, 1), ("d", 2e4, 0)):
        folder = write(tmp_path / name, LLAMA | {"rope_theta": rope})
        build_model(model_config(resolve_shape(ModelConfig(config=str(folder))), VOCAB, 0), seed).save_pretrained(folder)  # type: ignore[operator]
        found.append(weights_fingerprint(folder))
    assert found[0] == found[1]
    assert len(set(found)) == 3
    file = tmp_path / "a" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert weights_fingerprint(tmp_path / "a") != found[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type: found 'gpt2', expected gpt_neox or llama"),
        ({"num_hidden_layers": None}, "num_hidden_layers: found None, expected a whole number from 1 to 1048576"),
        ({"hidden_size": 10**30}, "hidden_size: found 10+, expected a whole number from 1 to 1048576"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads: found '2', expected a whole number"),
        ({"num_key_value_heads": True}, "num_key_value_heads: found True, expected a whole number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: found 'false', expected true or false"),
        ({"sliding_window": 64}, "sliding_window: found 64, expected None"),
        ({"quantization_config": {}}, "quantization_config: found {}, expected None"),
        ({"attention_dropout": 0.1}, "attention_dropout: found 0.1, expected 0.0"),
        ({"mlp_bias": True}, "mlp_bias: found True, expected False"),
        ({"head_dim": 32}, "head_dim: found 32, expected 16"),
    ],
)
def test_what_training_does_not_do_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write(tmp_path, LLAMA | change)
    with pytest.raises(RecipeError, match=message):
        resolve_shape(ModelConfig(config=str(folder)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "foo"}, "transformers makes no model of this configuration .*foo"),
        ({"rms_norm_eps": "abc"}, "transformers refuses this configuration"),
        ({"rope_scaling": {"rope_type": "foo"}}, "transformers (refuses|makes no model of) this configuration"),
        ({"rope_theta": -1.0}, "rope_theta: found -1.0, expected a number above 0"),
    ],
)
def test_what_transformers_makes_no_model_of_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    shape = resolve_shape(ModelConfig(config=str(write(tmp_path, LLAMA | change))))
    with pytest.raises(RecipeError, match=message):
        build_model(model_config(shape, VOCAB, 0), 0)


def test_a_file_that_is_no_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(RecipeError, match=r"config.json: cannot be read as a transformers configuration \(RecursionError"):
        resolve_shape(ModelConfig(config=str(tmp_path)))


def saved(folder: Path, **changes: Any) -> Any:
    """A folder of weights, and the configuration that training makes of it."""
    raw = LLAMA | changes
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(write(folder, raw))).save_pretrained(folder)
    return model_config(resolve_shape(ModelConfig(weights=str(folder))), VOCAB, 0)


def test_two_matrices_where_the_configuration_says_one_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, tie_word_embeddings=False)
    raw = json.loads((tmp_path / "config.json").read_text())
    write(tmp_path, raw | {"tie_word_embeddings": True})
    config = model_config(resolve_shape(ModelConfig(weights=str(tmp_path))), VOCAB, 0)
    with pytest.raises(ArtifactError, match=r"says tie_word_embeddings, but lm_head.weight is not the input embedding; set it to false"):
        build_from_weights(config, tmp_path)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    config, file = saved(tmp_path), tmp_path / "model.safetensors"
    whole = load_file(file)
    for name, value, message in (
        ("float", torch.nan, "model.norm.weight holds values that are not finite"),
        ("int8", 1, "model.norm.weight is I8, expected floating-point numbers"),
    ):
        spoilt = torch.full((64,), value, dtype=getattr(torch, name))
        save_file(whole | {"model.norm.weight": spoilt}, file, metadata={"format": "pt"})
        with pytest.raises(ArtifactError, match=message):
            build_from_weights(config, tmp_path)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=r"model.safetensors: not a readable safetensors file"):
        build_from_weights(config, tmp_path)


def test_indices_name_only_files_beside_them(tmp_path: Path) -> None:
    config = saved(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for entry, message in (
        ("../model.safetensors", "no index of the safetensors files"),
        ("other.safetensors", "other.safetensors: not there"),
    ):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": entry}}))
        with pytest.raises(ArtifactError, match=message):
            build_from_weights(config, tmp_path)


def test_a_shape_is_said_once(tmp_path: Path) -> None:
    folder = str(write(tmp_path, LLAMA))
    with pytest.raises(RecipeError, match="only one of preset, config and weights"):
        resolve_shape(ModelConfig(config=folder, preset="pythia-14m"))
    with pytest.raises(RecipeError, match=r"nothing beside model.weights"):
        resolve_shape(ModelConfig(weights=folder, layers=3))
    with pytest.raises(RecipeError, match="cannot be read as a transformers configuration"):
        resolve_shape(ModelConfig(config=str(tmp_path / "none")))


def test_initial_weights_are_pythias(raw: dict[str, Any], tmp_path: Path) -> None:
    shape = resolve_shape(ModelConfig(config=str(write(tmp_path, raw | {"hidden_size": 256, "num_hidden_layers": 3}))))
    before = torch.random.get_rng_state()
    model = build_model(model_config(shape, VOCAB, 0), seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    written = 0
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            assert weight.eq(0.0 if name.endswith("bias") else 1.0).all(), name
            continue
        is_written = any(part in name for part in ("attention.dense", "4h_to_h", "o_proj", "down_proj"))
        written += is_written
        expected = 2 / (3 * math.sqrt(256)) if is_written else math.sqrt(2 / (5 * 256))
        assert weight.std().item() == pytest.approx(expected, rel=4 / math.sqrt(2 * weight.numel())), name  # four standard errors
        assert abs(weight.mean().item()) < 4 * expected / math.sqrt(weight.numel()), name
    assert written == 6
    again = dict(build_model(model_config(shape, VOCAB, 0), seed=3).named_parameters())
    other = dict(build_model(model_config(shape, VOCAB, 0), seed=4).named_parameters())
    for name, weight in model.named_parameters():
        assert torch.equal(weight, again[name])
        assert weight.ndim == 1 or not torch.equal(weight, other[name])
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == shape.tie_embeddings  # type: ignore[operator]


def test_documents_of_a_window_do_not_see_each_other(raw: dict[str, Any], tmp_path: Path) -> None:
    model = build_model(model_config(resolve_shape(ModelConfig(config=str(write(tmp_path, raw)))), VOCAB, 0), 0).double().eval()
    batch = tokens(2, 40)
    ends = {0: [7, 8, 20], 1: [0]}  # an empty document, and one that begins before the window
    for row, places in ends.items():
        batch[row, places] = 0
    plain = model(input_ids=batch).logits
    reset_at_documents(model, 0)
    found = model(input_ids=batch).logits
    assert not torch.allclose(found, plain)
    for row, places in ends.items():
        starts = [0, *(place + 1 for place in places)]
        for start, stop in zip(starts, [*starts[1:], 40], strict=True):
            positions = torch.arange(stop - start)[None]
            alone = model(input_ids=batch[row : row + 1, start:stop], position_ids=positions).logits[0]
            assert torch.allclose(found[row, start:stop], alone, atol=1e-12)
            assert torch.equal(document_positions(batch, 0)[row, start:stop], positions[0])


PIECES = """
import sys
from pathlib import Path
import torch
from mates.engine.config import ModelConfig
from mates.engine.pretrain.model import FusedHead, build_model, model_config, next_token_loss
from mates.engine.pretrain.shapes import resolve_shape

config = model_config(resolve_shape(ModelConfig(config=sys.argv[1])), 512, 0)
windows = torch.randint(0, 512, (3, 60), generator=torch.Generator().manual_seed(0))
for dtype in (torch.float32, torch.bfloat16):
    exact, plain, pieces = (build_model(config, 0).to(kind) for kind in (torch.float64, dtype, dtype))
    losses = [next_token_loss(exact, windows), next_token_loss(plain, windows), FusedHead.of(pieces).next_token_loss(pieces, windows)]
    for loss in losses:
        loss.backward()
    assert losses[2].dtype == torch.float32
    errors = [abs(loss.item() - losses[0].item()) for loss in losses[1:]]
    assert errors[1] <= 2 * errors[0] + 1e-6, errors
    named = [dict(model.named_parameters()) for model in (plain, pieces)]
    for name, weight in exact.named_parameters():
        gaps = [(own[name].grad.double() - weight.grad).norm() for own in named]
        assert gaps[1] <= 2 * gaps[0] + 1e-6 * weight.grad.norm(), (name, gaps)
    assert torch.equal(pieces(input_ids=windows).logits, plain(input_ids=windows).logits)
"""


def test_the_loss_in_pieces_is_the_loss(raw: dict[str, Any], tmp_path: Path) -> None:
    """In Triton's interpreter, which has to be asked for before the library is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-P", "-c", PIECES, str(write(tmp_path, raw))], env=environment, check=True)

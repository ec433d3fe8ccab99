"""Known model shapes. No torch here: recipes are checked against shapes before anything heavy is imported."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from mates.engine.config import ModelConfig

Family = Literal["gpt_neox", "llama"]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder's shape, all that determines its parameters but the vocabulary."""

    family: Family
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    max_positions: int
    tie_embeddings: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    """Further keys of the transformers configuration, such as those of the rotary embedding."""

    def matmul_parameters(self, vocab_size: int) -> int:
        """Weights that a token is multiplied with: blocks and output embedding, without biases, norms and look-ups."""
        hidden, inner = self.hidden_size, self.intermediate_size
        head_dim = hidden // self.heads
        qkv = hidden * head_dim * (self.heads + 2 * self.kv_heads)
        feed_forward = (3 if self.family == "llama" else 2) * hidden * inner
        return self.layers * (qkv + hidden * hidden + feed_forward) + hidden * vocab_size

    def parameters(self, vocab_size: int) -> int:
        """All trainable weights."""
        hidden = self.hidden_size
        look_up = 0 if self.tie_embeddings else hidden * vocab_size
        if self.family == "llama":
            small = self.layers * 2 * hidden + hidden
        else:  # biases of qkv, attention output and feed-forward, two LayerNorms a block, one at the end
            small = self.layers * (3 * hidden + hidden + self.intermediate_size + hidden + 4 * hidden) + 2 * hidden
        return self.matmul_parameters(vocab_size) + look_up + small


def _pythia(hidden: int, layers: int, heads: int) -> ModelShape:
    return ModelShape(
        family="gpt_neox",
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        intermediate_size=4 * hidden,
        max_positions=2048,
    )


def _rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, positions: int, **more: Any) -> ModelShape:
    return ModelShape(
        family="llama",
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        intermediate_size=inner,
        max_positions=positions,
        **more,
    )


PRESETS = {
    "pythia-14m": _pythia(128, 6, 4),
    "pythia-31m": _pythia(256, 6, 8),
    "pythia-70m": _pythia(512, 6, 8),
    "pythia-160m": _pythia(768, 12, 12),
    "pythia-410m": _pythia(1024, 24, 16),
    "pythia-1b": _pythia(2048, 16, 8),
    "pythia-1.4b": _pythia(2048, 24, 16),
    "pythia-2.8b": _pythia(2560, 32, 32),
    "pythia-6.9b": _pythia(4096, 32, 32),
    "pythia-12b": _pythia(5120, 36, 40),
    "smollm-135m": _llama(576, 30, 9, 3, 1536, 2048, tie_embeddings=True),
    "smollm-360m": _llama(960, 32, 15, 5, 2560, 2048, tie_embeddings=True),
    "tinyllama-1.1b": _llama(2048, 22, 32, 4, 5632, 2048),
    "smollm-1.7b": _llama(2048, 24, 32, 32, 8192, 2048, tie_embeddings=True),
    "llama-2-7b": _llama(4096, 32, 32, 32, 11008, 4096, settings={"rms_norm_eps": 1e-5}),
    "llama-3-8b": _llama(4096, 32, 32, 8, 14336, 8192, settings={"rms_norm_eps": 1e-5, "rope_parameters": _rope(500_000.0)}),
}

NEOX_ROPE = _rope(10_000.0, partial_rotary_factor=0.25)

_SMALL = ModelShape(family="gpt_neox", hidden_size=128, layers=4, heads=4, kv_heads=4, intermediate_size=512, max_positions=512)


KEPT = (
    "hidden_act",
    "layer_norm_eps",
    "rms_norm_eps",
    "use_parallel_residual",
    "partial_rotary_factor",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rotary_emb_base",
    "rotary_pct",
)
"""Keys of a configuration that a model is built with, beside its sizes; what else there is says nothing about its mathematics."""
NOT_TRAINED_WITH = {
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "sliding_window": None,
    "layer_types": None,
    "quantization_config": None,
}
"""Keys of a configuration that must have these values, where they are there."""
LARGEST = 2**20


def config_file(model: ModelConfig) -> Path | None:
    """The transformers configuration that a recipe names: a file, or ``config.json`` of the folder of its weights."""
    if model.weights is not None:
        return Path(model.weights) / "config.json"
    if model.config is None:
        return None
    path = Path(model.config)
    return path / "config.json" if path.is_dir() else path


def read_shape(path: Path) -> ModelShape:
    """The shape that a transformers configuration of GPT-NeoX or Llama describes; its vocabulary is left out.

    Raises:
        RecipeError: no such file, another architecture, or what training does not do (dropout, extra biases).
    """
    from mates.engine.config import RecipeError, require

    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(
            f"{path}: cannot be read as a transformers configuration ({type(error).__name__}: {error}). model.config or model.weights "
            "names it; every step of a run reads it"
        ) from error
    require(isinstance(raw, dict), str(path), raw, "a JSON object")
    family = raw.get("model_type")
    require(family in get_args(Family), f"{path}: model_type", family, "gpt_neox or llama")
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    for name in (*needed, "num_key_value_heads"):
        value = raw.get(name)
        is_size = type(value) is int and 0 < value <= LARGEST
        require(is_size or (value is None and name not in needed), f"{path}: {name}", value, f"a whole number from 1 to {LARGEST}")
    head_dim = raw["hidden_size"] // raw["num_attention_heads"]
    expected = NOT_TRAINED_WITH | {"attention_bias": family == "gpt_neox", "head_dim": head_dim}
    if family == "gpt_neox":
        expected["num_key_value_heads"] = raw["num_attention_heads"]
    for name, value in expected.items():
        found = raw.get(name)
        require(found is None or found == value, f"{path}: {name}", found, f"{value!r}")
    ties = raw.get("tie_word_embeddings", False)
    require(isinstance(ties, bool), f"{path}: tie_word_embeddings", ties, "true or false")
    return ModelShape(
        family=family,
        hidden_size=raw["hidden_size"],
        layers=raw["num_hidden_layers"],
        heads=raw["num_attention_heads"],
        kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        intermediate_size=raw["intermediate_size"],
        max_positions=raw["max_position_embeddings"],
        tie_embeddings=ties,
        settings={name: raw[name] for name in KEPT if name in raw},
    )


def resolve_shape(config: ModelConfig) -> ModelShape:
    """The shape that a recipe's ``model`` section asks for.

    Raises:
        RecipeError: unknown preset, a bad configuration file, heads that do not divide the width, or a field that the family does not have.
    """
    from mates.engine.config import require

    named = {name: getattr(config, name) for name in ("preset", "config", "weights") if getattr(config, name) is not None}
    require(len(named) <= 1, "model", named, "only one of preset, config and weights")
    if config.preset is not None:
        require(config.preset in PRESETS, "model.preset", config.preset, "one of " + ", ".join(PRESETS))
    file = config_file(config)
    base = read_shape(file) if file else PRESETS[config.preset] if config.preset else _SMALL
    asked = {
        name: getattr(config, name)
        for name in ("family", "hidden_size", "layers", "heads", "intermediate_size", "max_positions", "tie_embeddings")
        if getattr(config, name) is not None
    }
    require(config.weights is None or not asked, "model", asked, "nothing beside model.weights, whose config.json says the shape")
    if "hidden_size" in asked and "intermediate_size" not in asked:
        asked["intermediate_size"] = 4 * asked["hidden_size"]
    kept = base.kv_heads if "heads" not in asked and asked.get("family", base.family) == base.family else None
    shape = replace(base, **asked)
    shape = replace(shape, kv_heads=config.kv_heads or kept or shape.heads)
    require(
        shape.hidden_size % shape.heads == 0,
        "model.heads",
        shape.heads,
        f"a divisor of model.hidden_size = {shape.hidden_size}",
    )
    head_dim = shape.hidden_size // shape.heads
    rotary = 8 if shape.family == "gpt_neox" else 2  # GPT-NeoX turns a quarter of each head, in pairs
    require(
        head_dim % rotary == 0,
        "model.heads",
        shape.heads,
        f"a head width that is a multiple of {rotary} (here it is {head_dim})",
    )
    require(shape.heads % shape.kv_heads == 0, "model.kv_heads", shape.kv_heads, f"a divisor of model.heads = {shape.heads}")
    require(
        shape.family == "llama" or shape.kv_heads == shape.heads,
        "model.kv_heads",
        config.kv_heads,
        "null for gpt_neox, which has no grouped-query attention",
    )
    return shape

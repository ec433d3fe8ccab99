"""Known model shapes. No torch here: recipes are checked against shapes before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

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
}

_SMALL = ModelShape(family="gpt_neox", hidden_size=128, layers=4, heads=4, kv_heads=4, intermediate_size=512, max_positions=512)


def resolve_shape(config: ModelConfig) -> ModelShape:
    """The shape that a recipe's ``model`` section asks for.

    Raises:
        RecipeError: unknown preset, heads that do not divide the width, or a field that the family does not have.
    """
    from mates.engine.config import require

    if config.preset is not None:
        require(config.preset in PRESETS, "model.preset", config.preset, "one of " + ", ".join(PRESETS))
    base = PRESETS[config.preset] if config.preset else _SMALL
    asked = {
        name: getattr(config, name)
        for name in ("family", "hidden_size", "layers", "heads", "intermediate_size", "max_positions", "tie_embeddings")
        if getattr(config, name) is not None
    }
    if "hidden_size" in asked and "intermediate_size" not in asked:
        asked["intermediate_size"] = 4 * asked["hidden_size"]
    shape = replace(base, **asked)
    shape = replace(shape, kv_heads=config.kv_heads or shape.heads)
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

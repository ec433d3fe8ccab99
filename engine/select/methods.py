"""What the methods choose by, and how scores become a choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mates.engine.config import INFLUENCE_METHODS, Recipe
from mates.engine.layout import SHARED


@dataclass(frozen=True)
class Rule:
    """Which candidates are chosen by their scores: the ``low`` ones, the ``high`` ones or those in the ``middle`` of all.

    Above a ``temperature`` of 0 the choice is a sample (Gumbel-top-k), with probabilities ∝ exp(−score / temperature).
    """

    temperature: float = 0.0
    keep: Literal["low", "middle", "high"] = "low"


def needs_scores(method: str, stage: int) -> bool:
    """Whether a method's stage is chosen by scores."""
    return stage > 0 and method not in (SHARED, "random")


def needs_influences(method: str, stage: int) -> bool:
    """Whether these scores are an influence model's, which takes a probe and a fit."""
    return stage > 0 and method in INFLUENCE_METHODS


def rule_of(recipe: Recipe, method: str) -> Rule:
    """The rule of a method that chooses by scores."""
    config = recipe.baselines
    rules = {
        "mates": Rule(recipe.select.temperature),
        "dsir": Rule(1.0),  # scores are −ln of importance weights, which candidates are resampled by
        "perplexity": Rule(keep=config.perplexity_keep),
        "ratings": Rule(config.ratings_temperature, config.ratings_best),
    }
    return rules.get(method, Rule())

"""What the methods choose by, and how scores become a choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mates.engine.config import INFLUENCE_METHODS, Recipe
from mates.engine.layout import SHARED

STATIC = "mates-static"


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


def uses_influences(method: str, stage: int) -> bool:
    """Whether these scores are an influence model's."""
    return stage > 0 and method in INFLUENCE_METHODS


def model_stage(recipe: Recipe, method: str, stage: int) -> int:
    """The stage whose influence model scores the candidates of ``stage``: the last one that was probed for."""
    return 1 if method == STATIC else stage - (stage - 1) % recipe.probe.every


def needs_influences(recipe: Recipe, method: str, stage: int) -> bool:
    """Whether a stage has an influence model of its own, which takes a probe and a fit."""
    return uses_influences(method, stage) and model_stage(recipe, method, stage) == stage


def earlier_models(recipe: Recipe, stage: int) -> list[int]:
    """Stages before ``stage``, which has an influence model, that have one too; the last one first."""
    return list(range(stage - recipe.probe.every, 0, -recipe.probe.every))


def label_stages(recipe: Recipe, stage: int) -> list[int]:
    """Stages whose labels the influence model of ``stage`` is trained on: its own, and earlier ones."""
    return [stage, *earlier_models(recipe, stage)[: recipe.fit.earlier_labels]]


def rule_of(recipe: Recipe, method: str) -> Rule:
    """The rule of a method that chooses by scores."""
    config = recipe.baselines
    rules = {
        "mates": Rule(recipe.select.temperature),
        STATIC: Rule(recipe.select.temperature),
        "dsir": Rule(1.0),  # scores are −ln of importance weights, which candidates are resampled by
        "perplexity": Rule(keep=config.perplexity_keep),
        "ratings": Rule(config.ratings_temperature, config.ratings_best),
    }
    return rules.get(method, Rule())

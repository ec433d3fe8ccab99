"""From a YAML file and dotted overrides to a checked :class:`~mates.engine.config.Recipe`, and back."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from mates.engine.config import Recipe, RecipeError


def recipe_parser(verb: str, description: str) -> jsonargparse.ArgumentParser:
    """A parser for a recipe file with dotted overrides, and ``--print_config``."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=f"mates {verb}",
        description=description,
        usage=f"mates {verb} [RECIPE.yaml] [--dotted.name VALUE ...] [--print_config]",
        exit_on_error=False,
    )
    parser.add_argument("--recipe", action="config", help="Recipe file (YAML); the word --recipe may be left out. Later values win.")
    parser.add_class_arguments(Recipe, None)
    return parser


def with_recipe_option(arguments: list[str]) -> list[str]:
    """``mates run R.yaml …`` means ``mates run --recipe R.yaml …``."""
    if arguments and not arguments[0].startswith("-"):
        return ["--recipe", *arguments]
    return arguments


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, in the order of its fields."""
    return yaml.safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True)


def load_recipe(path: Path) -> Recipe:
    """A recipe from a file.

    Raises:
        RecipeError: an unknown key, a wrong type or an impossible value.
    """
    return parse_with(recipe_parser("recipe", ""), ["--recipe", str(path)])[0]


def parse_with(parser: jsonargparse.ArgumentParser, arguments: list[str]) -> tuple[Recipe, dict[str, Any]]:
    """The recipe and the verb's own options from command-line arguments. RecipeError as :func:`load_recipe`."""
    try:
        values = vars(parser.instantiate(parser.parse_args(with_recipe_option(arguments))))
    except jsonargparse.ArgumentError as error:
        raise RecipeError(str(error)) from error
    names = Recipe.__dataclass_fields__
    return Recipe(**{key: value for key, value in values.items() if key in names}), {
        key: value for key, value in values.items() if key not in names
    }

"""From a YAML file and dotted overrides to a checked :class:`~mates.engine.config.Recipe`, and back."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from mates.engine.config import Recipe, RecipeError, section_names
from mates.preprocess.artifact import atomic_file


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


def write_recipe(path: Path, recipe: Recipe) -> None:
    """Write a recipe as YAML, which :func:`load_recipe` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as handle:
        handle.write(dump_recipe(recipe).encode())


def load_recipe(path: Path) -> Recipe:
    """A recipe from a file.

    Raises:
        RecipeError: an unknown key, a wrong type or an impossible value.
    """
    return parse_with(recipe_parser("recipe", ""), ["--recipe", str(path)])[0]


def parse_with(parser: jsonargparse.ArgumentParser, arguments: list[str]) -> tuple[Recipe, dict[str, Any]]:
    """The recipe and the verb's own options from command-line arguments. RecipeError as :func:`load_recipe`.

    ``--print_config`` prints the resolved recipe, which reads back as it is, and exits.
    """
    arguments = with_recipe_option(arguments)
    asked_to_print = "--print_config" in arguments
    arguments = [argument for argument in arguments if argument != "--print_config"]
    for option, value in itertools.pairwise(arguments):
        if option == "--recipe":
            check_file(Path(value))
    try:
        values = vars(parser.instantiate(parser.parse_args(arguments)))
    except (jsonargparse.ArgumentError, TypeError) as error:
        raise RecipeError(str(error)) from error
    names = Recipe.__dataclass_fields__
    recipe = Recipe(**{key: value for key, value in values.items() if key in names})
    if asked_to_print:
        print(dump_recipe(recipe), end="")
        raise SystemExit(0)
    return recipe, {key: value for key, value in values.items() if key not in names}


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice: YAML would let the last one win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key_node.value!r} is there twice", key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def check_file(path: Path) -> None:
    """RecipeError, naming the file, for one that is no recipe: unreadable, not YAML, a key twice, or an empty section."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{path}: cannot be read as a recipe: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: found {type(raw).__name__}, expected a mapping of recipe fields")
    unknown = [str(key) for key in raw if key not in Recipe.__dataclass_fields__]
    if unknown:
        raise RecipeError(f"{path}: found {', '.join(unknown)}, expected only {', '.join(Recipe.__dataclass_fields__)}")
    for section in section_names():
        if section in raw and not isinstance(raw[section], dict):
            raise RecipeError(f"{path}: {section}: found {raw[section]!r}, expected a mapping of its fields (or leave the section out)")

"""Documentation leads to files that exist, and its recipes are recipes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mates.launchers.recipe import parse_with, recipe_parser

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("*/docs/*.md"), *REPOSITORY.glob("benchmarks/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
RECIPE = re.compile(r"```yaml\n(.*?)```", re.DOTALL)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings: lower case, hyphens for spaces, no other punctuation."""
    lines = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_recipes_are_recipes(tmp_path: Path) -> None:
    """Every field that is shown exists and takes the value shown. (Tiers, which extend one another, have tests of their own.)"""
    parser = recipe_parser("run", "")
    shown = [(page, text) for page in PAGES for text in RECIPE.findall(page.read_text(encoding="utf-8")) if not text.startswith("extends:")]
    assert len(shown) >= 5
    for page, text in shown:
        path = tmp_path / f"{page.stem}.yaml"
        path.write_text(text, encoding="utf-8")
        parse_with(parser, [str(path)])

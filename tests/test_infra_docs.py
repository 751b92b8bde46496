"""Commands in the pages: every package, subcommand, recipe, plan and option that they name exists."""

import re
from pathlib import Path

import pytest

from data_pipeline.plans import PLANS
from trainer.recipes import FAMILIES, RECIPES

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("infra/docs/*.md"), *ROOT.glob("infra/**/*.sh")])
COMMAND = re.compile(
    r"(?:python -m|--module) (model|data_pipeline|trainer|eval|infra) ([a-z][\w-]*)((?:[^`|#\n]|\\\n)*)", re.MULTILINE
)
PLACEHOLDER = re.compile(r"[A-Z\"$<{]|\.\.\.|.*\.(yaml|json)$")


def commands(page: Path) -> list[tuple[str, str, str]]:
    """Package, subcommand, the rest of the line (continuation lines joined)."""
    return COMMAND.findall(re.sub(r"\\\n\s*", " ", page.read_text()))


def sources(package: str) -> str:
    return "\n".join(path.read_text() for path in (ROOT / package).rglob("*.py"))


@pytest.fixture(scope="module")
def code() -> dict[str, str]:
    return {name: sources(name) for name in ("model", "data_pipeline", "trainer", "eval", "infra")}


def test_the_pages_have_commands():
    assert sum(len(commands(page)) for page in PAGES) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page, code):
    for package, subcommand, rest in commands(page):
        where = f"{package} {subcommand}{rest}"
        main = (ROOT / package / "__main__.py").read_text()
        assert re.search(rf"\b{subcommand.replace('-', '[-_]')}\b", main), where
        words = rest.split()
        first = words[0] if words and not words[0].startswith("-") else None
        known = {("trainer", "train"): RECIPES, ("trainer", "ladder"): FAMILIES, ("data_pipeline", "run"): PLANS}
        names = known.get((package, subcommand))
        if names is not None and first is not None and not PLACEHOLDER.match(first):
            assert first in names, where
        for option in re.findall(r"(?<!\S)--([a-z][a-z0-9.-]*)", rest.split(" -- ")[0]):
            for part in option.removeprefix("no-").split("."):
                assert re.search(rf"\b{part.replace('-', '_')}\b|--{part}\b", code[package]), (option, where)

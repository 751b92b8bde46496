"""Writes infra/docs/recipes.md from the recipes themselves: `python tests/recipes_page.py` (seconds)."""

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from trainer.recipe import Recipe
from trainer.recipes import FAMILIES, RECIPES

PAGE = Path(__file__).parent.parent / "infra" / "docs" / "recipes.md"
LABELS = ("Command", "Hardware and time", "Expected", "From the paper", "Our choice")
HEAD = """\
# Recipes

A recipe is a complete description of a run: a Python function that returns a frozen dataclass. This page is written
from the recipes themselves (`python tests/recipes_page.py`); a test holds the two equal.

    python -m trainer train NAME --data URI --out RUN
    python -m trainer train NAME --data URI --out RUN --images 12000 --optimizer.lr 1e-4 --precision fp32
    python -m trainer plan NAME --gpus 64 --gpu h100-80

Each field is an option of the same name; `python -m trainer train NAME --help` lists them. The resolved recipe is
written to `RUN/recipe.json`, and its hash keys every result.

A ladder is a recipe with depth as its dial: width 64 * depth, as many heads as depth. `python -m trainer ladder LADDER
--depths 2 3 4` trains its rungs. Ladders: LADDERS.

In the tables, images and batch count pairs where a recipe trains on preferences. Parameters are those that train.
"""


def build_page() -> str:
    ladders = ", ".join(f"`{name}`" for name in FAMILIES)
    parts = [fill(HEAD.replace("LADDERS.", ladders + "."))]
    groups: dict[Callable[..., Recipe], list[str]] = {}
    for name, build in RECIPES.items():
        groups.setdefault(build.func if isinstance(build, partial) else build, []).append(name)
    for build, names in groups.items():
        parts += section(build, names)
    return "\n".join(parts).rstrip() + "\n"


def section(build: Callable[..., Recipe], names: list[str]) -> Iterator[str]:
    """The docstring's first sentence is the heading; its `Word: text` lines become a list."""
    first, _, rest = inspect.cleandoc(build.__doc__ or "").partition("\n\n")
    title, _, more = " ".join(first.split()).partition(": ")
    yield f"## {title.rstrip('.')}\n"
    if more:
        yield fill(more[0].upper() + more[1:]) + "\n"
    for label, text in labelled(rest):
        if label == "Command":
            yield "\n".join(f"    {line}" for line in commands(text)) + "\n"
        else:
            yield fill(f"- **{label}.** {sentence(text)}")
    yield "\n| recipe | depth | parameters | pixels | images | batch | steps | precision | objective |"
    yield "|---|---:|---:|---:|---:|---:|---:|---|---|"
    for name in names:
        recipe = RECIPES[name]()
        yield (
            f"| `{name}` | {recipe.model.depth} | {recipe.trained_parameters:,} | {recipe.data.resolution} "
            f"| {recipe.images:,} | {recipe.global_batch:,} | {recipe.steps:,} | {recipe.precision} "
            f"|{recipe.objective} `{recipe.formulation}`|"
        )
    yield ""


def labelled(text: str) -> list[tuple[str, str]]:
    """A docstring's `Label: text` parts; a label may carry a remark in parentheses."""
    parts = re.split(rf"(?:^|\s)((?:{'|'.join(LABELS)})(?: \([^)]*\))?): ", text)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def sentence(text: str) -> str:
    """On one line, with a capital and with links to committed runs."""

    def link(found: re.Match[str]) -> str:
        path = Path(found[1])
        return f"[{path}]({path if path.suffix else path / 'README.md'})"

    told = " ".join(text.split())
    told = re.sub(r"infra/docs/(runs/[\w/]+(?:\.md)?)", link, told)
    return told[0].upper() + told[1:]


def commands(text: str) -> list[str]:
    """One command a line; lines that continue one are joined with a backslash."""
    found: list[str] = []
    for line in text.strip().split("\n"):
        starts = re.match(r"\s*(python|deepspeed|torchrun|bash)\b", line)
        found.append(line.strip() if starts or not found else f"    {line.strip()}")
    return [line + " \\" if after.startswith("    ") else line for line, after in zip(found, [*found[1:], ""])]


def fill(text: str) -> str:
    """Paragraphs of at most 120 columns; indented lines stay."""
    blocks = text.split("\n\n")
    return "\n\n".join(
        block if block.startswith(("    ", "#")) or len(block) <= 118 else
        textwrap.fill(" ".join(block.split()), 118, subsequent_indent="  " if block.startswith("- ") else "",
                      break_long_words=False, break_on_hyphens=False)
        for block in blocks
    )  # fmt: skip


if __name__ == "__main__":
    PAGE.write_text(build_page())

"""Fields of a recipe on the command line, `--optimizer.lr 1e-4 --precision fp32`, in the same way for every command.

A command that trains many runs passes these words on, unchanged, to the command of each run.
"""

import re
from collections.abc import Collection, Sequence
from typing import Any

from data_pipeline.selection.choice import DataChoice
from infra.cli import UsageError, parse
from trainer.recipe import Recipe


def override_recipe(recipe: Recipe, words: Sequence[str]) -> Recipe:
    """The recipe with the fields changed that the words name; UsageError for an unknown field or an impossible
    value."""
    return parse(Recipe, expand_exponents(words), prog=f"recipe {recipe.name}", default=recipe)


def drop_options(words: Sequence[str], names: Collection[str]) -> list[str]:
    """The words without the options of these names (such as `num_ranks`) and without their values."""
    kept, skip = [], False
    for word in words:
        if word.startswith("--"):
            skip = word[2:].partition("=")[0].replace("-", "_") in names
        if not skip:
            kept.append(word)
    return kept


def refuse_decided(words: Sequence[str], decided: dict[str, str]) -> None:
    """UsageError for a field that another option of the command sets: `decided` is {"model.depth": "--depths"}."""
    for word in words:
        field = word.removeprefix("--").partition("=")[0].replace("_", "-")
        if word.startswith("--") and field in decided:
            raise UsageError(f"{decided[field]} decides it: omit --{field}")


def expand_exponents(words: Sequence[str]) -> list[str]:
    """The words with whole numbers written out: `--images 2e9` becomes `--images 2000000000`, which an int field
    takes."""

    def whole(found: re.Match[str]) -> str:
        return f"{float(found[0]):.0f}" if float(found[0]).is_integer() else found[0]

    return [re.sub(r"(^|(?<==))\d+(\.\d+)?[eE]\d+$", whole, word) for word in words]


def list_option_names(kind: Any) -> set[str]:
    """Names of the options of the command `kind` (a dataclass) other than the fields of its recipe."""
    return {*kind.__dataclass_fields__, *DataChoice.__dataclass_fields__} - {"recipe"}

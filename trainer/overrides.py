"""Fields of a recipe as words of a command line: `--optimizer.lr 1e-4 --precision fp32`, the same in every command.

A command that trains many runs hands the words on to the command of each run, as a person would type them there.
"""

import re
from collections.abc import Collection, Sequence
from typing import Any

from infra.cli import UsageError, parse
from trainer.recipe import Recipe


def override_recipe(recipe: Recipe, words: Sequence[str]) -> Recipe:
    """The recipe with the fields that the words name; UsageError for what is no field or no value of it."""
    return parse(Recipe, whole_numbers(words), prog=f"recipe {recipe.name}", default=recipe)


def without_options(words: Sequence[str], names: Collection[str]) -> list[str]:
    """The words less the options of these names (`num_ranks`) and their values."""
    kept, skip = [], False
    for word in words:
        if word.startswith("--"):
            skip = word[2:].partition("=")[0].replace("-", "_") in names
        if not skip:
            kept.append(word)
    return kept


def refuse_decided(words: Sequence[str], decided: dict[str, str]) -> None:
    """UsageError for a field that the command itself decides: {"model.depth": "--depths"}."""
    for word in words:
        field = word.removeprefix("--").partition("=")[0].replace("_", "-")
        if word.startswith("--") and field in decided:
            raise UsageError(f"{decided[field]} decides it: omit --{field}")


def whole_numbers(words: Sequence[str]) -> list[str]:
    """`--images 2e9` as people write it."""

    def whole(found: re.Match[str]) -> str:
        return f"{float(found[0]):.0f}" if float(found[0]).is_integer() else found[0]

    return [re.sub(r"(^|(?<==))\d+(\.\d+)?[eE]\d+$", whole, word) for word in words]


def option_names(kind: Any, *, of_recipe: str = "recipe") -> set[str]:
    """The options of a command that are not its recipe's."""
    return set(kind.__dataclass_fields__) - {of_recipe}

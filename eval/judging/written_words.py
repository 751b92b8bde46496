"""Prompts that ask for written words: which words those are, our own eighty prompts, and a user's file of them."""

import re
from pathlib import Path

from eval.judging.metric import Prompt
from eval.judging.prompt_files import read_prompts
from infra.errors import UserError

# In double quotes, in curly ones, or in single ones that no letter touches from outside (those are apostrophes).
_QUOTED = re.compile("\"([^\"]+)\"|\u201c([^\u201d]+)\u201d|(?<!\\w)'([^']+)'(?!\\w)")
TEMPLATES = (
    'a photo of a sign that says "{}"',
    'a white T-shirt with the words "{}" printed on it',
    'a poster with "{}" written in big letters',
    'a chalkboard on which "{}" is written',
    'a neon light that reads "{}"',
)
WORDS = (
    "HELLO", "OPEN", "CAFE", "STOP", "MUSIC", "GARDEN", "WELCOME HOME", "KEEP CALM", "FRESH BREAD", "NO ENTRY",
    "HAPPY BIRTHDAY", "SLOW DOWN", "BOOK SHOP", "TWO FOR ONE", "MIND THE GAP", "SEE YOU SOON",
)  # fmt: skip


def find_quoted_words(prompt: str) -> str:
    """The words that a prompt asks for: its quoted parts, joined by spaces; "" if it quotes nothing."""
    return " ".join(next(part for part in groups if part) for groups in _QUOTED.findall(prompt))


def normalize_text(text: str) -> str:
    """The text as it is compared: letters and digits in lower case, single spaces between words, nothing else."""
    return " ".join(re.sub(r"[^\w\s]|_", "", text.lower()).split())


def list_typography_prompts(count: int | None = None) -> list[Prompt]:
    """The first `count` (None: all 80) of our own prompts: each entry of WORDS once with each of TEMPLATES, in a fixed
    order in which neighbours differ in both."""
    pairs = [(template, words) for n in range(len(TEMPLATES)) for words, template in zip(WORDS, _rotate_templates(n))]
    return [Prompt(template.format(words), "typography") for template, words in pairs[:count]]


def _rotate_templates(start: int) -> list[str]:
    return [TEMPLATES[(start + i) % len(TEMPLATES)] for i in range(len(WORDS))]


def read_prompts_with_words(path: str | Path, count: int | None) -> list[Prompt]:
    """The first `count` (None: all) prompts of a file; UserError where one quotes no words to be written."""
    prompts = read_prompts(path, count)
    unquoted = next((prompt.text for prompt in prompts if not normalize_text(find_quoted_words(prompt.text))), None)
    if unquoted is not None:
        raise UserError(f"{path}: {unquoted!r} quotes no words to be written; expected prompts like {TEMPLATES[0]!r}")
    return [Prompt(prompt.text, "typography", source=prompt.source) for prompt in prompts]

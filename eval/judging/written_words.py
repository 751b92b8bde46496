"""Prompts that ask for written words: which words those are, our own eighty prompts, and a user's file of them."""

import re
from pathlib import Path

from eval.judging.metric import Prompt
from eval.judging.prompt_files import read_prompts
from infra.errors import UserError

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
    """What a prompt wants to be written: its quoted parts, joined by spaces."""
    return " ".join(next(part for part in groups if part) for groups in _QUOTED.findall(prompt))


def normalize_text(text: str) -> str:
    """Letters and digits in lower case, words parted by single spaces: what is compared."""
    return " ".join(re.sub(r"[^\w\s]|_", "", text.lower()).split())


def list_typography_prompts(count: int | None = None) -> list[Prompt]:
    """Our own prompts: each words once with each template, in a fixed order that mixes both."""
    pairs = [(template, words) for n in range(len(TEMPLATES)) for words, template in zip(WORDS, _rotate_templates(n))]
    return [Prompt(template.format(words), "typography") for template, words in pairs[:count]]


def _rotate_templates(start: int) -> list[str]:
    return [TEMPLATES[(start + i) % len(TEMPLATES)] for i in range(len(WORDS))]


def read_prompts_with_words(path: str | Path, count: int | None) -> list[Prompt]:
    """Prompts of a file, each of which must quote the words that it asks for."""
    found = read_prompts(path, count)
    silent = next((prompt.text for prompt in found if not normalize_text(find_quoted_words(prompt.text))), None)
    if silent is not None:
        raise UserError(f"{path}: {silent!r} quotes no words to be written; expected prompts like {TEMPLATES[0]!r}")
    return [Prompt(prompt.text, "typography", source=prompt.source) for prompt in found]

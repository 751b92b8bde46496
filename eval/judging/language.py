"""What is read out of a prompt: noun chunks, objects, counts, places. By spaCy, or by the prompt grammar.

The grammar reader serves prompts whose wording is known (the world's templates); anything else needs a spaCy model.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from infra.errors import UserError

LOCALITIES_2D = (
    "on side of", "next to", "near", "on the left of", "on the right of",
    "on the bottom of", "on the top of", "on top of",
)  # fmt: skip
LOCALITIES_3D = ("in front of", "behind", "hidden")
ONES = ("a", "an", "one")
NUMBER_WORDS = {
    word: value for value, word in enumerate(("one", "two", "three", "four", "five", "six", "seven", "eight"), 1)
}
Pair = tuple[str | None, str | None]


class PromptReader(Protocol):
    """Reads a prompt for T2I-CompBench. `version` names the grammar or the model, and enters protocol hashes."""

    version: str

    def noun_chunks(self, prompt: str) -> list[str]:
        """`a photo of a red dog` -> [`a photo`, `a red dog`], as the reader parts it."""
        ...

    def tokens(self, prompt: str) -> list[str]:
        """The words."""
        ...

    def pair(self, prompt: str, *, complex_prompt: bool = False) -> Pair:
        """The two objects between which the prompt states a relation."""
        ...

    def locality(self, prompt: str) -> str | None:
        """The relation, in T2I-CompBench's words (LOCALITIES_2D)."""
        ...

    def without_adjectives(self, prompt: str) -> str:
        """The prompt for CLIP in complex categories."""
        ...


GRAMMAR_LOCALITIES = {
    "left of": "on the left of",
    "right of": "on the right of",
    "above": "on the top of",
    "below": "on the bottom of",
}


def find_locality(prompt: str, vocabulary: Sequence[str] = LOCALITIES_2D) -> str | None:
    """The first phrase of the vocabulary, in its order, that occurs anywhere in the prompt."""
    return next((phrase for phrase in vocabulary if phrase in prompt), None)


class GrammarReader:
    """Reads `a photo of <phrase> [<relation or and> <phrase>]`: objects by name, colors by word, no model."""

    version = "grammar/1"

    def __init__(self, names: Sequence[str], colors: Sequence[str]) -> None:
        longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        counts = "|".join((*ONES, *NUMBER_WORDS, "the"))
        self._object = re.compile(rf"\b(?:{longest_first})\b")
        self._chunk = re.compile(rf"\b(?:{counts})\s+(?:\w+\s+)??(?:{longest_first})\b")
        self._colors = re.compile(rf"\b(?:{'|'.join(map(re.escape, colors))})\b\s*")

    def noun_chunks(self, prompt: str) -> list[str]:
        return self._chunk.findall(prompt)

    def tokens(self, prompt: str) -> list[str]:
        return re.findall(r"\w+", prompt)

    def pair(self, prompt: str, *, complex_prompt: bool = False) -> Pair:
        found = self._object.findall(prompt)
        return (found[0], found[-1]) if len(found) >= 2 else (None, None)

    def locality(self, prompt: str) -> str | None:
        return next((name for phrase, name in GRAMMAR_LOCALITIES.items() if phrase in prompt), None)

    def without_adjectives(self, prompt: str) -> str:
        return self._colors.sub("", prompt)


class SpacyReader:
    """The official reading, by a spaCy pipeline (en_core_web_sm there) given by name, path or as a callable."""

    _PREPOSITIONS = ("on top of", "on bottom of", "on the left", "on the right", "next to", "on side of", "near")

    def __init__(self, nlp: str | Callable[[str], Any]) -> None:
        if isinstance(nlp, str):
            try:
                import spacy

                loaded = spacy.load(nlp)
            except (ImportError, OSError) as error:
                raise UserError(
                    f"no spaCy model {nlp!r}: install it (python -m spacy download en_core_web_sm) or give its folder"
                ) from error
            self.version = f"spacy/{loaded.meta['name']}-{loaded.meta['version']}"
            self._nlp: Callable[[str], Any] = loaded
        else:
            self.version, self._nlp = "spacy/callable", nlp

    def noun_chunks(self, prompt: str) -> list[str]:
        return [chunk.text for chunk in self._nlp(prompt).noun_chunks]

    def tokens(self, prompt: str) -> list[str]:
        return [token.text for token in self._nlp(prompt)]

    def pair(self, prompt: str, *, complex_prompt: bool = False) -> Pair:
        doc = self._nlp(prompt)
        found = self._join_around_prepositions(doc) if complex_prompt else [t.text for t in doc if t.pos_ == "NOUN"]
        if complex_prompt:
            return (found[0], found[1]) if len(found) == 2 else (None, None)
        return (found[0], found[-1]) if found else (None, None)

    def locality(self, prompt: str) -> str | None:
        return find_locality(prompt, LOCALITIES_2D)

    def without_adjectives(self, prompt: str) -> str:
        return " ".join(token.text for token in self._nlp(prompt) if token.pos_ != "ADJ")

    def _join_around_prepositions(self, doc: Any) -> list[str]:
        """Nearest noun (or proper noun) before, first noun after each preposition: the official --complex branch."""
        found: list[str] = []
        for i in range(len(doc)):
            width = next((k for k in (3, 2, 1) if doc[i : i + k].text in self._PREPOSITIONS), 0)
            if not width:
                continue
            found.extend([t.text for t in reversed(doc[:i]) if t.pos_ in ("NOUN", "PROPN")][:1])
            after = doc[i + width :]
            nouns = [t.text for t in after if t.pos_ == "NOUN"]
            found.extend(nouns[:1])
            if not nouns:
                names = [a.text for a, b in itertools.pairwise(after) if a.pos_ == "PROPN" and b.pos_ != "PROPN"]
                found.extend(names[:1])
        return found

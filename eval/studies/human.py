"""Two checkpoints judged by people: the same prompts at the same seeds, blind, every answer kept, win rates at the end.

RUNS/human/study-NAME/study.json says what is compared; votes/ holds one object per rater and pair, put only if absent:
a second answer to the same pair is refused, whoever sends it. Left and right are drawn per rater and pair.
"""

import hashlib
import json
import math
import re
import secrets
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from infra import storage
from infra.codec import from_json, to_json
from infra.errors import MissingError, UserError, nearest
from infra.log import get_logger
from infra.results import format_now

log = get_logger("human")

# The three questions of the paper's study (its Figure 7).
QUESTIONS = {
    "prompt_following": "Which picture shows better what the prompt says?",
    "aesthetics": "Which picture looks better?",
    "typography": "Which picture writes the quoted words better?",
}
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}$")
_QUOTED = re.compile(r"\"[^\"]+\"|'[^']+'(?![a-z])|\u201c[^\u201d]+\u201d")
Z = 1.959964


@dataclass(frozen=True)
class StudySide:
    """One of the two checkpoints that raters compare."""

    run: str
    step: int


@dataclass(frozen=True)
class HumanStudy:
    """`prompts` are the gallery's tiles in order; `secret` hides which side is which until the end."""

    name: str
    a: StudySide
    b: StudySide
    prompts: tuple[str, ...]
    questions: tuple[str, ...]
    gallery: str
    secret: str
    created: str

    def __post_init__(self) -> None:
        for question in self.questions:
            if question not in QUESTIONS:
                known = ", ".join(QUESTIONS)
                raise UserError(f"unknown question {question!r}; known: {known}{nearest(question, QUESTIONS)}")
        if self.a == self.b:
            raise UserError("both sides are the same checkpoint: choose two different ones")
        if not self.order(""):
            raise UserError("nothing to ask: no prompt quotes words, and typography is the only question")

    def list_questions(self, item: int) -> tuple[str, ...]:
        """Typography is asked only where the prompt quotes words."""
        quoted = bool(_QUOTED.search(self.prompts[item]))
        return tuple(question for question in self.questions if question != "typography" or quoted)

    def order(self, rater: str) -> list[int]:
        """Each rater's own order of the pairs."""
        items = [item for item in range(len(self.prompts)) if self.list_questions(item)]
        return sorted(items, key=lambda item: self._draw("order", rater, item))

    def choose_left(self, rater: str, item: int) -> Literal["a", "b"]:
        """Which side this rater sees on the left of this pair."""
        return "a" if self._draw("side", rater, item)[0] % 2 else "b"

    def _draw(self, purpose: str, rater: str, item: int) -> bytes:
        return hashlib.sha256(json.dumps([self.secret, purpose, rater, item]).encode()).digest()


@dataclass(frozen=True)
class Vote:
    """One rater's answers to one pair, as sides of the study: a, b or same."""

    rater: str
    item: int
    answers: Mapping[str, Literal["a", "b", "same"]]
    left: Literal["a", "b"] | None = None  # what this rater saw there
    study: str = ""
    created: str = ""


@dataclass(frozen=True)
class WinRate:
    """Share of answers that a wins (ties count half); `prompts` are the independent units of the interval."""

    question: str
    value: float | None
    low: float | None
    high: float | None
    wins_a: int
    wins_b: int
    ties: int
    prompts: int
    raters: int


class HumanStudies:
    """The studies under one folder of runs."""

    def __init__(self, runs: str) -> None:
        self.root = storage.join(runs.rstrip("/") or runs, "human")
        self._votes: dict[str, Vote | None] = {}  # objects never change, so each is read once

    def list_names(self) -> list[str]:
        """Names of all studies, sorted."""
        found = [uri.removeprefix(self.root + "/") for uri in storage.list_files(self.root, suffix="/study.json")]
        return sorted(path.split("/")[0].removeprefix("study-") for path in found if path.startswith("study-"))

    def get(self, name: str) -> HumanStudy:
        """UserError for a name that nobody created, and for a file that is no study."""
        if not _NAME.match(name):
            raise UserError(f"study {name!r}: expected small letters, digits and dashes, at most 40")
        try:
            data = storage.read_bytes(self._locate(name, "study.json"))
        except MissingError as error:
            raise UserError(f"no study named {name!r}{nearest(name, self.list_names())}") from error
        return replace(from_json(HumanStudy, data, where=self._locate(name, "study.json")), name=name)

    def create(self, name: str, a: StudySide, b: StudySide, *, prompts: Sequence[str], gallery: str,
               questions: Sequence[str] = tuple(QUESTIONS)) -> HumanStudy:  # fmt: skip
        """A new study; an existing name is refused, for its votes would mix with others."""
        if not _NAME.match(name):
            raise UserError(f"study {name!r}: expected small letters, digits and dashes, at most 40")
        study = HumanStudy(name, a, b, tuple(prompts), tuple(questions), gallery, secrets.token_hex(16), format_now())
        data = json.dumps(to_json(study), indent=1).encode()
        if not storage.write_bytes_if_absent(self._locate(name, "study.json"), data):
            raise UserError(f"a study named {name!r} is there already: choose another name")
        return study

    def vote(self, study: HumanStudy, rater: str, item: int, answers: Mapping[str, str]) -> bool:
        """Keep one rater's answers to one pair (left, right or same); False when there were some already."""
        rater = clean_rater(rater)
        if item not in study.order(rater):
            raise UserError(f"study {study.name} has no pair {item}")
        questions = study.list_questions(item)
        if set(answers) != set(questions) or not set(answers.values()) <= {"left", "right", "same"}:
            raise UserError(f"expected left, right or same for each of: {', '.join(questions)}")
        left = study.choose_left(rater, item)
        sides: dict[str, Literal["a", "b", "same"]]
        sides = {"left": left, "right": "b" if left == "a" else "a", "same": "same"}
        meant = {question: sides[choice] for question, choice in answers.items()}
        vote = Vote(rater, item, meant, left, study.name, format_now())
        data = json.dumps(to_json(vote)).encode()
        return storage.write_bytes_if_absent(self._locate(study.name, "votes", _name_vote(rater, item)), data)

    def read_votes(self, study: HumanStudy) -> list[Vote]:
        """All answers so far; torn ones are left out with a warning."""
        uris = storage.list_files(self._locate(study.name, "votes"), suffix=".json", recursive=False)
        for uri in uris:
            if uri not in self._votes:
                self._votes[uri] = _read_vote(uri, study)
        return [vote for uri in uris if (vote := self._votes[uri]) is not None]

    def find_next(self, study: HumanStudy, rater: str) -> tuple[int | None, int, int]:
        """(the rater's next pair or None, pairs done, pairs in all)."""
        rater = clean_rater(rater)
        order = study.order(rater)
        done = {vote.item for vote in self.read_votes(study) if vote.rater == rater}
        return next((item for item in order if item not in done), None), len(done & set(order)), len(order)

    def compute_results(self, study: HumanStudy) -> list[WinRate]:
        """One win rate per question."""
        votes = self.read_votes(study)
        return [compute_win_rate(question, votes) for question in study.questions]

    def _locate(self, name: str, *parts: str) -> str:
        return storage.join(self.root, f"study-{name}", *parts)


def compute_win_rate(question: str, votes: Sequence[Vote]) -> WinRate:
    """Wilson's interval with the sample size that the spread between prompts leaves (Korn and Graubard 1998).

    Several answers to one prompt are not independent. Where all answers agree there is no spread to measure, and every
    prompt counts once.
    """
    worth = {"a": 1.0, "b": 0.0, "same": 0.5}
    answers = [(vote.item, vote.answers[question], vote.rater) for vote in votes if question in vote.answers]
    counts = [sum(1 for _, answer, _ in answers if answer == side) for side in ("a", "b", "same")]
    prompts: dict[int, list[float]] = {}
    for item, answer, _ in answers:
        prompts.setdefault(item, []).append(worth[answer])
    raters = len({rater for _, _, rater in answers})
    if not answers:
        return WinRate(question, None, None, None, 0, 0, 0, 0, 0)
    rate = sum(sum(values) for values in prompts.values()) / len(answers)
    low, high = wilson(rate, estimate_effective_size(list(prompts.values()), rate))
    return WinRate(question, rate, low, high, counts[0], counts[1], counts[2], len(prompts), raters)


def estimate_effective_size(clusters: Sequence[Sequence[float]], mean: float) -> float:
    """How many independent answers know as much, at most as many as there are answers.

    Kish's effective size, less what is lost because a few prompts measure their own spread badly: (z / t)^2 with
    clusters - 1 degrees of freedom.
    """
    total, number = sum(map(len, clusters)), len(clusters)
    if number < 2 or mean in (0.0, 1.0):
        return float(number)
    spread = sum((sum(values) - len(values) * mean) ** 2 for values in clusters) * number / (number - 1) / total**2
    if spread <= 0:
        return float(number)
    from scipy.stats import t

    return min(mean * (1 - mean) / spread * (Z / float(t.ppf(0.975, number - 1))) ** 2, float(total))


def wilson(rate: float, size: float) -> tuple[float, float]:
    """95 % score interval of a share."""
    middle = (rate + Z**2 / (2 * size)) / (1 + Z**2 / size)
    half = Z / (1 + Z**2 / size) * math.sqrt(rate * (1 - rate) / size + Z**2 / (4 * size**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def clean_rater(rater: str) -> str:
    """A rater's name as it is kept: trimmed, in small letters (a phone writes Ann where a desk writes ann).

    Empty, long and unprintable ones are refused.
    """
    rater = unicodedata.normalize("NFC", " ".join(rater.split()).casefold())
    if not rater or len(rater) > 60 or not rater.isprintable():
        raise UserError("give a name of 1 to 60 printable characters, the same each time")
    return rater


def _read_vote(uri: str, study: HumanStudy) -> Vote | None:
    """A stored vote; None, with a warning, for a damaged file and for one that the service did not write."""
    try:
        vote = from_json(Vote, storage.read_bytes(uri), where=uri)
        if 0 <= vote.item < len(study.prompts) and uri.endswith("/" + _name_vote(vote.rater, vote.item)):
            return vote
    except UserError:
        pass
    log.warning("skipped %s: not a vote of this study (torn or edited); delete it", uri)
    return None


def _name_vote(rater: str, item: int) -> str:
    return hashlib.sha256(json.dumps([rater, item]).encode()).hexdigest()[:32] + ".json"

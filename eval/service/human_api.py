"""Pictures side by side: create a study, hand out blind pairs, keep answers, give win rates."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel, Field

from eval.service.answers import JsonAnswer, WebpAnswer, answer_webp, describe_refusals, or_refuse
from eval.service.gallery import GallerySheet, read_sheet
from eval.service.index import Index
from eval.service.pictures_api import cut_tile
from eval.studies.human import QUESTIONS, HumanStudies, HumanStudy, StudySide, WinRate, clean_rater
from infra.errors import UserError
from infra.log import get_logger

log = get_logger("human")
T = TypeVar("T")
MISTAKE = describe_refusals(_400="no such study, or something that it does not allow; the text says what")


class NewStudy(BaseModel):
    """Two checkpoints whose galleries show the same prompts at the same seeds."""

    name: str = Field(description="small letters, digits and dashes")
    run_a: str
    step_a: int
    run_b: str
    step_b: int
    questions: list[str] = Field(default_factory=lambda: list(QUESTIONS))


class NewVote(BaseModel):
    """One rater's answers to one pair: left, right or same for every question asked."""

    study: str
    rater: str
    item: int
    answers: dict[str, str]


@dataclass(frozen=True)
class StudyLine:
    """`runs`: the two checkpoints, in an order that does not tell which is a."""

    name: str
    runs: list[str]
    pairs: int
    questions: tuple[str, ...]
    created: str


@dataclass(frozen=True)
class StudyList:
    """`questions`: all that can be asked -> the words a rater sees."""

    studies: list[StudyLine]
    unreadable: list[str]
    questions: dict[str, str]


@dataclass(frozen=True)
class NextPair:
    """`item` is null when this rater has seen all pairs; then there is nothing to ask."""

    item: int | None
    done: int
    total: int
    prompt: str
    questions: dict[str, str]


@dataclass(frozen=True)
class VoteReceipt:
    kept: bool


@dataclass(frozen=True)
class StudyResults(StudyLine):
    """`runs` as in `StudyLine`; `a` and `b` say which is which."""

    a: StudySide
    b: StudySide
    rates: list[WinRate]


def add_human_routes(app: FastAPI, index: Index) -> None:
    studies = HumanStudies(index.uri)

    @app.get("/api/human/studies", response_model=StudyList, tags=["side by side"],
             summary="All studies, without their results")  # fmt: skip
    def listed() -> Response:
        found: list[StudyLine] = []
        unreadable: list[str] = []
        for name in or_400(studies.list_names):
            try:
                found.append(describe_study(studies.get(name)))
            except UserError as error:  # one torn study hides no other
                unreadable.append(str(error))
        return JsonAnswer(StudyList(found, unreadable, QUESTIONS))

    @app.post("/api/human/studies", response_model=StudyLine, tags=["side by side"],
              summary="Begin a study of two checkpoints", status_code=201, responses=MISTAKE)  # fmt: skip
    def create(wanted: NewStudy) -> Response:
        sides = StudySide(wanted.run_a, wanted.step_a), StudySide(wanted.run_b, wanted.step_b)
        sheets = or_400(lambda: [read_sheet(_find_gallery(index, side)) for side in sides])
        study = or_400(lambda: _create_study(studies, wanted, sides, sheets))
        return JsonAnswer(describe_study(study), 201)

    @app.get("/api/human/next", response_model=NextPair, tags=["side by side"],
             summary="A rater's next pair, blind", responses=MISTAKE)  # fmt: skip
    def following(study: str, rater: str) -> Response:
        found = or_400(lambda: studies.get(study))
        item, done, total = or_400(lambda: studies.find_next(found, rater))
        if item is None:
            return JsonAnswer(NextPair(None, done, total, "", {}))
        questions = {question: QUESTIONS[question] for question in found.list_questions(item)}
        return JsonAnswer(NextPair(item, done, total, found.prompts[item], questions))

    @app.get("/api/human/picture", tags=["side by side"], summary="The left or right picture of a pair, as WEBP",
             response_class=WebpAnswer, responses=MISTAKE | describe_refusals(_404="no such pair"))  # fmt: skip
    def picture(study: str, rater: str, item: int, side: Literal["left", "right"]) -> Response:
        found = or_400(lambda: studies.get(study))
        if item not in range(len(found.prompts)):
            raise HTTPException(404, "no such pair")
        left = found.choose_left(or_400(lambda: clean_rater(rater)), item)
        pair = or_400(lambda: _cut_pair(index, found, item))
        shown = "a" if (side == "left") == (left == "a") else "b"
        return answer_webp(lambda: pair[shown], cache="no-store", status=400)

    @app.post("/api/human/votes", response_model=VoteReceipt, tags=["side by side"],
              summary="Keep a rater's answers; a second time is refused", status_code=201,
              responses=MISTAKE | describe_refusals(_409="this rater answered this pair before"))  # fmt: skip
    def vote(new_vote: NewVote) -> Response:
        found = or_400(lambda: studies.get(new_vote.study))
        if not or_400(lambda: studies.vote(found, new_vote.rater, new_vote.item, new_vote.answers)):
            raise HTTPException(409, "this rater has answered this pair already; the first answer stands")
        return JsonAnswer(VoteReceipt(True), 201)

    @app.get("/api/human/results", response_model=StudyResults, tags=["side by side"],
             summary="Win rates with intervals (no longer blind)", responses=MISTAKE)  # fmt: skip
    def results(study: str) -> Response:
        found = or_400(lambda: studies.get(study))
        rates = or_400(lambda: studies.compute_results(found))
        return JsonAnswer(StudyResults(**vars(describe_study(found)), a=found.a, b=found.b, rates=rates))


def _create_study(
    studies: HumanStudies, wanted: NewStudy, sides: tuple[StudySide, StudySide], sheets: list[GallerySheet]
) -> HumanStudy:
    if sheets[0].key != sheets[1].key:
        raise UserError("these galleries differ in prompts, seeds or sampler, so their pictures are not comparable")
    prompts = [tile.prompt for tile in sheets[0].tiles]
    return studies.create(
        wanted.name, *sides, prompts=prompts, gallery=sheets[0].key, questions=tuple(dict.fromkeys(wanted.questions))
    )


def _cut_pair(index: Index, study: HumanStudy, item: int) -> dict[str, bytes]:
    """Both pictures or neither: which of them is missing, and why, would tell a rater whose the other one is."""
    try:
        return {name: _cut_study_tile(index, study, side, item) for name, side in (("a", study.a), ("b", study.b))}
    except UserError as error:
        log.warning("study %s, pair %d cannot be shown: %s", study.name, item, error)
        raise UserError("a picture of this pair is gone, damaged or drawn anew; the service's log says which") from None


def _cut_study_tile(index: Index, study: HumanStudy, shown: StudySide, item: int) -> bytes:
    uri = _find_gallery(index, shown)
    sheet = read_sheet(uri)
    if sheet.key != study.gallery:
        raise UserError(f"study {study.name}: a gallery was drawn again with other prompts, seeds or sampler since")
    return cut_tile(uri, sheet.layout, item)


def _find_gallery(index: Index, side: StudySide) -> str:
    """The gallery picture of a checkpoint, from the index alone."""
    run = index.snapshot.by_name.get(side.run)
    if run is None or side.step not in run.gallery:
        raise UserError(f"{side.run} has no gallery at step {side.step}: the service draws one when it evaluates it")
    return run.gallery[side.step]


def describe_study(study: HumanStudy) -> StudyLine:
    """What may be told before the end: not which side is which, but whom it is about."""
    runs = sorted(f"{s.run} step {s.step}" for s in (study.a, study.b))
    return StudyLine(study.name, runs, len(study.order("")), study.questions, study.created)


def or_400(make: Callable[[], T]) -> T:
    return or_refuse(make, 400)

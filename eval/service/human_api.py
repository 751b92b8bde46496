"""Side by side in the service: create a study, hand out blind pairs, keep answers, give win rates."""

from collections.abc import Callable
from typing import Literal, TypeVar

from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel, Field

from eval.service import pictures, shapes
from eval.service.answers import Json, Webp, documented, told, webp
from eval.service.gallery import Sheet, read_sheet
from eval.service.index import Index
from eval.studies.human import QUESTIONS, HumanStudies, HumanStudy, StudySide, clean_rater
from infra.errors import UserError
from infra.log import get_logger

log = get_logger("human")
T = TypeVar("T")
MISTAKE = documented(_400="no such study, or something that it does not allow; the text says what")


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


def human_routes(app: FastAPI, index: Index) -> None:
    studies = HumanStudies(index.uri)

    @app.get("/api/human/studies", response_model=shapes.StudyList, tags=["side by side"],
             summary="All studies, without their results")  # fmt: skip
    def listed() -> Response:
        found: list[shapes.StudyLine] = []
        unreadable: list[str] = []
        for name in asked(studies.names):
            try:
                found.append(_named(studies.get(name)))
            except UserError as error:  # one torn study hides no other
                unreadable.append(str(error))
        answer: shapes.StudyList = {"studies": found, "unreadable": unreadable, "questions": QUESTIONS}
        return Json(answer)

    @app.post("/api/human/studies", response_model=shapes.StudyLine, tags=["side by side"],
              summary="Begin a study of two checkpoints", status_code=201, responses=MISTAKE)  # fmt: skip
    def create(wanted: NewStudy) -> Response:
        sides = StudySide(wanted.run_a, wanted.step_a), StudySide(wanted.run_b, wanted.step_b)
        sheets = asked(lambda: [read_sheet(_gallery(index, side)) for side in sides])
        study = asked(lambda: _create(studies, wanted, sides, sheets))
        return Json(_named(study), 201)

    @app.get("/api/human/next", response_model=shapes.NextPair, tags=["side by side"],
             summary="A rater's next pair, blind", responses=MISTAKE)  # fmt: skip
    def following(study: str, rater: str) -> Response:
        found = asked(lambda: studies.get(study))
        item, done, total = asked(lambda: studies.next(found, rater))
        answer: shapes.NextPair = {"item": item, "done": done, "total": total}
        if item is not None:
            answer["prompt"] = found.prompts[item]
            answer["questions"] = {question: QUESTIONS[question] for question in found.asked(item)}
        return Json(answer)

    @app.get("/api/human/picture", tags=["side by side"], summary="The left or right picture of a pair, as WEBP",
             response_class=Webp, responses=MISTAKE | documented(_404="no such pair"))  # fmt: skip
    def picture(study: str, rater: str, item: int, side: Literal["left", "right"]) -> Response:
        found = asked(lambda: studies.get(study))
        if item not in range(len(found.prompts)):
            raise HTTPException(404, "no such pair")
        left = found.left(asked(lambda: clean_rater(rater)), item)
        pair = asked(lambda: _pair(index, found, item))
        shown = "a" if (side == "left") == (left == "a") else "b"
        return webp(lambda: pair[shown], cache="no-store", status=400)

    @app.post("/api/human/votes", response_model=shapes.Kept, tags=["side by side"],
              summary="Keep a rater's answers; a second time is refused", status_code=201,
              responses=MISTAKE | documented(_409="this rater answered this pair before"))  # fmt: skip
    def vote(given: NewVote) -> Response:
        found = asked(lambda: studies.get(given.study))
        if not asked(lambda: studies.vote(found, given.rater, given.item, given.answers)):
            raise HTTPException(409, "this rater has answered this pair already; the first answer stands")
        return Json({"kept": True}, 201)

    @app.get("/api/human/results", response_model=shapes.StudyResults, tags=["side by side"],
             summary="Win rates with intervals (no longer blind)", responses=MISTAKE)  # fmt: skip
    def results(study: str) -> Response:
        found = asked(lambda: studies.get(study))
        rates = asked(lambda: studies.results(found))
        answer: shapes.StudyResults = {**_named(found), "a": found.a, "b": found.b, "rates": rates}
        return Json(answer)


def _create(
    studies: HumanStudies, wanted: NewStudy, sides: tuple[StudySide, StudySide], sheets: list[Sheet]
) -> HumanStudy:
    if sheets[0].key != sheets[1].key:
        raise UserError("these galleries differ in prompts, seeds or sampler, so their pictures are not comparable")
    prompts = [tile.prompt for tile in sheets[0].tiles]
    return studies.create(
        wanted.name, *sides, prompts=prompts, gallery=sheets[0].key, questions=tuple(dict.fromkeys(wanted.questions))
    )


def _pair(index: Index, study: HumanStudy, item: int) -> dict[str, bytes]:
    """Both pictures or neither: which of them is missing, and why, would tell a rater whose the other one is."""
    try:
        return {name: _tile(index, study, side, item) for name, side in (("a", study.a), ("b", study.b))}
    except UserError as error:
        log.warning("study %s, pair %d cannot be shown: %s", study.name, item, error)
        raise UserError("a picture of this pair is gone, damaged or drawn anew; the service's log says which") from None


def _tile(index: Index, study: HumanStudy, shown: StudySide, item: int) -> bytes:
    uri = _gallery(index, shown)
    sheet = read_sheet(uri)
    if sheet.key != study.gallery:
        raise UserError(f"study {study.name}: a gallery was drawn again with other prompts, seeds or sampler since")
    return pictures.tile(uri, pictures.layout(sheet), item)


def _gallery(index: Index, side: StudySide) -> str:
    """The gallery picture of a checkpoint, from the index alone."""
    run = index.snapshot.by_name.get(side.run)
    if run is None or side.step not in run.gallery:
        raise UserError(f"{side.run} has no gallery at step {side.step}: the service draws one when it evaluates it")
    return run.gallery[side.step]


def _named(study: HumanStudy) -> shapes.StudyLine:
    """What may be told before the end: not which side is which, but whom it is about."""
    return {
        "name": study.name, "runs": sorted(f"{s.run} step {s.step}" for s in (study.a, study.b)),
        "pairs": len(study.order("")), "questions": list(study.questions), "created": study.created,
    }  # fmt: skip


def asked(make: Callable[[], T]) -> T:
    return told(make, 400)

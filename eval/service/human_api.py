"""Side by side in the service: create a study, hand out blind pairs, keep answers, give win rates."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, HTTPException, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from eval.human import QUESTIONS, Side, Studies, Study, clean_rater
from eval.service import pictures
from eval.service.gallery import Sheet, read_sheet
from eval.service.index import Index
from infra.errors import UserError


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
    studies = Studies(index.uri)

    @app.get("/api/human/studies", tags=["side by side"], summary="All studies, without their results")
    def listed() -> Response:
        found, unreadable = [], []
        for name in asked(studies.names):
            try:
                found.append(_named(studies.get(name)))
            except UserError as error:  # one torn study hides no other
                unreadable.append(str(error))
        return JSONResponse({"studies": found, "unreadable": unreadable, "questions": QUESTIONS})

    @app.post("/api/human/studies", tags=["side by side"], summary="Begin a study of two checkpoints", status_code=201)
    def create(wanted: NewStudy) -> Response:
        sides = Side(wanted.run_a, wanted.step_a), Side(wanted.run_b, wanted.step_b)
        sheets = asked(lambda: [read_sheet(_gallery(index, side)) for side in sides])
        study = asked(lambda: _create(studies, wanted, sides, sheets))
        return JSONResponse(_named(study), 201)

    @app.get("/api/human/next", tags=["side by side"], summary="A rater's next pair, blind")
    def following(study: str, rater: str) -> Response:
        found = asked(lambda: studies.get(study))
        item, done, total = asked(lambda: studies.next(found, rater))
        told: dict[str, Any] = {"item": item, "done": done, "total": total}
        if item is not None:
            told |= {"prompt": found.prompts[item], "questions": {q: QUESTIONS[q] for q in found.asked(item)}}
        return JSONResponse(told)

    @app.get("/api/human/picture", tags=["side by side"], summary="The left or right picture of a pair, as WEBP")
    def picture(study: str, rater: str, item: int, side: str) -> Response:
        found = asked(lambda: studies.get(study))
        if item not in range(len(found.prompts)) or side not in ("left", "right"):
            raise HTTPException(404, "no such pair or side")
        left = found.left(asked(lambda: clean_rater(rater)), item)
        shown = found.a if (side == "left") == (left == "a") else found.b
        data = asked(lambda: _tile(index, found, shown, item))
        return Response(data, media_type="image/webp", headers={"Cache-Control": "no-store"})

    @app.post("/api/human/votes", tags=["side by side"], summary="Keep a rater's answers; a second time is refused")
    def vote(given: NewVote) -> Response:
        found = asked(lambda: studies.get(given.study))
        if not asked(lambda: studies.vote(found, given.rater, given.item, given.answers)):
            raise HTTPException(409, "this rater has answered this pair already; the first answer stands")
        return JSONResponse({"kept": True}, 201)

    @app.get("/api/human/results", tags=["side by side"], summary="Win rates with intervals (no longer blind)")
    def results(study: str) -> Response:
        found = asked(lambda: studies.get(study))
        rates = asked(lambda: studies.results(found))
        told = [{**vars(rate), "votes": rate.votes} for rate in rates]
        return JSONResponse({**_named(found), "a": vars(found.a), "b": vars(found.b), "rates": told})


def _create(studies: Studies, wanted: NewStudy, sides: tuple[Side, Side], sheets: list[Sheet]) -> Study:
    if sheets[0].key != sheets[1].key:
        raise UserError("these galleries differ in prompts, seeds or sampler, so their pictures are not comparable")
    prompts = [tile.prompt for tile in sheets[0].tiles]
    return studies.create(
        wanted.name, *sides, prompts=prompts, gallery=sheets[0].key, questions=tuple(wanted.questions)
    )


def _tile(index: Index, study: Study, shown: Side, item: int) -> bytes:
    uri = _gallery(index, shown)
    sheet = read_sheet(uri)
    if sheet.key != study.gallery:
        raise UserError(f"study {study.name}: a gallery was drawn again with other prompts, seeds or sampler since")
    return pictures.tile(uri, pictures.layout(sheet), item)


def _gallery(index: Index, side: Side) -> str:
    """The gallery picture of a checkpoint, from the index alone."""
    run = index.snapshot.by_name.get(side.run)
    if run is None or side.step not in run.gallery:
        raise UserError(f"{side.run} has no gallery at step {side.step}: the service draws one when it evaluates it")
    return run.gallery[side.step]


def _named(study: Study) -> dict[str, Any]:
    """What may be told before the end: not which side is which, but whom it is about."""
    return {
        "name": study.name, "runs": sorted(f"{s.run} step {s.step}" for s in (study.a, study.b)),
        "pairs": len(study.order("")), "questions": study.questions, "created": study.created,
    }  # fmt: skip


def asked(make: Callable[[], Any]) -> Any:
    """A user's mistake becomes an answer with its words."""
    try:
        return make()
    except UserError as error:
        raise HTTPException(400, str(error)) from error

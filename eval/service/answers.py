"""How routes answer: dataclasses as JSON, pictures as WEBP, a user's mistake in its words; and how OpenAPI says so."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic_core import PydanticSerializationError
from pydantic_core import to_json as to_json_bytes
from starlette.exceptions import HTTPException as AnyHTTPException

from eval.service.index import Index
from eval.service.law import LawFitter
from eval.service.snapshot import Snapshot
from eval.service.watcher import Watcher
from infra.codec import to_json
from infra.errors import UserError

T = TypeVar("T")
MOST_KEPT = 200
RunNames = Annotated[list[str] | None, Query(description="names of runs, repeated; all where none is given")]
AtImages = Annotated[int | None, Query(description="at exactly that many images; the last value of each run otherwise")]


class JsonAnswer(JSONResponse):
    """A dataclass goes out as it is: FastAPI describes its type, but these answers are too large to be validated too.

    A number that is not finite becomes null.
    """

    def render(self, content: Any) -> bytes:
        if isinstance(content, bytes):
            return content
        try:
            return to_json_bytes(content, inf_nan_mode="null")
        except (PydanticSerializationError, UnicodeEncodeError):
            # What was posted or stored may hold half a surrogate pair, which is no text: it travels as JSON's escape.
            return json.dumps(to_json(content, finite=True), allow_nan=False).encode()


class WebpAnswer(Response):
    media_type = "image/webp"


@dataclass
class Answers:
    """What the routes share. Answers are kept until the store has something new: open pages ask again and again."""

    index: Index
    watcher: Watcher
    settings: str
    law: LawFitter
    _kept: tuple[int, dict[Any, bytes]] = (-1, {})

    @property
    def now(self) -> Snapshot:
        return self.index.snapshot

    def answer(self, key: Any, make: Callable[[Snapshot], Any]) -> Response:
        """The answer that is kept under `key`, or a new one that `make` builds."""
        now = self.index.snapshot
        generation, kept = self._kept
        if generation != now.generation or len(kept) > MOST_KEPT:
            kept = {}
            self._kept = (now.generation, kept)
        if key not in kept:
            kept[key] = bytes(JsonAnswer(make(now)).body)
        return JsonAnswer(kept[key])  # a new response: compression changes its headers


def answer_webp(make: Callable[[], bytes], *, cache: str, status: int) -> WebpAnswer:
    return WebpAnswer(or_refuse(make, status), headers={"Cache-Control": cache})


def or_refuse(make: Callable[[], T], status: int) -> T:
    """What `make` returns; a user's mistake becomes a refusal with its words."""
    try:
        return make()
    except UserError as error:
        raise HTTPException(status, str(error)) from error


def or_404(value: T | None, reason: str) -> T:
    if value is None:
        raise HTTPException(404, reason)
    return value


def describe_refusals(**words: str) -> dict[int | str, dict[str, Any]]:
    """The argument `responses=` of a route that can refuse: `describe_refusals(_404="no such run")`."""
    shape = {"type": "object", "properties": {"detail": {"type": "string"}}, "required": ["detail"]}
    content = {"application/json": {"schema": shape}}
    return {int(code[1:]): {"description": text, "content": content} for code, text in words.items()}


def add_refusal_handlers(app: FastAPI) -> None:
    """Refusals are sent as `JsonAnswer` too: a name in one may be no text."""

    @app.exception_handler(AnyHTTPException)
    async def answer_refusal(_: Request, error: AnyHTTPException) -> Response:
        return JsonAnswer({"detail": error.detail}, error.status_code, headers=dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def answer_mistyped(_: Request, error: RequestValidationError) -> Response:
        # Without what was given: it may be no JSON (NaN, half a surrogate pair).
        found = [{name: one[name] for name in ("type", "loc", "msg")} for one in error.errors()]
        return JsonAnswer({"detail": found}, 422)

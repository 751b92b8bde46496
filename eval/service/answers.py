"""What routes send: plain data as JSON, pictures as WEBP, a user's mistake in its words; and how OpenAPI tells it."""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException

from infra.errors import UserError

T = TypeVar("T")
Documented = dict[int | str, dict[str, Any]]


class Json(JSONResponse):
    """Plain data and dataclasses as they are: these answers are too large for a second pass through a schema."""

    def render(self, content: Any) -> bytes:
        if isinstance(content, bytes):
            return content
        # What was posted or stored may hold half a surrogate pair, which is no text: it travels as JSON's own escape.
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=asdict)
        return text.encode("utf-8", "backslashreplace")


class Webp(Response):
    media_type = "image/webp"


def webp(make: Callable[[], bytes], *, cache: str, status: int) -> Webp:
    return Webp(told(make, status), headers={"Cache-Control": cache})


def told(make: Callable[[], T], status: int) -> T:
    """A user's mistake becomes an answer with its words."""
    try:
        return make()
    except UserError as error:
        raise HTTPException(status, str(error)) from error


def documented(**words: str) -> Documented:
    """For `responses=` of a route: `documented(_404="no such run")`."""
    shape = {"type": "object", "properties": {"detail": {"type": "string"}}, "required": ["detail"]}
    content = {"application/json": {"schema": shape}}
    return {int(code[1:]): {"description": text, "content": content} for code, text in words.items()}


def tell_refusals(app: FastAPI) -> None:
    """Refusals are sent as `Json` too: a name in one may be no text."""

    @app.exception_handler(AnyHTTPException)
    async def refused(_: Request, error: AnyHTTPException) -> Response:
        return Json({"detail": error.detail}, error.status_code, headers=dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def mistyped(_: Request, error: RequestValidationError) -> Response:
        # Without what was given: it may be no JSON (NaN, half a surrogate pair).
        found = [{name: one[name] for name in ("type", "loc", "msg")} for one in error.errors()]
        return Json({"detail": found}, 422)

"""Who may look: anyone on this machine while the service listens on loopback, holders of the token otherwise.

A web page elsewhere must not reach a local service through the reader's browser: the Host header is checked against
DNS rebinding, and what changes something must come from the service's own pages.
"""

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi import Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse

from infra import storage
from infra.errors import UserError

COOKIE = "beeline_token"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
SHORTEST = 16
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True)
class Access:
    """`token` None: loopback only, no token asked."""

    token: str | None

    async def __call__(self, request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        """The middleware: refuses a request, or passes it on and adds headers to the answer, so that browsers do not
        run data as script."""
        refused = self._find_refusal(request)
        response = refused if refused is not None else await call_next(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    def _find_refusal(self, request: Request) -> Response | None:
        if self.token is None and _parse_host(request.headers.get("host", "")) not in LOOPBACK:
            return PlainTextResponse("this service answers on this machine only (Host header)\n", 403)
        if request.method not in ("GET", "HEAD") and not _is_from_own_page(request):
            return PlainTextResponse("refused: not sent by a page of this service\n", 403)
        return None if self.token is None else self._check(request)

    def _check(self, request: Request) -> Response | None:
        token = request.query_params.get("token")
        if token is not None and self._is_token(token) and request.method == "GET":
            # Into a cookie, so that the token does not stay in the address bar and the history.
            query = request.url.remove_query_params("token").query
            response: Response = RedirectResponse("/" + request.url.path.lstrip("/") + (f"?{query}" if query else ""))
            secure = request.url.scheme == "https"
            response.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=secure, max_age=30 * 86400)
            return response
        kind, _, bearer = request.headers.get("authorization", "").partition(" ")
        token = bearer.strip() if kind.lower() == "bearer" else request.cookies.get(COOKIE, "")
        if self._is_token(token):
            return None
        message = "a token is needed: open /?token=TOKEN once, or send Authorization: Bearer TOKEN"
        return JSONResponse({"detail": message}, 401, headers={"WWW-Authenticate": "Bearer"})

    def _is_token(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), (self.token or "").encode())


def choose_access(host: str, token_file: str | None) -> Access:
    """Loopback needs no token; any other address is refused without one."""
    token = None
    if token_file is not None:
        token = storage.read_bytes(token_file).decode("utf-8", "replace").strip()
        if len(token) < SHORTEST or not token.isascii() or not token.isprintable():
            raise UserError(
                f"{token_file}: expected a token of at least {SHORTEST} printable characters; make one with: "
                f"python -c 'import secrets; print(secrets.token_urlsafe())' > {token_file}"
            )
    if host not in LOOPBACK and token is None:
        raise UserError(
            f"--host {host} can be reached from other machines, so it needs --token-file FILE; make one with: "
            "python -c 'import secrets; print(secrets.token_urlsafe())' > FILE"
        )
    return Access(token)


def _parse_host(header: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def _is_from_own_page(request: Request) -> bool:
    """JSON from the same origin: a foreign page can send neither without the browser asking us first."""
    if not request.headers.get("content-type", "").startswith("application/json"):
        return False
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host", "")

"""The web side of the service: pages, the JSON API behind them, and its OpenAPI description. All from one Snapshot."""

from pathlib import Path

from fastapi import FastAPI, Response
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.staticfiles import StaticFiles

from eval.report.runs import natural_key
from eval.service.access import Access
from eval.service.answers import Answers, JsonAnswer, add_refusal_handlers, describe_refusals
from eval.service.few_steps_api import add_few_step_routes
from eval.service.human_api import add_human_routes
from eval.service.index import Index
from eval.service.law import LawFitter
from eval.service.numbers_api import add_number_routes
from eval.service.pictures_api import add_picture_routes
from eval.service.runs_api import add_run_routes
from eval.service.watcher import Watcher
from infra.version import code_version

WEB = Path(__file__).parent.parent / "web"
PAGES = {
    "": ("Runs", "overview"),
    "losses": ("Losses", "losses"),
    "scores": ("Scores", "scores"),
    "samples": ("Samples", "samples"),
    "few_steps": ("Few steps", "few_steps"),
    "scaling": ("Scaling", "scaling"),
    "plans": ("Plans", "plans"),
    "compare": ("Side by side", "human"),
    "failures": ("Failures", "failures"),
    "run": ("Run", "run"),
}


def build_app(index: Index, watcher: Watcher, access: Access) -> FastAPI:
    app = FastAPI(
        title="beeline eval service",
        version=code_version(),
        description="Runs, losses, scores, samples and scaling laws as JSON. GET changes nothing.",
        docs_url=None,  # FastAPI's own page loads its scripts from elsewhere; /api is ours
        redoc_url=None,
        default_response_class=JsonAnswer,
        responses=describe_refusals(_401="a token is needed") if access.token else {},
    )
    answers = Answers(index, watcher, watcher.settings.hash if watcher.settings else "", LawFitter())
    app.add_middleware(GZipMiddleware, minimum_size=1000, compresslevel=4)
    app.middleware("http")(access)
    add_refusal_handlers(app)
    add_run_routes(app, answers)
    add_number_routes(app, answers)
    add_few_step_routes(app, answers)
    add_picture_routes(app, answers)
    add_human_routes(app, index)
    _add_pages(app)
    app.mount("/static", StaticFiles(directory=WEB / "static"), name="static")
    return app


def _add_pages(app: FastAPI) -> None:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(WEB / "pages"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    shell = environment.get_template("page.html.j2")
    menu = [(path, title) for path, (title, _) in PAGES.items() if path != "run"]

    def serve(path: str, title: str, page: str) -> None:
        html = shell.render(title=title, page=page, path=path, menu=menu, version=app.version)

        def page_route() -> Response:
            return Response(html, media_type="text/html", headers={"Cache-Control": "no-cache"})

        app.add_api_route(f"/{path}", page_route, include_in_schema=False)

    for path, (title, page) in PAGES.items():
        serve(path, title, page)

    @app.get("/api", include_in_schema=False)
    def api() -> Response:
        listed = [
            {"path": path, "method": method.upper(), **about}
            for path, methods in sorted(app.openapi()["paths"].items(), key=lambda item: natural_key(item[0]))
            for method, about in methods.items()
        ]
        html = environment.get_template("api.html.j2").render(
            title="API", page="api", path="api", menu=menu, version=app.version, routes=listed,
            schemas=app.openapi()["components"]["schemas"],
        )  # fmt: skip
        return Response(html, media_type="text/html")

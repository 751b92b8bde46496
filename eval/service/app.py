"""The web side of the service: pages, the JSON API behind them, and its OpenAPI description. All from one Snapshot."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Response
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.staticfiles import StaticFiles

from eval.report.data import natural_key
from eval.report.pictures import prompts_of
from eval.service import pictures, shapes, views
from eval.service.access import Access
from eval.service.answers import Json, Webp, documented, tell_refusals, told, webp
from eval.service.claims import reason_of
from eval.service.gallery import read_sheet
from eval.service.human_api import human_routes
from eval.service.index import Index, Snapshot
from eval.service.law import LawView
from eval.service.watcher import Watcher
from infra.version import code_version

WEB = Path(__file__).parent.parent / "web"
PAGES = {
    "": ("Runs", "overview"),
    "losses": ("Losses", "losses"),
    "scores": ("Scores", "scores"),
    "samples": ("Samples", "samples"),
    "scaling": ("Scaling", "scaling"),
    "plans": ("Plans", "plans"),
    "compare": ("Side by side", "human"),
    "failures": ("Failures", "failures"),
    "run": ("Run", "run"),
}
MOST_KEPT = 200
Runs = Annotated[list[str] | None, Query(description="names of runs, repeated; all where none is given")]
Images = Annotated[int | None, Query(description="at exactly that many images; the last value of each run otherwise")]


@dataclass
class Parts:
    """What the routes share. Answers are kept until the store has something new: open pages ask again and again."""

    index: Index
    watcher: Watcher
    settings: str
    law: LawView
    _kept: tuple[int, dict[Any, bytes]] = (-1, {})

    @property
    def now(self) -> Snapshot:
        return self.index.snapshot

    def answer(self, key: Any, make: Callable[[Snapshot], Any]) -> Response:
        now = self.index.snapshot
        generation, kept = self._kept
        if generation != now.generation or len(kept) > MOST_KEPT:
            kept = {}
            self._kept = (now.generation, kept)
        if key not in kept:
            kept[key] = bytes(Json(make(now)).body)
        return Json(kept[key])  # a new one: compression changes an answer's headers


def build_app(index: Index, watcher: Watcher, access: Access) -> FastAPI:
    app = FastAPI(
        title="beeline eval service",
        version=code_version(),
        description="Runs, losses, scores, samples and scaling laws as JSON. GET changes nothing.",
        docs_url=None,  # FastAPI's own page loads its scripts from elsewhere; /api is ours
        redoc_url=None,
        default_response_class=Json,
        responses=documented(_401="a token is needed") if access.token else {},
    )
    parts = Parts(index, watcher, watcher.settings.hash if watcher.settings else "", LawView())
    app.add_middleware(GZipMiddleware, minimum_size=1000, compresslevel=4)
    app.middleware("http")(access)
    tell_refusals(app)
    _state_routes(app, parts)
    _curve_routes(app, parts)
    _picture_routes(app, parts)
    human_routes(app, index)
    _pages(app)
    app.mount("/static", StaticFiles(directory=WEB / "static"), name="static")
    return app


def _state_routes(app: FastAPI, parts: Parts) -> None:
    @app.get("/api/status", response_model=shapes.Status, tags=["state"],
             summary="What is watched, and what is being evaluated")  # fmt: skip
    def status() -> Response:
        now = parts.now
        told: shapes.Status = {
            "uri": now.uri, "generation": now.generation, "runs": len(now.runs), "created": now.created,
            "reading": parts.index.reading, "version": code_version(), "time": time.time(), **parts.watcher.told(),
        }  # fmt: skip
        return Json(told)

    @app.get("/api/runs", response_model=shapes.RunList, tags=["state"],
             summary="Every run: size, progress, last loss, overall scores")  # fmt: skip
    def runs() -> Response:
        return parts.answer("runs", lambda now: views.run_list(now, parts.settings))

    @app.get("/api/run", response_model=shapes.RunDetails, tags=["state"],
             summary="One run: recipe, cost, last value of every metric, checkpoints",
             responses=documented(_404="no such run"))  # fmt: skip
    def run(name: str) -> Response:
        return Json(_found(views.run_details(parts.now, name, parts.settings), f"no run named {name!r}"))

    @app.get("/api/recipes", response_model=shapes.Recipes, tags=["state"], summary="Fields in which recipes differ")
    def recipes(run: Runs = None) -> Response:
        return parts.answer(("recipes", *(run or [])), lambda now: views.recipes(now, run or []))

    @app.get("/api/plans", response_model=shapes.Plans, tags=["state"], summary="Plan against reality")
    def plans(run: Runs = None) -> Response:
        return parts.answer(("plans", *(run or [])), lambda now: views.plans(now, run or []))

    @app.get("/api/failures", response_model=shapes.Failures, tags=["state"],
             summary="What could not be evaluated or read, with reasons")  # fmt: skip
    def failures() -> Response:
        problem = parts.watcher.told()["problem"]
        return parts.answer(("failures", problem), lambda now: _failures(now, parts.settings, problem))


def _failures(now: Snapshot, settings: str, problem: str) -> shapes.Failures:
    failed: list[shapes.Failure] = []
    unread: list[shapes.Unreadable] = []
    for run in now.runs:
        for step, outcome in run.outcomes(settings).items():
            if outcome.state == "failed":
                reason, at = reason_of(run.run.uri, settings, step, outcome.attempt)
                failed.append({"run": run.name, "step": step, "reason": reason, "at": at, "attempts": outcome.attempt})
        unread += [{"run": run.name, "reason": reason} for reason in views.problems_of(run)]
    unread += [{"run": "", "reason": note} for note in now.notes]
    return {"evaluations": failed, "unreadable": unread, "problem": problem}


def _curve_routes(app: FastAPI, parts: Parts) -> None:
    @app.get("/api/metrics", response_model=shapes.Metrics, tags=["numbers"],
             summary="Names of metrics; benchmarks with their tasks")  # fmt: skip
    def metrics() -> Response:
        return Json(views.metrics(parts.now))

    @app.get("/api/series", response_model=shapes.SeriesOf, tags=["numbers"],
             summary="One metric over images, per run, under one protocol")  # fmt: skip
    def series(metric: str, run: Runs = None, points: Annotated[int, Query(ge=2, le=5000)] = 300) -> Response:
        return parts.answer(
            ("series", metric, points, *(run or [])),
            lambda now: views.curves_of(now, metric, run or [], points=points),
        )

    @app.get("/api/levels", response_model=shapes.Levels, tags=["numbers"], summary="Validation loss per noise level")
    def levels(run: Runs = None, images: Images = None) -> Response:
        return parts.answer(("levels", images, *(run or [])), lambda now: views.levels_of(now, run or [], images))

    @app.get("/api/scores", response_model=shapes.Scores, tags=["numbers"],
             summary="A benchmark's tasks with intervals", responses=documented(_404="no such family"))  # fmt: skip
    def scores(family: str, run: Runs = None, images: Images = None) -> Response:
        if family not in views.families(parts.now):
            raise HTTPException(404, f"no metric family named {family!r}")
        return parts.answer(
            ("scores", family, images, *(run or [])), lambda now: views.scores_of(now, family, run or [], images)
        )

    @app.get("/api/calibration", response_model=shapes.Calibration, tags=["numbers"],
             summary="What the judges give to truth, shuffled scenes and noise")  # fmt: skip
    def calibration() -> Response:
        return Json(views.calibration(parts.now))

    @app.get("/api/scaling", response_model=shapes.Fitted | shapes.Fitting, tags=["numbers"],
             summary="Laws, frontier, predictions, or that they are being fitted")  # fmt: skip
    def scaling(run: Runs = None) -> Response:
        return Json(parts.law.told(parts.now, run or []))


def _picture_routes(app: FastAPI, parts: Parts) -> None:
    @app.get("/api/sheets", response_model=shapes.Sheets, tags=["pictures"],
             summary="Which sample pictures each run has")  # fmt: skip
    def sheets(run: Runs = None) -> Response:
        return Json(views.sheets(parts.now, run or []))

    @app.get("/api/picture", tags=["pictures"], summary="One sample picture, as WEBP", response_class=Webp,
             responses=documented(_404="no such run or picture, or not a readable one"))  # fmt: skip
    def picture(run: str, file: str, width: Annotated[int, Query(ge=16, le=2400)] = 640) -> Response:
        make = functools.partial(pictures.thumbnail, _picture_uri(parts.now, run, file), width)
        return webp(make, cache="private, max-age=3600", status=404)

    @app.get("/api/prompts", response_model=shapes.Prompts, tags=["pictures"],
             summary="The prompts of a run's sample pictures, tile by tile",
             responses=documented(_404="no such run"))  # fmt: skip
    def prompts(run: str) -> Response:
        found = _found(parts.now.by_name.get(run), f"no run named {run!r}")
        answer: shapes.Prompts = {"prompts": list(prompts_of(found.run.samples[-1])) if found.run.samples else []}
        if found.gallery:
            sheet = told(lambda: read_sheet(list(found.gallery.values())[-1]), 404)
            answer = {"prompts": [tile.prompt for tile in sheet.tiles], "columns": sheet.columns}
        return Json(answer)


def _picture_uri(now: Snapshot, run: str, file: str) -> str:
    """Only what the index listed: a name in a request never becomes part of a path."""
    found = _found(now.by_name.get(run), f"no run named {run!r}")
    listed = {str(step): uri for step, uri in found.gallery.items()}
    listed |= {uri.rsplit("/", 1)[-1]: uri for uri in found.run.samples}
    return str(_found(listed.get(file), f"no picture named {file!r} in {run!r}"))


def _found(value: Any, otherwise: str) -> Any:
    if value is None:
        raise HTTPException(404, otherwise)
    return value


def _pages(app: FastAPI) -> None:
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
            {"path": path, "method": method.upper(), **told}
            for path, methods in sorted(app.openapi()["paths"].items(), key=lambda item: natural_key(item[0]))
            for method, told in methods.items()
        ]
        html = environment.get_template("api.html.j2").render(
            title="API", page="api", path="api", menu=menu, version=app.version, routes=listed,
            shapes=app.openapi()["components"]["schemas"],
        )  # fmt: skip
        return Response(html, media_type="text/html")

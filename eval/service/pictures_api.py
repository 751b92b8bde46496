"""Routes for pictures. They serve only files that the index lists, and encode each picture anew, at the size asked
for."""

import functools
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import FastAPI, Query, Response
from PIL import Image

from eval.report.pictures import encode_webp, open_picture, read_prompts
from eval.report.runs import parse_positive
from eval.service.answers import (
    Answers,
    JsonAnswer,
    RunNames,
    WebpAnswer,
    answer_webp,
    describe_refusals,
    or_404,
    or_refuse,
)
from eval.service.gallery import SheetLayout, read_sheet
from eval.service.snapshot import IndexedRun, Snapshot
from infra.errors import UserError


@dataclass(frozen=True)
class ListedPicture:
    """A sample picture: `file` is the name that /api/picture takes; `images` were seen by training, None if unknown."""

    file: str
    step: int | None
    images: int | None


@dataclass(frozen=True)
class RunPictures:
    """`gallery`: drawn by the service at the same seeds for all runs; `samples`: the trainer's own grids."""

    name: str
    kind: Literal["gallery", "samples"]
    files: list[ListedPicture]


@dataclass(frozen=True)
class PictureList:
    runs: list[RunPictures]


@dataclass(frozen=True)
class PromptList:
    """`columns`: tiles per row of a gallery's sheet; null for the trainer's own grids."""

    prompts: list[str]
    columns: int | None


def add_picture_routes(app: FastAPI, answers: Answers) -> None:
    @app.get("/api/sheets", response_model=PictureList, tags=["pictures"],
             summary="Which sample pictures each run has")  # fmt: skip
    def sheets(run: RunNames = None) -> Response:
        found = map(list_pictures, answers.now.choose(run))
        return JsonAnswer(PictureList([pictures for pictures in found if pictures.files]))

    @app.get("/api/picture", tags=["pictures"], summary="One sample picture, as WEBP", response_class=WebpAnswer,
             responses=describe_refusals(_404="no such run or picture, or not a readable one"))  # fmt: skip
    def picture(run: str, file: str, width: Annotated[int, Query(ge=16, le=2400)] = 640) -> Response:
        make = functools.partial(make_thumbnail, _find_picture(answers.now, run, file), width)
        return answer_webp(make, cache="private, max-age=3600", status=404)

    @app.get("/api/prompts", response_model=PromptList, tags=["pictures"],
             summary="The prompts of a run's sample pictures, tile by tile",
             responses=describe_refusals(_404="no such run"))  # fmt: skip
    def prompts(run: str) -> Response:
        found = or_404(answers.now.by_name.get(run), f"no run named {run!r}")
        if found.gallery:
            sheet = or_refuse(lambda: read_sheet(list(found.gallery.values())[-1]), 404)
            return JsonAnswer(PromptList([tile.prompt for tile in sheet.tiles], sheet.columns))
        return JsonAnswer(PromptList(list(read_prompts(found.run.samples[-1])) if found.run.samples else [], None))


def list_pictures(run: IndexedRun) -> RunPictures:
    """A run's galleries drawn by the service, else the trainer's sample grids."""
    batch = parse_positive(run.run.recipe.get("global_batch"))
    listed: list[tuple[str, int | None]] = [(str(step), step) for step in run.gallery]
    listed = listed or [(uri.rsplit("/", 1)[-1], _parse_step(uri)) for uri in run.run.samples]
    files = [
        ListedPicture(file, step, step * int(batch) if batch and step is not None else None) for file, step in listed
    ]
    return RunPictures(run.name, "gallery" if run.gallery else "samples", files)


def _parse_step(uri: str) -> int | None:
    """The step in a sample's file name."""
    digits = "".join(c for c in uri.rsplit("/", 1)[-1] if c.isdecimal())
    return int(digits) if digits else None


def _find_picture(now: Snapshot, run: str, file: str) -> str:
    """The URI of a picture that the index lists, else 404. A name from a request never becomes part of a path."""
    found = or_404(now.by_name.get(run), f"no run named {run!r}")
    listed = {str(step): uri for step, uri in found.gallery.items()}
    sheets = (uri.removesuffix(".json") + ".png" for uri in found.run.few_steps)
    listed |= {uri.rsplit("/", 1)[-1]: uri for uri in (*found.run.samples, *sheets)}
    return or_404(listed.get(file), f"no picture named {file!r} in {run!r}")


@functools.lru_cache(maxsize=512)
def make_thumbnail(uri: str, width: int) -> bytes:
    """The picture as WEBP, at most `width` pixels wide; a small one keeps its own pixels, without loss."""
    image = open_picture(uri)
    small = image.width <= width
    if not small:
        image.thumbnail((width, width * 8), Image.Resampling.LANCZOS)
    return encode_webp(image, lossless=small and image.width * image.height <= 2**20)


@functools.lru_cache(maxsize=512)
def cut_tile(uri: str, layout: SheetLayout, index: int) -> bytes:
    """One tile of a gallery sheet as WEBP."""
    columns, width, height = layout
    image, left, top = open_picture(uri), index % columns * width, index // columns * height
    if left + width > image.width or top + height > image.height:
        raise UserError(f"{uri}: no tile {index} in a picture of {image.width} x {image.height} pixels")
    return encode_webp(image.crop((left, top, left + width, top + height)), lossless=width <= 512)

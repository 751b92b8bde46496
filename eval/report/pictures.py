"""Sample images for a page without outside requests: checked, made small enough, and turned into data URIs."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from eval.report.runs import RunFolder
from infra import storage
from infra.errors import UserError

WIDEST = 1100  # pixels of a picture on the page
MOST_BYTES, MOST_PIXELS = 200 * 2**20, 150e6  # of a file that is opened at all
STRIP = 4


@dataclass(frozen=True)
class SamplePicture:
    run: str
    file: str
    uri: str
    width: int
    height: int
    prompts: tuple[str, ...] = ()


def choose_rung_pictures(runs: Sequence[RunFolder]) -> tuple[list[SamplePicture], list[str]]:
    """Each run's last grid, of the same file name where all have one (same prompts and seeds); and what failed."""
    shared = set.intersection(*({_take_file_name(uri) for uri in run.samples} for run in runs)) if runs else set()
    pictures: list[SamplePicture] = []
    notes: list[str] = []
    for run in runs:
        candidates = [uri for uri in run.samples if _take_file_name(uri) in shared] or list(run.samples)
        if candidates:
            _add_picture(run, candidates[-1], pictures, notes)
    return pictures, notes


def choose_progress_pictures(run: RunFolder) -> tuple[list[SamplePicture], list[str]]:
    """A few of one run's grids, from its first to its last, of those that share the last one's size."""
    if len(run.samples) < 3:
        return [], []
    steps = sorted({round(i * (len(run.samples) - 1) / (STRIP - 1)) for i in range(STRIP)})
    pictures: list[SamplePicture] = []
    notes: list[str] = []
    for step in steps:
        _add_picture(run, run.samples[step], pictures, notes)
    pictures = [p for p in pictures if (p.width, p.height) == (pictures[-1].width, pictures[-1].height)]
    return (pictures if len(pictures) > 1 else []), notes


def _add_picture(run: RunFolder, uri: str, pictures: list[SamplePicture], notes: list[str]) -> None:
    try:
        data, width, height = _encode_uri(uri)
    except UserError as error:
        notes.append(f"{run.name}: sample {_take_file_name(uri)} cannot be shown: {error}")
        return
    pictures.append(SamplePicture(run.name, _take_file_name(uri), data, width, height, read_prompts(uri)))


def _encode_uri(uri: str) -> tuple[str, int, int]:
    image = open_picture(uri)
    image.thumbnail((WIDEST, WIDEST * 4), Image.Resampling.LANCZOS)
    return "data:image/webp;base64," + base64.b64encode(encode_webp(image)).decode(), image.width, image.height


def open_picture(uri: str) -> Image.Image:
    """The pixels alone, whatever else the file holds; UserError for what no page can show."""
    if storage.get_size(uri) > MOST_BYTES:
        raise UserError(f"{uri}: over {MOST_BYTES >> 20} MB, too large for a page")
    try:
        with Image.open(io.BytesIO(storage.read_bytes(uri)), formats=("PNG", "JPEG", "WEBP")) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise UserError(f"{uri}: {opened.width} x {opened.height} pixels, too many for a page")
            return opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{uri}: not a readable picture") from error


def encode_webp(image: Image.Image, *, lossless: bool = False) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=88, lossless=lossless, method=2)
    return buffer.getvalue()


def read_prompts(uri: str) -> tuple[str, ...]:
    """The prompts of a picture grid: from a JSON file beside it (`prompts`: list of texts), or from the lines of
    captions.txt, which the trainer writes."""
    beside, captions = uri.rsplit(".", 1)[0] + ".json", uri.rsplit("/", 1)[0] + "/captions.txt"
    try:
        if storage.exists(beside):
            found = json.loads(storage.read_bytes(beside)).get("prompts", [])
        elif storage.exists(captions):
            found = storage.read_bytes(captions).decode().splitlines()
        else:
            return ()
        return tuple(str(prompt) for prompt in found) if isinstance(found, list) else ()
    except (UserError, ValueError, AttributeError):
        return ()


def _take_file_name(uri: str) -> str:
    return uri.rsplit("/", 1)[-1]

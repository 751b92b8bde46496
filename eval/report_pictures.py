"""Sample images for a page without outside requests: checked, made small enough, and turned into data URIs."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

from eval.report_data import Run
from infra import storage
from infra.errors import UserError

MOST_PIXELS = 1100  # of the longer side on the page
MOST_BYTES = 30 * 2**20  # of a file that is opened at all
STRIP = 4


@dataclass(frozen=True)
class Picture:
    run: str
    file: str
    uri: str
    width: int
    height: int
    prompts: tuple[str, ...] = ()


def rung_pictures(runs: Sequence[Run]) -> tuple[list[Picture], list[str]]:
    """Each run's last grid, of the same file name where all have one (same prompts and seeds); and what failed."""
    shared = set.intersection(*({_name(uri) for uri in run.samples} for run in runs)) if runs else set()
    pictures: list[Picture] = []
    notes: list[str] = []
    for run in runs:
        candidates = [uri for uri in run.samples if _name(uri) in shared] or list(run.samples)
        if candidates:
            _try(run, candidates[-1], pictures, notes)
    return pictures, notes


def progress_pictures(run: Run) -> tuple[list[Picture], list[str]]:
    """A few of one run's grids, from its first to its last, of those that share the last one's size."""
    if len(run.samples) < 3:
        return [], []
    steps = sorted({round(i * (len(run.samples) - 1) / (STRIP - 1)) for i in range(STRIP)})
    pictures: list[Picture] = []
    notes: list[str] = []
    for step in steps:
        _try(run, run.samples[step], pictures, notes)
    pictures = [p for p in pictures if (p.width, p.height) == (pictures[-1].width, pictures[-1].height)]
    return (pictures if len(pictures) > 1 else []), notes


def _try(run: Run, uri: str, pictures: list[Picture], notes: list[str]) -> None:
    try:
        data, width, height = _encode(uri)
    except (UserError, OSError, ValueError, SyntaxError) as error:
        notes.append(f"{run.name}: sample {_name(uri)} cannot be shown: {error}")
        return
    pictures.append(Picture(run.name, _name(uri), data, width, height, prompts_of(uri)))


def _encode(uri: str) -> tuple[str, int, int]:
    """Reads and writes the pixels anew: what is embedded is a picture and nothing else."""
    from PIL import Image

    if storage.size(uri) > MOST_BYTES:
        raise UserError(f"file of over {MOST_BYTES >> 20} MB")
    with Image.open(io.BytesIO(storage.read_bytes(uri)), formats=("PNG",)) as opened:
        if opened.width * opened.height > 64e6:
            raise UserError(f"{opened.width} x {opened.height} pixels")
        image = opened.convert("RGB")
    image.thumbnail((MOST_PIXELS, MOST_PIXELS * 4), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=88, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode(), image.width, image.height


def prompts_of(uri: str) -> tuple[str, ...]:
    """From a JSON beside the image (`prompts`: list of texts), or the lines of captions.txt, as the trainer writes."""
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


def _name(uri: str) -> str:
    return uri.rsplit("/", 1)[-1]

"""Prompt sets from the user's own files: plain lines, JSONL, PartiPrompts' table, COCO's caption annotations."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.judging.judges import Judges
from eval.judging.metric import Prompt
from eval.judging.prompts import WORLD_PER_TASK, list_world_caption_prompts, read_lines
from infra.errors import UserError

COCO_ORDER = 2014  # seed of the order in which COCO's images are taken: any first N is a fair sample


def read_prompts(path: str | Path, count: int | None = None) -> list[Prompt]:
    """The first `count` prompts of a .txt or .jsonl, of PartiPrompts.tsv, or of COCO's captions_val2014.json."""
    suffix = Path(path).suffix.lower()
    readers = {".tsv": read_parti, ".json": read_coco}
    if suffix in readers:
        found = readers[suffix](path)
    else:
        found = [Prompt(text, "captions", source=str(index)) for index, text in enumerate(read_lines(path))]
    return found[:count]


def choose_captions(judges: Judges, count: int | None) -> list[Prompt]:
    """Captions that CLIP score and Frechet distances draw: of the world's scenes, or of --official.captions."""
    if judges.of_world:
        return list_world_caption_prompts(count or WORLD_PER_TASK)
    return read_prompts(judges.paths.need("captions"), count)


def read_parti(path: str | Path) -> list[Prompt]:
    """PartiPrompts (1,632 lines: Prompt, Category, Challenge, Note); the task is the category."""
    rows = list(csv.DictReader(io.StringIO(_read_text(path)), delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or not {"Prompt", "Category", "Challenge"} <= set(rows[0]):
        found = ", ".join(rows[0]) if rows else "nothing"
        raise UserError(f"{path}: expected PartiPrompts' columns Prompt, Category, Challenge, found {found}")
    for number, row in enumerate(rows, start=2):
        if not (row["Prompt"] or "").strip() or not row["Category"]:
            raise UserError(f"{path}:{number}: a line without prompt or category")
    return [
        Prompt(row["Prompt"].strip(), row["Category"], metadata={"challenge": row["Challenge"] or ""}, source=str(n))
        for n, row in enumerate(rows)
    ]


def read_coco(path: str | Path) -> list[Prompt]:
    """One caption per image of COCO's annotations: the one with the smallest id, images in one fixed shuffled order."""
    try:
        record = json.loads(_read_text(path))
        captions: dict[int, tuple[int, str]] = {}
        for item in record["annotations"]:
            image, entry = int(item["image_id"]), (int(item["id"]), " ".join(str(item["caption"]).split()))
            captions[image] = min(captions.get(image, entry), entry)
        files = {int(item["id"]): str(item["file_name"]) for item in record.get("images", [])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not COCO caption annotations ({type(error).__name__}: {error}); expected captions_val2014.json"
        ) from error
    images = sorted(image for image, (_, caption) in captions.items() if caption)
    if not images:
        raise UserError(f"{path} holds no captions")
    order = np.random.default_rng(COCO_ORDER).permutation(len(images))
    return [_make_coco_prompt(images[i], captions, files) for i in order]


def _make_coco_prompt(image: int, captions: dict[int, tuple[int, str]], files: dict[int, str]) -> Prompt:
    metadata: dict[str, Any] = {"file_name": files[image]} if image in files else {}
    return Prompt(captions[image][1], "captions", metadata=metadata, source=str(image))


def find_reference_files(folder: str | Path, prompts: Sequence[Prompt] = ()) -> list[Path]:
    """Real pictures for FID: those that the prompts name, in their order; all, by name, where they name none.

    UserError where the folder holds none of those that are named: other pictures would be another distance.
    """
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not files:
        raise UserError(f"no images under {folder}: expected .png, .jpg or .webp files")
    wanted = {
        str(prompt.metadata["file_name"]): n for n, prompt in enumerate(prompts) if "file_name" in prompt.metadata
    }
    chosen = sorted((p for p in files if p.name in wanted), key=lambda p: wanted[p.name])
    if wanted and not chosen:
        raise UserError(
            f"{folder} holds none of the {len(wanted)} pictures that the captions name, e.g. {next(iter(wanted))!r}"
        )
    return chosen if wanted else files


def _read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompts from {path}: {error}") from error

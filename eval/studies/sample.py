"""Draw prompts with exported weights: a labelled grid, and single images in an official folder layout on request."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from data_pipeline.checkpoints import find_weights, hash_weights
from eval.drawing.generate import ImageRequest, Painter, Sampling
from eval.drawing.pictures import make_grid, read_picture, refuse_target, write_picture
from eval.judging.geneval_prompts import split_json_lines
from eval.judging.prompts import read_lines, refuse_broken
from eval.metrics.compbench.files import name_sample
from infra.cli import GROUP
from infra.errors import UserError
from infra.log import Progress

SHOWN = 128  # small images are enlarged to this many pixels at least
Layout = Literal["geneval", "compbench"]


@dataclass(frozen=True)
class PromptToDraw:
    """A prompt to draw, with the metadata line that a GenEval folder carries."""

    text: str
    metadata: dict[str, Any]


def sample(
    weights: str,
    prompts: tuple[str, ...],
    out: str | None = None,
    *,
    images_per_prompt: int = 4,
    scale: int | None = None,
    folders: str | None = None,
    layout: Layout = "geneval",
    t5: Literal["with", "without"] = "with",
    sampling: Annotated[Sampling, GROUP] = Sampling(),  # noqa: B008 - frozen
) -> None:
    """Draw prompts with exported weights into one labelled grid, or into a benchmark's folders.

    `python -m eval geneval prompts > p.jsonl`, then `--prompts p.jsonl --folders DIR`, draws the official GenEval set.

    Args:
        weights: exported weights, e.g. RUN/weights/ema.safetensors (local or s3://)
        prompts: what to draw, one string each; or one .txt file (a prompt per line) or .jsonl file
        out: the grid to write, sample.png by default; its prompts and settings go into a .json beside it
        images_per_prompt: pictures of each prompt, side by side
        scale: enlarge pixels by this factor; by default pictures smaller than 128 pixels are
        folders: write the single pictures here, without a grid unless --out is given; those already there are not
            drawn again. FOLDERS.json beside them says of what they are, and other weights, settings or prompts are
            refused there
        layout: of the folders: GenEval's, or T2I-CompBench's `<prompt>_<6 digits>.png`
        t5: draw with the text in the T5 seat, or with zeros there, as where that encoder is left out to save memory
        sampling: how pictures are drawn
    """
    if t5 == "without":
        sampling = replace(sampling, without_t5=True)
    if images_per_prompt < 1:
        raise UserError("--images-per-prompt must be 1 or more")
    if out is None and folders is None:
        out = "sample.png"
    wanted = expand(prompts)
    if out is not None:
        refuse_target(out)
    files = {} if folders is None else _list_files(Path(folders), layout, wanted, images_per_prompt)
    painter = Painter(weights, device=sampling.device)
    sampling = _continue(sampling, folders)
    if folders is not None:
        origin = {"weights": hash_weights(find_weights(weights)), "sampling": sampling.protocol()}
        origin |= {"prompts": [w.text for w in wanted]} | _describe_numbering(layout, images_per_prompt)
        _keep_origin(Path(folders), origin)
    rows = draw(painter, [w.text for w in wanted], images_per_prompt, sampling, files=files, keep=out is not None)
    if folders is not None and layout == "geneval":
        for index, w in enumerate(wanted):
            file = Path(folders) / f"{index:05d}" / "metadata.jsonl"
            file.write_text(json.dumps(w.metadata), encoding="utf-8")
    if out is not None:
        write_grid(out, rows, scale=scale)
        settings = {"images_per_prompt": images_per_prompt, "sampling": sampling.protocol()}
        text = json.dumps({"prompts": [w.text for w in wanted], **settings}, indent=1)
        Path(out).with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    print(out or folders)


def expand(prompts: Sequence[str]) -> list[PromptToDraw]:
    """The prompts themselves, or those of the one file that was named; GenEval metadata lines are kept whole."""
    if len(prompts) == 1 and prompts[0].endswith(".jsonl"):
        read_lines(prompts[0])  # refuses what is not there or has no prompt
        lines = split_json_lines(Path(prompts[0]).read_text(encoding="utf-8-sig"))
        records = [json.loads(line) for line in lines if line.strip()]
        return [PromptToDraw(str(record["prompt"]), record) for record in records]
    from_file = len(prompts) == 1 and prompts[0].endswith(".txt")
    texts = read_lines(prompts[0]) if from_file else [text.strip() for text in prompts]
    if not texts or not all(texts):
        raise UserError('nothing to draw: give --prompts "a photo of a red apple" ..., none of them empty')
    refuse_broken(texts, "--prompts")
    return [PromptToDraw(text, {"tag": "prompt", "include": [], "prompt": text}) for text in texts]


def _list_files(
    root: Path, layout: Layout, wanted: Sequence[PromptToDraw], images_per_prompt: int
) -> dict[ImageRequest, Path]:
    """Where each picture goes."""
    files = {}
    for index, w in enumerate(wanted):
        for number in range(images_per_prompt):
            if layout == "geneval":
                path = root / f"{index:05d}" / "samples" / f"{number:04d}.png"
            else:
                path = root / name_sample(w.text, index * images_per_prompt + number)
            files[ImageRequest(w.text, number=number)] = path
    if len(files) < len(wanted) * images_per_prompt:
        raise UserError("two prompts have the same words, so their folders would hold the same pictures: remove one")
    return files


def _describe_numbering(layout: Layout, images_per_prompt: int) -> dict[str, Any]:
    """T2I-CompBench numbers pictures through the whole set; in GenEval's folders more of each may join."""
    return {"layout": layout} | ({"images_per_prompt": images_per_prompt} if layout == "compbench" else {})


def _continue(sampling: Sampling, folders: str | None) -> Sampling:
    """The settings with `auto` precision resolved: to that of the pictures that exist already, else for this
    machine."""
    file = None if folders is None else Path(folders).with_name(f"{Path(folders).name}.json")
    if sampling.precision == "auto" and file is not None and file.exists():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged: another origin, which is refused later
            return replace(sampling, precision=json.loads(file.read_bytes())["sampling"].get("precision", "fp32"))
    return sampling.resolve()


def _keep_origin(root: Path, origin: Mapping[str, Any]) -> None:
    """What the pictures under `root` are of, in a file beside it; UserError where others are there already.

    Pictures that are there are not drawn again: those of another checkpoint would be scored as this one's.
    """
    file = root.with_name(f"{root.name}.json")
    text = json.dumps(origin, indent=1) + "\n"
    differs = file.exists() and file.read_text(encoding="utf-8") != text
    if differs and next(root.rglob("*.png"), None) is not None:
        raise UserError(f"{root} holds pictures of other weights, settings or prompts ({file}): choose another folder")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def draw(
    painter: Painter,
    texts: Sequence[str],
    images_per_prompt: int,
    sampling: Sampling,
    *,
    files: Mapping[ImageRequest, Path] | None = None,
    keep: bool = True,
) -> list[tuple[str, list[np.ndarray]]]:
    """Pictures per prompt, in order; the same words twice are drawn once and shown twice.

    With `files` each picture is written as soon as it is drawn, and one that is there already is not drawn again.
    `keep` False keeps none in memory and returns nothing.
    """
    places = files or {}
    cells = [(text, [ImageRequest(text, number=number) for number in range(images_per_prompt)]) for text in texts]
    jobs = list(dict.fromkeys(job for _, row in cells for job in row))
    missing = [job for job in jobs if job not in places or not places[job].exists()]
    pictures: dict[ImageRequest, np.ndarray] = {}
    with Progress(len(missing), "images", desc="draw") as progress:
        for job, image in painter.paint(missing, sampling):
            if job in places:
                write_picture(places[job], image)
            if keep:
                pictures[job] = image
            progress.update(1)
    if not keep:
        return []
    pictures |= {job: read_picture(places[job]) for job in jobs if job not in pictures}
    return [(text, [pictures[job] for job in row]) for text, row in cells]


def write_grid(out: str, rows: Sequence[tuple[str, Sequence[np.ndarray]]], *, scale: int | None = None) -> None:
    """One cell per prompt; `scale` None enlarges pictures of fewer than SHOWN pixels."""
    height = rows[0][1][0].shape[0]
    write_picture(out, make_grid(rows, scale=scale or max(1, -(-SHOWN // height))))

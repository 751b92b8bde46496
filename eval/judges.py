"""Who judges: a frozen bundle of detector, CLIP, VQA, prompt reader and prompt sets, built by name.

`world` takes the tiny judges trained beside the world, and its scores carry the prefix `world_`; `official` takes the
benchmarks' own models from local checkpoints. Metric code is the same for both. Nothing loads before it is asked for.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval import prompts
from eval.detectors import Detector, SceneDetector, TransformersDetector
from eval.language import GrammarReader, Reader, SpacyReader
from eval.metric import Prompt
from eval.vqa import VQA, BlipVQA
from infra.errors import UserError, nearest

if TYPE_CHECKING:
    from eval.clip_model import ClipModel


@dataclass(frozen=True)
class Judges:
    """Everything that differs between GenEval and world_geneval, and likewise for the other metrics."""

    name: str
    prefix: str
    detector: Callable[[], Detector]
    clip: Callable[[], "ClipModel"]
    vqa: Callable[[], VQA]
    reader: Callable[[], Reader]
    names: Callable[[], tuple[list[str], list[str]]]
    """Singular and plural object names that numeracy reads."""
    geneval_prompts: Callable[[int | None], list[Prompt]]
    compbench_prompts: Callable[[int | None], list[Prompt]]
    caption_prompts: Callable[[int], list[Prompt]]
    reference_images: Callable[[int], Iterator[np.ndarray]]
    truth: Callable[[Prompt, int], np.ndarray] | None = None
    """An image that shows the prompt; only a world has one. Calibration needs it."""


@dataclass(frozen=True)
class OfficialPaths:
    """Local checkpoints and files of the official protocols; each is needed only by the metrics that use it."""

    detector: str | None = None
    """transformers folder, e.g. of facebook/mask2former-swin-small-coco-instance"""
    clip: str | None = None
    """OpenCLIP folder, or ViT-L-14=FILE"""
    vqa: str | None = None
    """transformers folder of BLIP-VQA (capfilt large)"""
    spacy: str = "en_core_web_sm"
    """spaCy model by name or path"""
    compbench: str | None = None
    """the user's copy of T2I-CompBench's examples/dataset"""
    captions: str | None = None
    """text or JSONL file of caption prompts (CLIP score, FID)"""
    references: str | None = None
    """folder of real images (FID)"""
    device: str = "cpu"


def world_judges(paths: OfficialPaths | None = None) -> Judges:
    from data_pipeline.checkpoints import resolve
    from data_pipeline.world.classes import CLASSES, COLORS
    from data_pipeline.world.grammar import plural

    def clip() -> "ClipModel":
        from eval.clip_model import ClipModel

        return ClipModel(resolve("world:judge_clip"))

    return Judges(
        name="world",
        prefix="world_",
        detector=functools.cache(lambda: SceneDetector(resolve("world:detector"))),
        clip=functools.cache(clip),
        vqa=functools.cache(lambda: BlipVQA(resolve("world:vqa"))),
        reader=functools.cache(lambda: GrammarReader([*CLASSES, *map(plural, CLASSES)], COLORS)),
        names=lambda: (list(CLASSES), [plural(name) for name in CLASSES]),
        geneval_prompts=lambda per_task: prompts.world_geneval_prompts(per_task or 50),
        compbench_prompts=lambda per_task: prompts.world_compbench_prompts(per_task or 50),
        caption_prompts=prompts.world_caption_prompts,
        reference_images=prompts.world_reference_images,
        truth=prompts.scene_image,
    )


def official_judges(paths: OfficialPaths | None = None) -> Judges:
    given = paths or OfficialPaths()

    def need(field: str) -> str:
        value = getattr(given, field)
        if value is None:
            raise UserError(f"judges `official` need --official.{field} PATH for this metric")
        return value

    def clip() -> "ClipModel":
        from eval.clip_model import ClipModel

        return ClipModel(need("clip"), device=given.device)

    return Judges(
        name="official",
        prefix="",
        detector=functools.cache(lambda: TransformersDetector(need("detector"), device=given.device)),
        clip=functools.cache(clip),
        vqa=functools.cache(lambda: BlipVQA(need("vqa"), device=given.device, image_size=480)),
        reader=functools.cache(lambda: SpacyReader(given.spacy)),
        names=lambda: _read_names(Path(need("compbench")) / "new_objects.txt"),
        geneval_prompts=prompts.geneval_prompts,
        compbench_prompts=lambda per_task: prompts.compbench_prompts(need("compbench"), per_task),
        caption_prompts=lambda count: _captions(need("captions"), count),
        reference_images=lambda count: _images(need("references"), count),
    )


JUDGES: dict[str, Callable[[OfficialPaths | None], Judges]] = {"world": world_judges, "official": official_judges}


@functools.cache
def build_judges(name: str, paths: OfficialPaths | None = None) -> Judges:
    """The bundle of that name; one per process, so that what it loaded or measured once stays."""
    if name not in JUDGES:
        raise UserError(f"unknown judges {name!r}; known: {', '.join(JUDGES)}{nearest(name, JUDGES)}")
    return JUDGES[name](paths)


def _read_names(path: Path) -> tuple[list[str], list[str]]:
    """T2I-CompBench's new_objects.txt: `singular - plural` per line."""
    pairs = [[part.strip().lower() for part in line.split(" - ")] for line in prompts.read_lines(path)]
    if any(len(pair) < 2 for pair in pairs):
        raise UserError(f"{path}: expected `singular - plural` on every line")
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _captions(path: str, count: int) -> list[Prompt]:
    lines = prompts.read_lines(path)[:count]
    return [Prompt(text, "captions", source=str(index)) for index, text in enumerate(lines)]


def _images(folder: str, count: int) -> Iterator[np.ndarray]:
    from eval.pictures import read_picture

    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not files:
        raise UserError(f"no images under {folder}: expected .png, .jpg or .webp files")
    return (read_picture(file) for file in files[:count])


def describe_judge(judge: Any) -> list[str]:
    """Name and weights, as they enter a protocol hash."""
    return [judge.name, judge.version]

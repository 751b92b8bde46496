"""Who judges: detector, CLIP, VQA and prompt reader, built by name.

`world` takes the tiny judges trained beside the world, and its scores carry the prefix `world_`; `official` takes the
benchmarks' own models from local checkpoints. Metric code is the same for both. Nothing loads before it is asked for.
What a single metric needs beside these stands with that metric.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.judging import prompts
from eval.judging.language import GrammarReader, PromptReader, SpacyReader
from eval.judging.metric import Prompt
from eval.judging.official import OfficialPaths
from eval.networks.detectors import Detector, SceneDetector, TransformersDetector
from eval.networks.vqa import VQA, BlipVQA
from infra.errors import UserError, nearest

if TYPE_CHECKING:
    from eval.networks.clip_model import ClipModel


@dataclass(frozen=True)
class Judges:
    """Networks that several metrics ask, each loaded by its first call, and the user's paths for all others."""

    name: str
    prefix: str
    """of the names of rows"""
    paths: OfficialPaths
    detector: Callable[[], Detector]
    clip: Callable[[], "ClipModel"]
    vqa: Callable[[], VQA]
    reader: Callable[[], PromptReader]
    truth: Callable[[Prompt, int], np.ndarray] | None = None
    """An image that shows the prompt; only a world has one. Calibration needs it."""

    @property
    def of_world(self) -> bool:
        """Do they judge the miniature world, with its prompts and scenes?"""
        return self.truth is not None


def make_world_judges(paths: OfficialPaths) -> Judges:
    """The tiny judges of the world, from the checkpoints in the tree."""
    from data_pipeline.checkpoints import resolve
    from data_pipeline.world.classes import CLASSES, COLORS
    from data_pipeline.world.grammar import plural

    return Judges(
        name="world",
        prefix="world_",
        paths=paths,
        detector=functools.cache(lambda: SceneDetector(resolve("world:detector"))),
        clip=functools.cache(lambda: _load_clip(resolve("world:judge_clip"), "cpu")),
        vqa=functools.cache(lambda: BlipVQA(resolve("world:vqa"))),
        reader=functools.cache(lambda: GrammarReader([*CLASSES, *map(plural, CLASSES)], COLORS)),
        truth=prompts.render_scene,
    )


def make_official_judges(paths: OfficialPaths) -> Judges:
    """The benchmarks' own judges from local checkpoints; UserError when one is asked for whose path was not given."""
    return Judges(
        name="official",
        prefix="",
        paths=paths,
        detector=functools.cache(lambda: TransformersDetector(paths.need("detector"), device=paths.resolve_device())),
        clip=functools.cache(lambda: _load_clip(paths.need("clip"), paths.resolve_device())),
        vqa=functools.cache(lambda: BlipVQA(paths.need("vqa"), device=paths.resolve_device(), image_size=480)),
        reader=functools.cache(lambda: SpacyReader(paths.spacy)),
    )


def _load_clip(where: Any, device: str) -> "ClipModel":
    from eval.networks.clip_model import ClipModel

    return ClipModel(where, device=device)


JUDGES: dict[str, Callable[[OfficialPaths], Judges]] = {"world": make_world_judges, "official": make_official_judges}


@functools.cache
def build_judges(name: str, paths: OfficialPaths = OfficialPaths()) -> Judges:  # noqa: B008 - frozen
    """The bundle of that name; one per process, so that what it loaded or measured once stays."""
    if name not in JUDGES:
        raise UserError(f"unknown judges {name!r}; known: {', '.join(JUDGES)}{nearest(name, JUDGES)}")
    return JUDGES[name](paths)


def describe_judge(judge: Any) -> list[str]:
    """Name and weights, as they enter a protocol hash."""
    return [judge.name, judge.version]

"""Who judges: a frozen bundle of detector, CLIP, VQA, prompt reader and prompt sets, built by name.

`world` takes the tiny judges trained beside the world, and its scores carry the prefix `world_`; `official` takes the
benchmarks' own models from local checkpoints. Metric code is the same for both. Nothing loads before it is asked for.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.drawing.pictures import read_picture
from eval.judging import prompts
from eval.judging.compbench_language import RENAMED, GrammarReader, PositionRules, Reader, SpacyReader
from eval.judging.metric import Prompt
from eval.judging.written_words import prompts_with_words, typography_prompts
from eval.networks.depth import Depth, DptDepth
from eval.networks.detectors import Detector, SceneDetector, TransformersDetector
from eval.networks.features import FeatureNetwork
from eval.networks.inception import Convention, InceptionFeatures
from eval.networks.ocr import Ocr, RapidReader
from eval.networks.vqa import VQA, BlipVQA
from infra.errors import UserError, nearest

if TYPE_CHECKING:
    from eval.networks.clip_model import ClipModel


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
    typography_prompts: Callable[[int], list[Prompt]]
    ocr: Callable[[], Ocr]
    reference_images: Callable[[int], Iterator[np.ndarray]]
    reference_version: Callable[[int], str] | None
    """Of what pictures those are; None where the code alone decides (a world's scenes)."""
    # T2I-CompBench's own seats: UniDet's, CLIP ViT-B/32's and DPT's (None: no 3D-spatial).
    compbench_detector: Callable[[], Detector]
    compbench_clip: Callable[[], "ClipModel"]
    compbench_threshold: float = 0.5
    compbench_rules: PositionRules = "official"
    depth: Callable[[], Depth] | None = None
    inception: Callable[[], FeatureNetwork] | None = None
    truth: Callable[[Prompt, int], np.ndarray] | None = None
    """An image that shows the prompt; only a world has one. Calibration needs it."""


@dataclass(frozen=True)
class OfficialPaths:
    """Local checkpoints and files of the official protocols; each is needed only by the metrics that use it."""

    detector: str | None = None
    """transformers folder, e.g. of facebook/mask2former-swin-small-coco-instance"""
    clip: str | None = None
    """OpenCLIP folder, or ViT-L-14=FILE (a bare file is taken for OpenAI's, with QuickGELU)"""
    vqa: str | None = None
    """transformers folder of BLIP-VQA (capfilt large)"""
    spacy: str = "en_core_web_sm"
    """spaCy model by name or path"""
    compbench: str | None = None
    """the user's copy of T2I-CompBench's examples/dataset"""
    compbench_detector: str | None = None
    """transformers folder of OWLv2, which stands in for UniDet (no maintained port exists)"""
    compbench_threshold: float = 0.5
    """score above which its boxes count: UniDet's value; OWLv2's scores run lower"""
    compbench_clip: str | None = None
    """OpenCLIP folder, or ViT-B-32=FILE (T2I-CompBench's CLIP; default: --official.clip)"""
    compbench_rules: PositionRules = "official"
    """official keeps the benchmark's slips of position (README); repaired mends them"""
    depth: str | None = None
    """transformers folder of DPT (3D-spatial; Intel/dpt-hybrid-midas on the hub)"""
    captions: str | None = None
    """caption prompts for CLIP score and FID: .txt, .jsonl, PartiPrompts.tsv or COCO's captions_val2014.json"""
    references: str | None = None
    """folder of real images (FID); COCO's captions choose theirs"""
    typography: str | None = None
    """prompts that quote the words to be written (default: our own 80)"""
    inception: str | None = None
    """Inception-v3 weights of pytorch-fid (fid_inception): pt_inception-2015-12-05-6726825d.pth"""
    inception_convention: Convention = "clean-fid"
    """how pictures are brought to 299 pixels: clean-fid or torch-fidelity"""
    device: str = "cpu"


def world_judges(paths: OfficialPaths | None = None) -> Judges:
    from data_pipeline.checkpoints import resolve
    from data_pipeline.world.classes import CLASSES, COLORS
    from data_pipeline.world.grammar import plural

    def clip() -> "ClipModel":
        from eval.networks.clip_model import ClipModel

        return ClipModel(resolve("world:judge_clip"))

    detector = functools.cache(lambda: SceneDetector(resolve("world:detector")))
    clip = functools.cache(clip)
    return Judges(
        name="world",
        prefix="world_",
        detector=detector,
        clip=clip,
        compbench_detector=detector,
        compbench_clip=clip,
        vqa=functools.cache(lambda: BlipVQA(resolve("world:vqa"))),
        reader=functools.cache(lambda: GrammarReader([*CLASSES, *map(plural, CLASSES)], COLORS)),
        names=lambda: (list(CLASSES), [plural(name) for name in CLASSES]),
        geneval_prompts=lambda per_task: prompts.world_geneval_prompts(per_task or 50),
        compbench_prompts=lambda per_task: prompts.world_compbench_prompts(per_task or 50),
        caption_prompts=prompts.world_caption_prompts,
        typography_prompts=typography_prompts,
        ocr=functools.cache(RapidReader),
        inception=_inception(paths) if paths and paths.inception else None,
        reference_images=prompts.world_reference_images,
        reference_version=None,
        truth=prompts.scene_image,
    )


def official_judges(paths: OfficialPaths | None = None) -> Judges:
    """The benchmarks' own judges from local checkpoints; each is asked for when its metric runs."""
    from eval.judging.prompt_files import read_prompts

    given = paths or OfficialPaths()

    def need(field: str) -> str:
        value = getattr(given, field)
        if value is None:
            option = field.replace("_", "-")
            raise UserError(f"judges `official` need --official.{option} PATH for this metric")
        return value

    @functools.cache
    def clip(field: str) -> "ClipModel":
        from eval.networks.clip_model import ClipModel

        return ClipModel(need(field), device=given.device)

    def names() -> tuple[list[str], list[str]]:
        return _read_names(Path(need("compbench")) / "new_objects.txt")

    def substitute() -> Detector:
        from eval.networks.open_vocabulary import OpenVocabularyDetector

        asked = [*names()[0], *RENAMED.values()]
        return OpenVocabularyDetector(need("compbench_detector"), asked, device=given.device)

    return Judges(
        name="official",
        prefix="",
        detector=functools.cache(lambda: TransformersDetector(need("detector"), device=given.device)),
        clip=lambda: clip("clip"),
        vqa=functools.cache(lambda: BlipVQA(need("vqa"), device=given.device, image_size=480)),
        reader=functools.cache(lambda: SpacyReader(given.spacy)),
        names=functools.cache(names),
        geneval_prompts=prompts.geneval_prompts,
        compbench_prompts=lambda per_task: prompts.compbench_prompts(need("compbench"), per_task),
        caption_prompts=lambda count: read_prompts(need("captions"), count),
        typography_prompts=lambda count: (
            prompts_with_words(given.typography, count) if given.typography else typography_prompts(count)
        ),
        ocr=functools.cache(RapidReader),
        reference_images=lambda count: map(read_picture, _reference_files(given, need("references"), count)),
        reference_version=functools.cache(lambda count: _hash_of(_reference_files(given, need("references"), count))),
        compbench_detector=functools.cache(substitute),
        compbench_clip=lambda: clip("compbench_clip" if given.compbench_clip else "clip"),
        compbench_threshold=given.compbench_threshold,
        compbench_rules=given.compbench_rules,
        inception=_inception(given),
        depth=functools.cache(lambda: DptDepth(need("depth"), device=given.device)) if given.depth else None,
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


def _inception(paths: OfficialPaths) -> Callable[[], InceptionFeatures]:
    """The same for every judge: Inception knows neither world nor benchmark."""

    def build() -> InceptionFeatures:
        if paths.inception is None:
            raise UserError("fid_inception needs --official.inception FILE, the weights of its network")
        return InceptionFeatures(paths.inception, convention=paths.inception_convention, device=paths.device)

    return functools.cache(build)


def _reference_files(paths: OfficialPaths, folder: str, count: int) -> list[Path]:
    """Real pictures; those of the caption prompts where their file names them (COCO)."""
    from eval.judging.prompt_files import read_prompts, reference_files

    prompts_there = read_prompts(paths.captions) if paths.captions else []
    return reference_files(folder, prompts_there)[:count]


def _hash_of(files: Sequence[Path]) -> str:
    """Of pictures' bytes in their order, whatever they are called."""
    each = b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)
    return f"{len(files)} pictures {hashlib.sha256(each).hexdigest()[:16]}"


def describe_judge(judge: Any) -> list[str]:
    """Name and weights, as they enter a protocol hash."""
    return [judge.name, judge.version]

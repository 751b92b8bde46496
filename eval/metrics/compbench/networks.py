"""The networks that only T2I-CompBench needs, in place of UniDet, CLIP ViT-B/32 and DPT, and the names that it counts.

For the world its own detector and CLIP are used. The world has no depth network, as its prompts have no 3D relations.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from eval.judging.judges import Judges
from eval.judging.prompts import read_lines
from eval.metrics.compbench.rules import RENAMED
from eval.networks.depth import Depth, DptDepth
from eval.networks.detectors import Detector
from infra.errors import UserError

if TYPE_CHECKING:
    from eval.networks.clip_model import ClipModel


@functools.cache
def load_detector(judges: Judges) -> Detector:
    """The detector. The benchmark uses UniDet, of which no maintained port exists; here OWLv2 looks for the benchmark's
    object names."""
    if judges.of_world:
        return judges.detector()
    from eval.networks.open_vocabulary import OpenVocabularyDetector

    names = [*list_object_names(judges)[0], *RENAMED.values()]
    return OpenVocabularyDetector(judges.paths.need("compbench_detector"), names, device=judges.paths.resolve_device())


@functools.cache
def load_clip(judges: Judges) -> "ClipModel":
    """The CLIP network, officially ViT-B/32; without --official.compbench-clip, that of the other metrics."""
    if judges.of_world or judges.paths.compbench_clip is None:
        return judges.clip()
    from eval.networks.clip_model import ClipModel

    return ClipModel(judges.paths.compbench_clip, device=judges.paths.resolve_device())


@functools.cache
def load_depth(judges: Judges) -> Depth | None:
    """The depth network, officially DPT; None without --official.depth, and 3d_spatial is then left out."""
    if judges.of_world or judges.paths.depth is None:
        return None
    return DptDepth(judges.paths.depth, device=judges.paths.resolve_device())


@functools.cache
def list_object_names(judges: Judges) -> tuple[list[str], list[str]]:
    """(singular names, plural names) that the category numeracy knows: the world's classes, or those in the benchmark's
    new_objects.txt."""
    if judges.of_world:
        from data_pipeline.world.classes import CLASSES
        from data_pipeline.world.grammar import plural

        return list(CLASSES), [plural(name) for name in CLASSES]
    path = Path(judges.paths.need("compbench")) / "new_objects.txt"
    pairs = [[part.strip().lower() for part in line.split(" - ")] for line in read_lines(path)]
    if any(len(pair) < 2 for pair in pairs):
        raise UserError(f"{path}: expected `singular - plural` on every line")
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]

"""Every metric by its name: one line adds one.

A class of eval/judging/metric.py's PictureMetric or WeightsMetric, built with the judges; heavy imports happen inside.
"""

from collections.abc import Callable

from eval.judging.judges import Judges
from eval.judging.metric import PictureMetric, WeightsMetric
from eval.metrics.clip_score import ClipScore
from eval.metrics.compbench.metric import CompBench
from eval.metrics.diversity import Diversity
from eval.metrics.fid import build_clip_fid, build_inception_fid
from eval.metrics.geneval.metric import GenEval
from eval.metrics.saturation import Saturation
from eval.metrics.typography import Typography
from eval.metrics.val_loss import ValLoss
from infra.errors import UserError

METRICS: dict[str, Callable[[Judges], PictureMetric | WeightsMetric]] = {
    "val_loss": ValLoss,
    "geneval": GenEval,
    "compbench": CompBench,
    "clip_score": ClipScore,
    "fid": build_clip_fid,
    "fid_inception": build_inception_fid,
    "typography": Typography,
    "diversity": Diversity,
    "saturation": Saturation,
}
DEFAULT_METRICS = ("val_loss", "geneval", "compbench", "clip_score", "fid")
"""What an evaluation measures unless it is told otherwise: the others need more files or more time."""


def build_picture_metric(name: str, judges: Judges) -> PictureMetric:
    """A new instance of that metric; UserError where it looks at weights instead of pictures."""
    metric = METRICS[name](judges)
    if isinstance(metric, WeightsMetric):
        raise UserError(f"{name} looks at weights, not at pictures")
    return metric

"""Every metric by its name: one line adds one."""

from collections.abc import Callable

from eval.judging.judges import Judges
from eval.judging.metric import Metric
from eval.metrics.clip_score import ClipScore
from eval.metrics.compbench.metric import CompBench
from eval.metrics.fid import clip_fid, inception_fid
from eval.metrics.geneval.metric import GenEval
from eval.metrics.typography import Typography

# val_loss is not here: it looks at the network, not at images (eval/metrics/val_loss.py).
METRICS: dict[str, Callable[[Judges], Metric]] = {
    "geneval": GenEval,
    "compbench": CompBench,
    "clip_score": ClipScore,
    "fid": clip_fid,
    "fid_inception": inception_fid,
    "typography": Typography,
}

"""Every metric by its name: one line adds one."""

from collections.abc import Callable

from eval.clip_score import ClipScore
from eval.compbench.metric import CompBench
from eval.fid import clip_fid, inception_fid
from eval.geneval.metric import GenEval
from eval.judges import Judges
from eval.metric import Metric
from eval.typography import Typography

# val_loss is not here: it looks at the network, not at images (eval/val_loss.py).
METRICS: dict[str, Callable[[Judges], Metric]] = {
    "geneval": GenEval,
    "compbench": CompBench,
    "clip_score": ClipScore,
    "fid": clip_fid,
    "fid_inception": inception_fid,
    "typography": Typography,
}

"""What a metric is: prompts in, images judged in any order, scores with intervals out. metrics/registry.py lists them.

A metric knows nothing of checkpoints or stores (measure.py does).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from infra.values import PromptValues

if TYPE_CHECKING:
    from eval.drawing.generate import Painter

RESAMPLES = 1000


@dataclass(frozen=True)
class Prompt:
    """One line to draw. `seen` is None where held-out compositions make no sense; metadata is GenEval's or empty."""

    text: str
    task: str
    seen: bool | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""  # set where the same words stand for several prompts (a caption of another scene)


class JudgedImage(NamedTuple):
    """One image (uint8 RGB, H x W x 3) of the prompt at `prompt_index` of the metric's own list."""

    prompt: Prompt
    prompt_index: int
    image: np.ndarray


@dataclass(frozen=True)
class Score:
    """A number of a metric: `path` follows the metric's name (`counting/unseen`, or "" for the metric itself)."""

    path: str
    value: float
    sample_count: int
    low: float | None = None
    high: float | None = None
    higher_is_better: bool | None = None  # None: as the metric says
    details: Mapping[str, Any] = field(default_factory=dict)


class PictureMetric(ABC):
    """Judges pictures. Built with the Judges as its only argument; one instance judges one checkpoint.

    The attributes say what a score under the metric's own name needs; `eval run` asks them and names no metric.
    """

    name: str
    higher_is_better: bool = True
    needs: Sequence[str] = ()
    """paths (fields of OfficialPaths) without which judges `official` cannot give it"""
    draws_captions: bool = False
    """True: --captions prompts, one picture of each. False: --prompts-per-task prompts of each task, with
    --images-per-prompt pictures of each."""
    official_images: int | None = None
    """pictures per prompt of the benchmark whose name this is: rows of fewer pictures or prompts end in `_partial`;
    None where no benchmark has that name"""

    @abstractmethod
    def prompts(self, count: int | None) -> list[Prompt]:
        """The first `count` prompts of each task; None: the benchmark's whole set."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """All that decides the score besides prompts and pictures (networks, rules, versions), for the protocol
        hash."""

    @abstractmethod
    def update(self, images: Sequence[JudgedImage]) -> None:
        """Judge these pictures; called with a batch at a time, in any order."""

    @abstractmethod
    def compute(self) -> list[Score]:
        """The scores of all pictures that were judged; [] if there were none."""

    @abstractmethod
    def values_per_prompt(self) -> PromptValues:
        """Arrays for a paired comparison with another checkpoint, in the form that infra/values.py stores."""


class WeightsMetric(ABC):
    """Looks at the weights themselves. Where the trainer wrote a row `name/headline`, nothing is measured again."""

    name: str
    higher_is_better: bool = True
    headline: str

    @abstractmethod
    def measure(self, painter: "Painter", data: str) -> tuple[list[Score], str, PromptValues]:
        """Scores of the weights on the dataset `data`, their protocol hash, and the values of each sample."""


class Clusters:
    """Values grouped by (stratum, cluster): a score per image, clustered by prompt, stratified by task."""

    def __init__(self) -> None:
        self._values: dict[str, dict[int, list[float]]] = {}

    def add(self, stratum: str, cluster: int, value: float) -> None:
        """One value of one image; `cluster` is the number of its prompt."""
        self._values.setdefault(stratum, {}).setdefault(cluster, []).append(float(value))

    def __bool__(self) -> bool:
        return bool(self._values)

    def values_per_prompt(self) -> PromptValues:
        """One row per cluster: stratum, cluster, the sum of its values and their number."""
        rows = [(name, c, sum(v), len(v)) for name, found in self._values.items() for c, v in sorted(found.items())]
        names, *columns = zip(*rows)
        numbers = (np.array(column, dtype=float) for column in columns)
        return {"stratum": np.array(names, dtype=str), **dict(zip(("cluster", "sum", "count"), numbers))}

    @property
    def strata(self) -> list[str]:
        """Names of the strata, in the order in which they were added."""
        return list(self._values)

    def count(self, strata: Iterable[str] | None = None) -> int:
        """Number of values (images) in these strata. None, here and below, means all strata."""
        return sum(len(v) for name in self._pick(strata) for v in self._values[name].values())

    def mean(self, strata: Iterable[str] | None = None) -> float:
        """Unweighted mean over strata of the mean over their images (GenEval's overall score)."""
        return float(np.mean([np.mean([x for v in self._values[s].values() for x in v]) for s in self._pick(strata)]))

    def interval(self, strata: Iterable[str] | None = None, *, seed: int = 0) -> tuple[float, float] | None:
        """95 % bootstrap of `mean`: clusters (prompts) are drawn with their images, inside each stratum.

        Images of one prompt are not independent (a correlation of 0.6 was seen), so drawing images would be too narrow.
        Shares (values of 0 and 1) are drawn by `_draw_shares`, other numbers by the percentile bootstrap. Where prompts
        agree on a value between 0 and 1 (as one prompt does) nothing tells how they vary: None, it is unknown.
        """
        rng = np.random.default_rng(seed)
        total = np.zeros(RESAMPLES)
        names = self._pick(strata)
        for name in names:
            sums = np.array([np.sum(v) for v in self._values[name].values()])
            sizes = np.array([len(v) for v in self._values[name].values()])
            shares = all(x in (0, 1) for v in self._values[name].values() for x in v)
            if are_all_alike(sums / sizes) and not (shares and sums.sum() in (0, sizes.sum())):
                return None
            if shares:
                total += _draw_shares(sums, sizes, 0.5 / len(names), rng)
            else:
                drawn = rng.integers(len(sums), size=(RESAMPLES, len(sums)))
                total += sums[drawn].sum(1) / sizes[drawn].sum(1)
        low, high = np.percentile(total / len(names), [2.5, 97.5])
        mean = self.mean(names)  # at an end of the scale no draw reaches it
        return min(float(low), mean), max(float(high), mean)

    def score(self, path: str, strata: Iterable[str] | None = None, **details: Any) -> Score:
        """Mean, interval and count as one score."""
        low, high = self.interval(strata) or (None, None)
        return Score(path, self.mean(strata), self.count(strata), low, high, details=details)

    def _pick(self, strata: Iterable[str] | None) -> list[str]:
        return list(self._values) if strata is None else list(strata)


def _draw_shares(sums_P: np.ndarray, sizes_P: np.ndarray, prior: float, rng: np.random.Generator) -> np.ndarray:
    """Draws of the share of right images: a Bayesian bootstrap of the prompts (D. B. Rubin, Annals of Statistics 9
    (1981), 130-134) with `prior` prompts added that are all right and as many all wrong.

    Drawing prompts with repetition proves too much where few are right: for eight prompts of four images and a share of
    0.1 to 0.6, 84 to 88 of its intervals in 100 held the truth; 97 to 98 of these do. The weights' sum, one less than
    the prompts, makes draws vary as much as drawing with repetition does. Alone, a half each way is Jeffreys' prior;
    several strata that are averaged divide it between them, or what it adds would sum up to a bias (six strata at 3 %:
    53 in 100 held the truth).
    """
    count = len(sums_P)
    shapes = [*np.full(count, max(count - 1, 1) / count), prior, prior]
    weights = rng.standard_gamma(shapes, size=(RESAMPLES, count + 2))
    size = sizes_P.mean()
    return weights @ [*sums_P, size, 0.0] / (weights @ [*sizes_P, size, size])


def are_all_alike(values: np.ndarray) -> bool:
    """Resampling them would give an interval without width (but for the rounding of a mean)."""
    return bool(np.ptp(values) <= 1e-12)


def split_values(clusters: Mapping[bool | None, Clusters]) -> PromptValues:
    """`values_per_prompt` of every split, with the split's name as one more column."""
    if not clusters:
        return {}
    parts = [(SUFFIX[split].lstrip("/"), values.values_per_prompt()) for split, values in clusters.items()]
    names = np.array([name for name, part in parts for _ in part["stratum"]], dtype=str)
    return {"split": names} | {key: np.concatenate([part[key] for _, part in parts]) for key in parts[0][1]}


SUFFIX = {True: "/seen", False: "/unseen", None: ""}


def split_scores(
    clusters: Mapping[bool | None, Clusters],
    order: Sequence[str],
    *,
    not_overall: Sequence[str] = (),
    details: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Score]:
    """Scores per task and overall, for each of seen and unseen compositions (or plain when there is no such split).

    `overall/unseen` averages the tasks that have unseen compositions; its details list them. `not_overall` names tasks
    on another scale; `details` of a task (or of "overall") join its rows.
    """
    given = details or {}
    scores: list[Score] = []
    for split, values in clusters.items():
        tasks = [task for task in order if task in values.strata]
        scores.extend(values.score(f"{task}{SUFFIX[split]}", [task], **given.get(task, {})) for task in tasks)
        tasks = [task for task in tasks if task not in not_overall]
        if tasks:
            scores.append(values.score(f"overall{SUFFIX[split]}", tasks, tasks=tasks, **given.get("overall", {})))
    return scores

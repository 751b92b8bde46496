"""`python -m eval compare A B`: differences between two checkpoints with intervals, paired by prompt where possible.

Numbers measured under different protocols are never subtracted: the answer then says in what they differ.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tyro

from eval.judging.metric import RESAMPLES, are_all_alike
from eval.metrics.frechet import resample_distances
from infra import storage
from infra.codec import to_json
from infra.errors import UserError, nearest
from infra.results import ResultRow, ResultStore
from infra.values import PromptValues, read_values


@dataclass(frozen=True)
class Difference:
    """b minus a for one metric path, with a 95 % interval."""

    metric: str
    a: float
    b: float
    low: float
    high: float
    how: str
    """paired (the same prompts drawn for both) or unpaired (from both intervals: wider)"""
    higher_is_better: bool

    @property
    def verdict(self) -> str:
        """better, worse, or no difference shown: the interval holds 0."""
        if self.low <= 0 <= self.high:
            return "no difference shown"
        return "better" if (self.low > 0) == self.higher_is_better else "worse"


@dataclass(frozen=True)
class EvaluatedRun:
    """A run's rows at one checkpoint."""

    name: str
    store: str
    images: int
    rows: Mapping[str, Sequence[ResultRow]]


def compare(
    a: tyro.conf.Positional[str],
    b: tyro.conf.Positional[str],
    *,
    metrics: tuple[str, ...] = (),
    out: str | None = None,
) -> None:
    """Is checkpoint B better than checkpoint A, and by how much? Differences are B minus A, with 95 % intervals.

    Args:
        a: a run folder (its last evaluated checkpoint), or RUN@IMAGES for the one that had seen so many images
        b: the other one
        metrics: metric paths or their beginnings, e.g. world_geneval/overall; all that both have by default
        out: write the table as JSON here
    """
    first, second = read_run(a), read_run(b)
    differences, refused = compare_runs(first, second, metrics)
    for line in format_table(first, second, differences):
        print(line)
    for line in refused:
        print(f"not compared: {line}")
    if out is not None:
        records = [to_json(d, finite=True) | {"verdict": d.verdict} for d in differences]
        text = json.dumps({"a": first.name, "b": second.name, "differences": records, "refused": refused}, indent=1)
        storage.write_bytes(out, (text + "\n").encode())
    if not differences:
        raise UserError("nothing that both checkpoints have can be compared; see the lines above")


def read_run(where: str) -> EvaluatedRun:
    """Rows of RUN (its last evaluated checkpoint) or RUN@IMAGES; UserError where there are none."""
    run, _, stated = where.rstrip("/").partition("@")
    if stated and not stated.isdecimal():
        raise UserError(f"{where}: expected RUN or RUN@IMAGES with a whole number of images")
    store = storage.join(run, "results")
    rows = ResultStore(store).rows()
    if not rows:
        raise UserError(f"{run} has no result rows under results/: evaluate it with `python -m eval run --runs {run}`")
    judged = [row for row in rows if not row.metric.startswith(("train_loss", "cost/"))] or rows
    found = sorted({row.images_seen for row in judged})
    images = int(stated) if stated else found[-1]
    if images not in found:
        raise UserError(f"{run} has no rows at {images:,} images; it has {', '.join(f'{n:,}' for n in found[-12:])}")
    by_metric: dict[str, list[ResultRow]] = {}
    for row in judged:
        if row.images_seen == images:
            by_metric.setdefault(row.metric, []).append(row)
    return EvaluatedRun(f"{run.rsplit('/', 1)[-1]}@{images}", store, images, by_metric)


def compare_runs(a: EvaluatedRun, b: EvaluatedRun, metrics: Sequence[str] = ()) -> tuple[list[Difference], list[str]]:
    """Differences, and one line for every metric whose protocols differ."""
    both = [name for name in a.rows if name in b.rows]
    for wanted in metrics:
        if not any(_is_under(name, wanted) for name in both):
            raise UserError(f"{wanted!r} is not measured on both{nearest(wanted, both)}; both have {', '.join(both)}")
    chosen = [name for name in both if not metrics or any(_is_under(name, wanted) for wanted in metrics)]
    if not chosen:
        raise UserError(f"{a.name} and {b.name} have no metric in common")
    differences, refused = [], []
    for name in chosen:
        pair = _match_protocols(a.rows[name], b.rows[name])
        if pair is None:
            refused.append(f"{name}: {_explain(a, b, a.rows[name][-1], b.rows[name][-1])}")
        else:
            differences.append(_compare_rows(a, b, *pair))
    return differences, refused


def _is_under(name: str, wanted: str) -> bool:
    return name == wanted or name.startswith(wanted.rstrip("/") + "/")


def _match_protocols(a: Sequence[ResultRow], b: Sequence[ResultRow]) -> tuple[ResultRow, ResultRow] | None:
    """The newest rows that were measured the same way."""
    rows_b = {row.protocol_hash: row for row in b}
    return next(((row, rows_b[row.protocol_hash]) for row in reversed(a) if row.protocol_hash in rows_b), None)


def _explain(a: EvaluatedRun, b: EvaluatedRun, row_a: ResultRow, row_b: ResultRow) -> str:
    """A sentence that names the settings in which two protocols differ, if both were stored."""
    protocols = [_flatten(_read_protocol(side.store, row.protocol_hash)) for side, row in ((a, row_a), (b, row_b))]
    if not all(protocols):
        return f"measured under different protocols ({row_a.protocol_hash} and {row_b.protocol_hash})"
    differ = [key for key in sorted({*protocols[0], *protocols[1]}) if protocols[0].get(key) != protocols[1].get(key)]
    parts = [f"{key} {protocols[0].get(key, 'absent')} and {protocols[1].get(key, 'absent')}" for key in differ[:6]]
    more = f" and {len(differ) - 6} more" if len(differ) > 6 else ""
    return f"protocols differ in {'; '.join(parts)}{more}: evaluate both the same way"


def _read_protocol(store: str, name: str) -> dict[str, Any]:
    uri = storage.join(store, "protocols", f"{name}.json")
    try:
        return dict(json.loads(storage.read_bytes(uri))) if storage.exists(uri) else {}
    except (ValueError, TypeError):  # torn: only the hashes are known then
        return {}


def _flatten(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {path: value}
    return {k: v for key, inner in value.items() for k, v in _flatten(inner, f"{path}.{key}".lstrip(".")).items()}


def _compare_rows(a: EvaluatedRun, b: EvaluatedRun, row_a: ResultRow, row_b: ResultRow) -> Difference:
    kept = [
        read_values(side.store, row.protocol_hash, row.recipe_hash, row.images_seen)
        for side, row in ((a, row_a), (b, row_b))
    ]
    resampled = draw_paired(kept[0], kept[1], row_a) if kept[0] and kept[1] else None
    change = row_b.value - row_a.value
    if resampled is not None and np.isnan(resampled).any():
        return _make_difference(row_a, row_b, -np.inf, np.inf, "paired; all prompts agree")
    if resampled is not None:
        low, high = (float(x) for x in np.percentile(resampled, [2.5, 97.5]))
        return _make_difference(row_a, row_b, change + min(low, 0.0), change + max(high, 0.0), "paired")
    if None in (row_a.low, row_a.high, row_b.low, row_b.high):
        return _make_difference(row_a, row_b, -np.inf, np.inf, "no interval was stored")
    half = [(row.high - row.low) / 2 for row in (row_a, row_b)]  # type: ignore[operator]
    spread = float(np.hypot(half[0], half[1]))
    return _make_difference(row_a, row_b, change - spread, change + spread, "unpaired")


def _make_difference(a: ResultRow, b: ResultRow, low: float, high: float, how: str) -> Difference:
    return Difference(a.metric, a.value, b.value, low, high, how, a.higher_is_better)


def draw_paired(a: PromptValues, b: PromptValues, row: ResultRow, *, seed: int = 0) -> np.ndarray | None:
    """Draws of (b minus a) around the measured difference, the same prompts drawn for both.

    None where their prompts are not the same; NaN where nothing tells how much prompts vary (`_draw_difference`).
    """
    if "features" in a:
        if not np.array_equal(a["cluster"], b["cluster"]):
            return None
        reference = {"mean_ref_E": a["reference_mean"], "cov_ref_EE": a["reference_covariance"]}
        first, second = (resample_distances(k["features"], k["cluster"], **reference, seed=seed) for k in (a, b))
        apart = second - first
        return np.full(RESAMPLES, np.nan) if are_all_alike(apart) else apart - apart.mean()
    split, tasks = _parse_path(row)
    if not tasks:
        return None
    total, rng = np.zeros(RESAMPLES), np.random.default_rng(seed)
    for name in tasks:
        one, two = (_select_rows(kept, split, name) for kept in (a, b))
        if not len(one) or not np.array_equal(one[:, 0], two[:, 0]):
            return None
        total += _draw_difference(one, two, rng)
    return total / len(tasks)


def _draw_difference(one: np.ndarray, two: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws of a task's difference around the measured one, where prompts differ in it; one, two: rows of (prompt, sum,
    count).

    A bootstrap of prompts claims far too much where few of them differ: with no difference at all, 20 prompts of four
    images were called better or worse in 8 to 28 cases of 100. So prompts get Dirichlet weights (the Bayesian
    bootstrap, D. B. Rubin, Annals of Statistics 9 (1981), 130-134), and a win, a tie and a loss of the largest size
    seen count half a prompt each. For wins, ties and losses of one size that is the posterior under Jeffreys' prior
    (P. M. E. Altham, The analysis of matched proportions, Biometrika 58 (1971), 561-576). Eight ties give about
    +-0.22. Differences that all agree on another value (one prompt) leave the spread unknown: NaN.
    """
    apart = two[:, 1] / two[:, 2] - one[:, 1] / one[:, 2]
    if are_all_alike(apart) and not np.isin(apart, (-1.0, 0.0, 1.0)).all():
        return np.full(RESAMPLES, np.nan)
    size = float(np.abs(apart).max()) or 1.0
    weights = rng.dirichlet(np.append(np.ones(len(apart)), [0.5, 0.5, 0.5]), size=RESAMPLES)
    prompts, (lost, tied, won) = weights[:, :-3], weights[:, -3:].T
    seen = _average(two, prompts) - _average(one, prompts)
    measured = _average(two, np.ones(len(apart))) - _average(one, np.ones(len(apart)))
    return (1 - lost - tied - won) * seen + (won - lost) * size - measured


def _parse_path(row: ResultRow) -> tuple[str, list[str]]:
    """Split ("seen", "unseen" or "") and tasks of a row such as world_geneval/overall/unseen."""
    _, *path = row.metric.split("/")
    split = path.pop() if path and path[-1] in ("seen", "unseen") else ""
    if path and path[-1] == "overall":
        return split, list(json.loads(row.details or "{}").get("tasks", []))
    return split, path[-1:] or ["captions"]


def _select_rows(kept: PromptValues, split: str, stratum: str) -> np.ndarray:
    """(cluster, sum, count) of one task, by cluster."""
    chosen_rows = kept["stratum"] == stratum
    if "split" in kept:
        chosen_rows &= kept["split"] == split
    table = np.stack([kept[key][chosen_rows] for key in ("cluster", "sum", "count")], axis=1)
    return table[np.argsort(table[:, 0], kind="stable")]


def _average(table: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean over images, for each row of weights of the prompts."""
    return (weights @ table[:, 1]) / (weights @ table[:, 2])


def _format_interval(d: Difference) -> str:
    return f"[{d.low:+9.4f}, {d.high:+9.4f}]" if np.isfinite([d.low, d.high]).all() else "unknown"


def format_table(a: EvaluatedRun, b: EvaluatedRun, differences: Sequence[Difference]) -> list[str]:
    """Lines for the terminal, a head and one per difference."""
    wide = max([len(d.metric) for d in differences], default=6)
    head = f"{'metric':<{wide}}  {a.name:>16}  {b.name:>16}  {'B - A':>9}  {'95 % interval':^22}"
    lines = [
        f"{d.metric:<{wide}}  {d.a:>16.4f}  {d.b:>16.4f}  {d.b - d.a:>+9.4f}  {_format_interval(d):<22}  "
        f"{d.verdict} ({d.how})"
        for d in differences
    ]
    return [head, *lines]

"""The sentences of a report: each carries its numbers, and says where they do not suffice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from eval.report.law import ScalingLaws
from eval.report.predict import GradedPrediction
from eval.report.series import Comparison, LeftOut, MetricPoint, ScoreTask
from eval.report.tables import AS_IT_MUST_BE, CalibrationLine, TrainingCost
from eval.report.text import format_count, format_duration
from eval.scaling.correlation import Correlation

Kind = Literal["good", "bad", "note"]


@dataclass(frozen=True)
class ReportFinding:
    """`kind`: the result is as hoped, is not, or is neither."""

    kind: Kind
    text: str


def describe_losses(
    losses: Comparison | None, labels: Mapping[str, str], sizes: Mapping[str, int]
) -> list[ReportFinding]:
    """Does the loss fall with images, and is a larger model better at equal images?"""
    if losses is None:
        return [
            ReportFinding("bad", "No run has a validation loss yet, so nothing can be said about learning or size.")
        ]
    found = []
    curves = {run: points for run, points in losses.points.items() if len(points) > 1}
    falling = [run for run, points in curves.items() if points[-1].value < points[0].value]
    for run in list(curves)[-1:]:
        first, last = curves[run][0], curves[run][-1]
        share = "every run" if len(falling) == len(curves) else f"{len(falling)} of {len(curves)} runs"
        kind: Kind = "good" if len(falling) == len(curves) else "bad"
        found.append(
            ReportFinding(
                kind,
                f"Validation loss falls with images seen in {share}; {labels[run]} goes from {first.value:.4g} at "
                f"{format_count(first.images)} images to {_format_point(last, 4)} at {format_count(last.images)}.",
            )
        )
    return found + _describe_sizes(losses, labels, sizes)


def _describe_sizes(losses: Comparison, labels: Mapping[str, str], sizes: Mapping[str, int]) -> list[ReportFinding]:
    images = losses.last_common
    if len(losses.points) < 2:
        return []
    if images is None:
        return [ReportFinding("note", "The runs share no checkpoint at equal images, so their losses are not ranked.")]
    at = {run: losses.values()[run][images] for run in losses.points}
    listed = ", ".join(f"{labels[run]} {value:.4g}" for run, value in at.items())
    ordered = sorted((sizes[run], at[run]) for run in at if sizes.get(run))
    if len(ordered) < 2 or ordered[0][0] == ordered[-1][0]:
        return [ReportFinding("note", f"Validation loss at {format_count(images)} images: {listed}.")]
    # Runs of one size (seeds) have no order among themselves.
    wrong = [(a, b) for a in ordered for b in ordered if a[0] < b[0] and a[1] <= b[1]]
    if not wrong:
        return [
            ReportFinding(
                "good", f"Larger is better at every step of the ladder: at {format_count(images)} images {listed}."
            )
        ]
    overall = ordered[0][1] > ordered[-1][1]
    text = (
        "The largest model has a lower loss than the smallest, but not every step up helps"
        if overall
        else "The largest model is not the best"
    )
    return [ReportFinding("note" if overall else "bad", f"{text}: at {format_count(images)} images {listed}.")]


def describe_laws(scaling: ScalingLaws) -> list[ReportFinding]:
    notes = [ReportFinding("note", text) for text in scaling.notes]
    if scaling.reason is not None:
        return [ReportFinding("note", f"No scaling law is drawn: {scaling.reason}."), *notes]
    size, compute = scaling.laws["L(N)"], scaling.laws["L(C)"]
    (alpha,), (gamma,) = size.exponents, compute.exponents
    found = [
        ReportFinding(
            "note",
            f"At {format_count(scaling.images)} images the loss follows L(N) = {size.floor.value:.3g} + "
            f"{size.coefficients[0]:.3g} N^-{alpha.value:.2f} (95 % interval of the exponent "
            f"{alpha.low:.2f} to {alpha.high:.2f}, runs resampled).",
        ),
        ReportFinding(
            "note",
            f"At the size that is best for each compute it falls as L(C) = {compute.floor.value:.3g} + "
            f"{compute.coefficients[0]:.3g} C^-{gamma.value:.2f} (95 % interval of the exponent "
            f"{gamma.low:.2f} to {gamma.high:.2f}).",
        ),
    ]
    ahead, back = scaling.next_rung, scaling.held_out
    if ahead:
        name = f"depth {ahead.depth}" if ahead.depth else "the next size"
        found.append(
            ReportFinding(
                "note",
                f"Prediction for {name} ({format_count(ahead.parameters)} parameters) at the same images: "
                f"{ahead.loss.value:.4g} ({ahead.loss.low:.4g} to {ahead.loss.high:.4g}).",
            )
        )
    if back and back.actual is not None:
        name = f"depth {back.depth}" if back.depth else "the largest model"
        hit = "inside" if back.inside else "outside"
        found.append(
            ReportFinding(
                "good" if back.inside else "bad",
                f"Asked without {name}, the law says {back.loss.value:.4g} for it "
                f"({back.loss.low:.4g} to {back.loss.high:.4g}); "
                f"measured is {back.actual:.4g}, {hit} the interval.",
            )
        )
    return found + notes


def describe_predictions(graded: Sequence[GradedPrediction]) -> list[ReportFinding]:
    """What came of predictions that were committed before their depth was trained."""
    found = []
    for p in graded:
        if p.actual is None:
            continue
        hit = "inside" if p.inside else "outside"
        late = "" if p.first else " It was committed after that run had begun, so it proves nothing."
        kind: Kind = "note" if not p.first else "good" if p.inside else "bad"
        found.append(
            ReportFinding(
                kind,
                f"Predicted on {p.created[:10]} for depth {p.depth} at {format_count(p.images)} images: "
                f"{p.loss.value:.4g} ({p.loss.low:.4g} to {p.loss.high:.4g}); measured is {p.actual:.4g}, "
                f"{hit} the interval.{late}",
            )
        )
    return found


def describe_scores(
    family: str, tasks: Sequence[ScoreTask], found: Mapping[str, Comparison], labels: Mapping[str, str]
) -> list[ReportFinding]:
    """The best run's overall score with its interval, seen and unseen."""
    overall = next((task for task in tasks if task.task == "overall"), None)
    if overall is None:
        return []
    main = overall.metrics.get("seen", overall.metrics.get("all", next(iter(overall.metrics.values()))))
    comparison = found[main]
    ends = {run: points[-1] for run, points in comparison.points.items()}
    if len(ends) > 1 and len({end.value for end in ends.values()}) == 1:
        value = next(iter(ends.values())).value
        kind: Kind = "bad" if value == 0 else "note"
        return [ReportFinding(kind, f"{family} is {value:.3g} for every run: no order to speak of.")]
    first = find_best_runs({run: end.value for run, end in ends.items()}, comparison.higher_is_better)
    run = first[0]
    clauses = []
    for split, metric in sorted(overall.metrics.items()):
        points = [point for point in (found[metric].at(name) for name in first) if point is not None]
        if points:
            texts = dict.fromkeys(_format_point(point) for point in points)  # runs that share one value may differ here
            where = {"seen": " on seen compositions", "unseen": " on unseen ones"}.get(split, "")
            clauses.append(f"{' and '.join(texts)}{where}")
    direction = "highest" if comparison.higher_is_better else "lowest"
    names = join_names([labels[name] for name in first])
    verb = f"{'has' if len(first) == 1 else 'share'} the {direction}" if len(ends) > 1 else "gets"
    who = f"{names} {verb} {family}"
    edge = ends[run].low if comparison.higher_is_better else ends[run].high
    sign = 1 if comparison.higher_is_better else -1
    others = {labels[n]: end.value for n, end in ends.items() if n not in first}
    close = [label for label, value in others.items() if edge is not None and sign * (value - edge) >= 0]
    tie = f" Its interval also holds the value of {join_names(close)}." if close else ""
    return [ReportFinding("note", f"{who}: {', '.join(clauses)}, at {format_count(ends[run].images)} images.{tie}")]


def find_best_runs(values: Mapping[str, float], higher_is_better: bool) -> list[str]:
    """The runs with the best value: several where they tie."""
    best = (max if higher_is_better else min)(values.values())
    return [run for run, value in values.items() if value == best]


def join_names(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _format_point(point: MetricPoint, digits: int = 3) -> str:
    known = point.low is not None and point.high is not None
    interval = f" ({point.low:.{digits}g} to {point.high:.{digits}g})" if known else ""
    return f"{point.value:.{digits}g}{interval}"


def describe_calibration(lines: Sequence[CalibrationLine], judged: bool) -> list[ReportFinding]:
    """Can the judges be believed? `judged`: there are scores by judges that must be calibrated."""
    with_verdict = [line for line in lines if line.verdict]
    if not with_verdict:
        missing = (
            "The judges carry no calibration (ground truth, shuffled scenes and noise), so read their scores with care."
        )
        return [ReportFinding("bad", missing)] if judged else []
    found = []
    good = []
    for line in with_verdict:
        if line.verdict == AS_IT_MUST_BE and line.ground_truth and line.shuffled and line.noise:
            truth, shuffled, noise = (point.value for point in (line.ground_truth, line.shuffled, line.noise))
            good.append(f"{line.metric} gives ground truth {truth:.2f}, shuffled {shuffled:.2f}, noise {noise:.2f}")
        else:
            found.append(ReportFinding("bad", f"{line.metric}: {line.verdict}."))
    if good:
        listed = "; ".join(good)
        found.append(ReportFinding("good", f"The judges can tell right from wrong: {listed}."))
    return found


def describe_correlations(lines: Sequence[tuple[str, Correlation]]) -> list[ReportFinding]:
    known = [(metric, c) for metric, c in lines if c.pearson]
    if not known:
        return []
    clauses = []
    for metric, c in known:
        assert c.pearson is not None
        interval = "" if c.pearson.low is None else f" ({c.pearson.low:+.2f} to {c.pearson.high:+.2f})"
        clauses.append(f"{metric} {c.pearson.value:+.2f}{interval}")
    runs = max(c.num_runs for _, c in known)
    caution = (
        " With so few runs this shows a direction, no strength."
        if all(c.pearson and c.pearson.low is None for _, c in known)
        else ""
    )
    return [
        ReportFinding(
            "note", f"Correlation of validation loss across {runs} runs at equal images: {', '.join(clauses)}.{caution}"
        )
    ]


def describe_costs(costs: Mapping[str, TrainingCost]) -> list[ReportFinding]:
    seconds = [cost.seconds for cost in costs.values() if cost.seconds is not None]
    if not seconds:
        return []
    flops = [cost.flops for cost in costs.values() if cost.flops]
    work = f" and {sum(flops):.2g} FLOPs" if len(flops) == len(costs) else ""
    runs = f"{len(seconds)} run{'s' if len(seconds) > 1 else ''}"
    return [ReportFinding("note", f"Training took {format_duration(sum(seconds))}{work} for {runs}.")]


def describe_left_out(left_out: Sequence[LeftOut]) -> list[ReportFinding]:
    if not left_out:
        return []
    runs = sorted({left.run for left in left_out})
    metrics = sorted({left.metric for left in left_out})
    named = ", ".join(metrics[:3]) + (f" and {len(metrics) - 3} more" if len(metrics) > 3 else "")
    text = f"Not compared: {named} of {', '.join(runs)}, measured under another protocol than the rest (see below)."
    return [ReportFinding("bad", text)]

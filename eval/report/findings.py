"""What a report says in plain words: each sentence carries its figures, and says when they do not suffice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from eval.report.data import Run
from eval.report.law import Scaling
from eval.report.predict import Graded
from eval.report.series import Comparison, LeftOut, Point, Task, is_loss, is_number
from eval.report.style import count_text
from eval.scaling.correlation import Correlation

Kind = Literal["good", "bad", "note"]


@dataclass(frozen=True)
class Finding:
    """`kind`: the result is as hoped, is not, or is neither."""

    kind: Kind
    text: str


def loss_findings(losses: Comparison | None, labels: Mapping[str, str], sizes: Mapping[str, int]) -> list[Finding]:
    """Does the loss fall with images, and is a larger model better at equal images?"""
    if losses is None:
        return [Finding("bad", "No run has a validation loss yet, so nothing can be said about learning or size.")]
    found = []
    curves = {run: points for run, points in losses.points.items() if len(points) > 1}
    falling = [run for run, points in curves.items() if points[-1].value < points[0].value]
    for run in list(curves)[-1:]:
        first, last = curves[run][0], curves[run][-1]
        share = "every run" if len(falling) == len(curves) else f"{len(falling)} of {len(curves)} runs"
        kind: Kind = "good" if len(falling) == len(curves) else "bad"
        found.append(
            Finding(
                kind,
                f"Validation loss falls with images seen in {share}; {labels[run]} goes from {first.value:.4g} at "
                f"{count_text(first.images)} images to {_value_text(last, 4)} at {count_text(last.images)}.",
            )
        )
    return found + _size_findings(losses, labels, sizes)


def _size_findings(losses: Comparison, labels: Mapping[str, str], sizes: Mapping[str, int]) -> list[Finding]:
    images = losses.last_common
    if len(losses.points) < 2:
        return []
    if images is None:
        return [Finding("note", "The runs share no checkpoint at equal images, so their losses are not ranked.")]
    at = {run: losses.values()[run][images] for run in losses.points}
    listed = ", ".join(f"{labels[run]} {value:.4g}" for run, value in at.items())
    ordered = sorted((sizes[run], at[run]) for run in at if sizes.get(run))
    if len(ordered) < 2 or ordered[0][0] == ordered[-1][0]:
        return [Finding("note", f"Validation loss at {count_text(images)} images: {listed}.")]
    # Runs of one size (seeds) have no order among themselves.
    wrong = [(a, b) for a in ordered for b in ordered if a[0] < b[0] and a[1] <= b[1]]
    if not wrong:
        return [
            Finding("good", f"Larger is better at every step of the ladder: at {count_text(images)} images {listed}.")
        ]
    overall = ordered[0][1] > ordered[-1][1]
    text = (
        "The largest model has a lower loss than the smallest, but not every step up helps"
        if overall
        else "The largest model is not the best"
    )
    return [Finding("note" if overall else "bad", f"{text}: at {count_text(images)} images {listed}.")]


def law_findings(scaling: Scaling) -> list[Finding]:
    notes = [Finding("note", text) for text in scaling.notes]
    if scaling.reason is not None:
        return [Finding("note", f"No scaling law is drawn: {scaling.reason}."), *notes]
    assert scaling.size is not None
    alpha, floor = scaling.size.exponent(0), scaling.size.floor()
    found = [
        Finding(
            "note",
            f"At {count_text(scaling.images)} images the loss follows L(N) = {floor.value:.3g} + "
            f"{scaling.size.law.coefficients[0]:.3g} N^-{alpha.value:.2f} (95 % interval of the exponent "
            f"{alpha.low:.2f} to {alpha.high:.2f}, runs resampled).",
        )
    ]
    if scaling.compute is not None:
        gamma = scaling.compute.exponent(0)
        found.append(
            Finding(
                "note",
                f"At the size that is best for each compute it falls as L(C) = {scaling.compute.floor().value:.3g} + "
                f"{scaling.compute.law.coefficients[0]:.3g} C^-{gamma.value:.2f} (95 % interval of the exponent "
                f"{gamma.low:.2f} to {gamma.high:.2f}).",
            )
        )
    ahead, back = scaling.next_rung, scaling.held_out
    if ahead:
        name = f"depth {ahead.depth}" if ahead.depth else "the next size"
        found.append(
            Finding(
                "note",
                f"Prediction for {name} ({count_text(ahead.parameters)} parameters) at the same images: "
                f"{ahead.loss.value:.4g} ({ahead.loss.low:.4g} to {ahead.loss.high:.4g}).",
            )
        )
    if back and back.actual is not None:
        name = f"depth {back.depth}" if back.depth else "the largest model"
        hit = "inside" if back.inside else "outside"
        found.append(
            Finding(
                "good" if back.inside else "bad",
                f"Asked without {name}, the law says {back.loss.value:.4g} for it "
                f"({back.loss.low:.4g} to {back.loss.high:.4g}); "
                f"measured is {back.actual:.4g}, {hit} the interval.",
            )
        )
    return found + notes


def prediction_findings(graded: Sequence[Graded]) -> list[Finding]:
    """What came of predictions that were committed before their depth was trained."""
    found = []
    for p in graded:
        if p.actual is None:
            continue
        hit = "inside" if p.inside else "outside"
        late = "" if p.first else " It was committed after that run had begun, so it proves nothing."
        kind: Kind = "note" if not p.first else "good" if p.inside else "bad"
        found.append(
            Finding(
                kind,
                f"Predicted on {p.created[:10]} for depth {p.depth} at {count_text(p.images)} images: "
                f"{p.loss.value:.4g} ({p.loss.low:.4g} to {p.loss.high:.4g}); measured is {p.actual:.4g}, "
                f"{hit} the interval.{late}",
            )
        )
    return found


def score_findings(
    family: str, tasks: Sequence[Task], found: Mapping[str, Comparison], labels: Mapping[str, str]
) -> list[Finding]:
    """The best run's overall score with its interval, seen and unseen."""
    overall = next((task for task in tasks if task.name == "overall"), None)
    if overall is None:
        return []
    main = overall.metrics.get("seen", overall.metrics.get("all", next(iter(overall.metrics.values()))))
    comparison = found[main]
    ends = {run: points[-1] for run, points in comparison.points.items()}
    if len(ends) > 1 and len({end.value for end in ends.values()}) == 1:
        value = next(iter(ends.values())).value
        kind: Kind = "bad" if value == 0 else "note"
        return [Finding(kind, f"{family} is {value:.3g} for every run: no order to speak of.")]
    first = _best({run: end.value for run, end in ends.items()}, comparison.higher_is_better)
    run = first[0]
    said = []
    for split, metric in sorted(overall.metrics.items()):
        points = [point for point in (found[metric].at(name) for name in first) if point is not None]
        if points:
            told = dict.fromkeys(_value_text(point) for point in points)  # runs that share one value may differ here
            where = {"seen": " on seen compositions", "unseen": " on unseen ones"}.get(split, "")
            said.append(f"{' and '.join(told)}{where}")
    direction = "highest" if comparison.higher_is_better else "lowest"
    names = _listed([labels[name] for name in first])
    verb = f"{'has' if len(first) == 1 else 'share'} the {direction}" if len(ends) > 1 else "gets"
    who = f"{names} {verb} {family}"
    edge = ends[run].low if comparison.higher_is_better else ends[run].high
    sign = 1 if comparison.higher_is_better else -1
    others = {labels[n]: end.value for n, end in ends.items() if n not in first}
    close = [label for label, value in others.items() if edge is not None and sign * (value - edge) >= 0]
    tie = f" Its interval also holds the value of {_listed(close)}." if close else ""
    return [Finding("note", f"{who}: {', '.join(said)}, at {count_text(ends[run].images)} images.{tie}")]


def _best(values: Mapping[str, float], higher_is_better: bool) -> list[str]:
    """The runs with the best value: several where they tie."""
    best = (max if higher_is_better else min)(values.values())
    return [run for run, value in values.items() if value == best]


def _listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _value_text(point: Point, digits: int = 3) -> str:
    known = point.low is not None and point.high is not None
    interval = f" ({point.low:.{digits}g} to {point.high:.{digits}g})" if known else ""
    return f"{point.value:.{digits}g}{interval}"


def calibration_findings(lines: Sequence[Mapping[str, Any]], judged: bool) -> list[Finding]:
    """Can the judges be believed? Said once, with the figures."""
    with_verdict = [line for line in lines if line["verdict"]]
    if not with_verdict:
        missing = (
            "The judges carry no calibration (ground truth, shuffled scenes and noise), so read their scores with care."
        )
        return [Finding("bad", missing)] if judged else []
    found = [
        Finding("bad", f"{line['metric']}: {line['verdict']}.")
        for line in with_verdict
        if line["verdict"] != "as it must be"
    ]
    good = [line for line in with_verdict if line["verdict"] == "as it must be"]
    if good:
        said = "; ".join(
            f"{line['metric']} gives ground truth {line['ground_truth']['value']:.2f}, "
            f"shuffled {line['shuffled']['value']:.2f}, noise {line['noise']['value']:.2f}"
            for line in good
        )
        found.append(Finding("good", f"The judges can tell right from wrong: {said}."))
    return found


def correlation_findings(lines: Sequence[tuple[str, Correlation]]) -> list[Finding]:
    known = [(metric, c) for metric, c in lines if c.pearson]
    if not known:
        return []
    said = []
    for metric, c in known:
        assert c.pearson is not None
        interval = "" if c.pearson.low is None else f" ({c.pearson.low:+.2f} to {c.pearson.high:+.2f})"
        said.append(f"{metric} {c.pearson.value:+.2f}{interval}")
    runs = max(c.num_runs for _, c in known)
    caution = (
        " With so few runs this shows a direction, no strength."
        if all(c.pearson and c.pearson.low is None for _, c in known)
        else ""
    )
    return [
        Finding(
            "note", f"Correlation of validation loss across {runs} runs at equal images: {', '.join(said)}.{caution}"
        )
    ]


def cost_findings(costs: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    seconds = [cost["seconds"] for cost in costs.values() if cost["seconds"] is not None]
    if not seconds:
        return []
    flops = [cost["flops"] for cost in costs.values() if cost["flops"]]
    work = f" and {sum(flops):.2g} FLOPs" if len(flops) == len(costs) else ""
    runs = f"{len(seconds)} run{'s' if len(seconds) > 1 else ''}"
    return [Finding("note", f"Training took {duration(sum(seconds))}{work} for {runs}.")]


def protocol_findings(left_out: Sequence[LeftOut]) -> list[Finding]:
    if not left_out:
        return []
    runs = sorted({left.run for left in left_out})
    metrics = sorted({left.metric for left in left_out})
    named = ", ".join(metrics[:3]) + (f" and {len(metrics) - 3} more" if len(metrics) > 3 else "")
    text = f"Not compared: {named} of {', '.join(runs)}, measured under another protocol than the rest (see below)."
    return [Finding("bad", text)]


def missing_findings(
    runs: Sequence[Run], labels: Mapping[str, str], families: Mapping[str, Sequence[Task]], calibration: Sequence[Any]
) -> list[str]:
    """What a reader would look for and not find."""

    def name(run: Run) -> str:
        return run.name if labels[run.name] == run.name else f"{labels[run.name]} ({run.name})"

    said = [f"{name(run)}: no {piece}" for run in runs for piece in run.missing]
    for run in runs:
        bad = [row.images_seen for row in run.rows if is_loss(row.metric) and not is_number(row)]
        if bad:
            said.append(
                f"{name(run)}: no usable validation loss at {len(bad)} of its checkpoints (nan, infinite or not "
                f"positive), the first at {count_text(min(bad))} images"
            )
    said += [f"{name(run)}: no sample images" for run in runs if not run.samples]
    judged = set(families)
    said += [
        f"{name(run)}: no scores"
        for run in runs
        if judged and not judged & {row.metric.split("/")[0] for row in run.rows}
    ]
    if not families:
        said.append("no scores (python -m eval run judges images of the checkpoints)")
    if families and not calibration:
        said.append("no calibration of the judges (ground truth, shuffled scenes and noise)")
    if len(runs) == 1:
        said.append("only one run, so nothing is compared")
    return said


def tiles(
    losses: Comparison | None,
    families: Mapping[str, Sequence[Task]],
    found: Mapping[str, Comparison],
    costs: Mapping[str, Mapping[str, Any]],
    labels: Mapping[str, str],
) -> list[dict[str, str]]:
    """The few numbers at the head of the page."""
    made = []
    if losses:
        run = min(losses.points, key=lambda name: losses.points[name][-1].value)
        made.append({"value": f"{losses.points[run][-1].value:.4g}", "text": f"lowest validation loss ({labels[run]})"})
    for family, tasks in list(families.items())[:2]:
        metric = next(iter(sorted(tasks[0].metrics.items(), key=lambda item: item[0] != "seen")))[1]
        ends = {run: points[-1].value for run, points in found[metric].points.items()}
        first = _best(ends, found[metric].higher_is_better)
        where = ", seen compositions" if metric.endswith("/seen") else ""
        whose = _listed([labels[run] for run in first]) if len(ends) == 1 or len(first) < len(ends) else "every run"
        made.append({"value": f"{ends[first[0]]:.3g}", "text": f"best {family}{where} ({whose})"})
    images = [cost["images"] for cost in costs.values() if cost["images"]]
    seconds = [cost["seconds"] for cost in costs.values() if cost["seconds"] is not None]
    if images:
        made.append({"value": count_text(max(images)), "text": f"images seen by the longest of {len(costs)} runs"})
    if seconds:
        made.append({"value": duration(sum(seconds)), "text": "training time of all runs"})
    return made


def duration(seconds: float) -> str:
    """95 -> 1 min 35 s; 7260 -> 2 h 01 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"

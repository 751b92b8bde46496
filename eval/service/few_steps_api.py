"""The route of the few-step page: the report's own page of `eval fewstep`, composed from the snapshot."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastapi import FastAPI, Response

from eval.report.fewstep_page import FewStepPage, Strip, compose_page
from eval.report.fewsteps import compose_few_steps, is_few_step
from eval.report.series import Comparison, LeftOut
from eval.service.answers import Answers, RunNames
from eval.service.law import compose_comparison
from eval.service.snapshot import Snapshot


@dataclass(frozen=True)
class FewStepAnswer:
    """`page`: null where `eval fewstep` has measured none of these runs. A row of strips names its picture as
    /api/picture takes it."""

    page: FewStepPage | None


def add_few_step_routes(app: FastAPI, answers: Answers) -> None:
    @app.get("/api/few_steps", response_model=FewStepAnswer, tags=["numbers"],
             summary="Teachers and students by number of steps")  # fmt: skip
    def few_steps(run: RunNames = None) -> Response:
        return answers.answer(("few_steps", *(run or [])), lambda now: FewStepAnswer(compose_answer(now, run)))


def compose_answer(snapshot: Snapshot, names: Sequence[str] | None) -> FewStepPage | None:
    """The page of these runs, each metric under the protocol that most runs of the store have."""
    chosen = [run.run for run in snapshot.choose(names)]
    mine = [run.name for run in chosen]
    comparisons = {metric: _compare(snapshot, metric, mine) for metric in filter(is_few_step, snapshot.metrics)}
    having = {metric: found for metric, found in comparisons.items() if found is not None and found.points}
    found = compose_few_steps(chosen, having, {name: name for name in mine})
    if found is None:
        return None
    page = compose_page(found, chosen)
    return replace(page, strips=[_name_pictures(strip) for strip in page.strips])


def _compare(snapshot: Snapshot, metric: str, names: Sequence[str]) -> Comparison | None:
    curves = snapshot.select_curves(metric)
    if curves is None:
        return None
    left = tuple(
        LeftOut(metric, name, float(series.value_P[-1]), protocol, curves.protocol)
        for name in names
        if name in curves.left_out
        for protocol, series in snapshot.by_name[name].series[metric].items()
    )
    return replace(compose_comparison(curves, [name for name in names if name in curves.by_run]), left_out=left)


def _name_pictures(strip: Strip) -> Strip:
    return replace(strip, rows=[replace(row, picture=row.picture.rsplit("/", 1)[-1]) for row in strip.rows])

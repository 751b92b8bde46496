"""Routes about runs: what is watched, each run's progress and recipe, plan against reality, failures."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Response

from eval.report.runs import MARKS, NOT_BEGUN, parse_finite, parse_positive
from eval.report.series import MetricPoint
from eval.report.tables import PlannedQuantity, RecipeDifference, TrainingCost, compare_recipes, flatten
from eval.service.answers import Answers, JsonAnswer, RunNames, describe_refusals, or_404
from eval.service.claims import EvaluationState, read_reason
from eval.service.snapshot import IndexedRun, MetricCurves, Snapshot
from eval.service.watcher import EvaluationStatus
from infra.version import code_version

MOST_FIELDS = 60


@dataclass(frozen=True)
class ServiceStatus(EvaluationStatus):
    """`created`, `time`, `since` and `looked` are seconds since 1970; `reading`: runs read and runs to read."""

    uri: str
    generation: int
    runs: int
    created: float
    reading: tuple[int, int] | None
    version: str
    time: float


@dataclass(frozen=True)
class RunLine:
    """`last`: when its latest row was written (ISO 8601); `scores`: overall ones, by metric."""

    name: str
    depth: int | None
    parameters: int | None
    flops_per_image: float | None
    images: int
    planned_images: float | None
    recipe_hash: str
    last: str
    loss: MetricPoint | None
    scores: dict[str, MetricPoint]
    cost: TrainingCost
    checkpoints: int
    evaluated: int
    failed: int
    running: int
    problems: int
    pictures: bool


@dataclass(frozen=True)
class RunList:
    """`metric`: the validation loss that most runs have."""

    runs: list[RunLine]
    metric: str | None


@dataclass(frozen=True)
class CheckpointState:
    step: int
    state: EvaluationState


@dataclass(frozen=True)
class RunDetails:
    """`recipe`: dotted field -> its value in words; `numbers`: metric -> its last value."""

    name: str
    depth: int | None
    parameters: int | None
    images: int
    recipe_hash: str
    code_versions: tuple[str, ...]
    last: str
    recipe: dict[str, str]
    cost: TrainingCost
    numbers: dict[str, MetricPoint]
    checkpoints: list[CheckpointState]
    problems: list[str]


@dataclass(frozen=True)
class RecipeComparison:
    """`differences` have one value per run (`more` of them are not shown); `same` fields do not differ."""

    runs: list[str]
    differences: list[RecipeDifference]
    more: int
    same: int


@dataclass(frozen=True)
class PlanProgress:
    """`progress`: share of the planned images that were trained on."""

    name: str
    parameters: int | None
    progress: float | None
    lines: list[PlannedQuantity]
    cost: TrainingCost


@dataclass(frozen=True)
class PlanList:
    runs: list[PlanProgress]


@dataclass(frozen=True)
class EvaluationFailure:
    run: str
    step: int
    reason: str
    at: str
    attempts: int


@dataclass(frozen=True)
class UnreadableFile:
    """`run` is "" for what belongs to none."""

    run: str
    reason: str


@dataclass(frozen=True)
class FailureList:
    evaluations: list[EvaluationFailure]
    unreadable: list[UnreadableFile]
    problem: str


def add_run_routes(app: FastAPI, answers: Answers) -> None:
    @app.get("/api/status", response_model=ServiceStatus, tags=["state"],
             summary="What is watched, and what is being evaluated")  # fmt: skip
    def status() -> Response:
        now, work = answers.now, answers.watcher.describe()
        return JsonAnswer(
            ServiceStatus(
                **vars(work), uri=now.uri, generation=now.generation, runs=len(now.runs), created=now.created,
                reading=answers.index.reading, version=code_version(), time=time.time(),
            )
        )  # fmt: skip

    @app.get("/api/runs", response_model=RunList, tags=["state"],
             summary="Every run: size, progress, last loss, overall scores")  # fmt: skip
    def runs() -> Response:
        return answers.answer("runs", lambda now: list_runs(now, answers.settings))

    @app.get("/api/run", response_model=RunDetails, tags=["state"],
             summary="One run: recipe, cost, last value of every metric, checkpoints",
             responses=describe_refusals(_404="no such run"))  # fmt: skip
    def run(name: str) -> Response:
        return JsonAnswer(or_404(describe_run(answers.now, name, answers.settings), f"no run named {name!r}"))

    @app.get("/api/recipes", response_model=RecipeComparison, tags=["state"], summary="Fields in which recipes differ")
    def recipes(run: RunNames = None) -> Response:
        return answers.answer(("recipes", *(run or [])), lambda now: describe_recipes(now.choose(run)))

    @app.get("/api/plans", response_model=PlanList, tags=["state"], summary="Plan against reality")
    def plans(run: RunNames = None) -> Response:
        return answers.answer(("plans", *(run or [])), lambda now: PlanList(list(map(describe_plan, now.choose(run)))))

    @app.get("/api/failures", response_model=FailureList, tags=["state"],
             summary="What could not be evaluated or read, with reasons")  # fmt: skip
    def failures() -> Response:
        problem = answers.watcher.describe().problem
        return answers.answer(("failures", problem), lambda now: list_failures(now, answers.settings, problem))


def list_runs(snapshot: Snapshot, settings: str) -> RunList:
    """One line per run: size, progress, last loss, overall scores, how far its evaluation is."""
    loss = snapshot.main_loss
    overall = [tasks[0] for tasks in snapshot.families.values() if tasks[0].task == "overall"]
    headlines = [
        curves for task in overall for metric in task.metrics.values() if (curves := snapshot.select_curves(metric))
    ]
    losses = snapshot.select_curves(loss) if loss else None
    return RunList([_describe_line(run, settings, losses, headlines) for run in snapshot.runs], loss)


def _describe_line(
    run: IndexedRun, settings: str, losses: MetricCurves | None, headlines: Sequence[MetricCurves]
) -> RunLine:
    states = list(run.list_states(settings).values())
    return RunLine(
        name=run.name,
        depth=run.run.depth,
        parameters=run.run.parameters,
        flops_per_image=run.run.flops_per_image,
        images=run.images,
        planned_images=parse_positive(run.run.recipe.get("images")),
        recipe_hash=run.recipe_hash,
        last=run.last,
        loss=losses.find_point(run.name) if losses else None,
        scores={curves.metric: point for curves in headlines if (point := curves.find_point(run.name))},
        cost=run.cost,
        checkpoints=len(run.weights),
        evaluated=states.count("done"),
        failed=states.count("failed"),
        running=states.count("running"),
        problems=len(list_problems(run)),
        pictures=bool(run.gallery or run.run.samples),
    )


def list_problems(run: IndexedRun) -> list[str]:
    """What of the run's files cannot be read; that a run has only just begun is no fault of its files."""
    missing = [f"{piece} is missing" if piece in MARKS else piece for piece in run.run.missing if piece != NOT_BEGUN]
    return [*missing, *run.skipped]


def describe_run(snapshot: Snapshot, name: str, settings: str) -> RunDetails | None:
    run = snapshot.by_name.get(name)
    if run is None:
        return None
    points = {metric: c.find_point(name) for metric in run.series if (c := snapshot.select_curves(metric))}
    states = run.list_states(settings)
    return RunDetails(
        name=name,
        depth=run.run.depth,
        parameters=run.run.parameters,
        images=run.images,
        recipe_hash=run.recipe_hash,
        code_versions=run.code_versions,
        last=run.last,
        recipe=flatten(run.run.recipe),
        cost=run.cost,
        numbers={metric: point for metric, point in sorted(points.items(), key=_rank_metric) if point},
        checkpoints=[CheckpointState(step, states.get(step, "new")) for step in run.weights],
        problems=list_problems(run),
    )


def _rank_metric(item: tuple[str, Any]) -> tuple[int, str]:
    """Validation losses, then scores, then what it cost."""
    name = item[0]
    return (0 if name.startswith("val_loss") else 2 if name.startswith(("train_loss", "cost/")) else 1), name


def describe_recipes(runs: Sequence[IndexedRun]) -> RecipeComparison:
    """Fields in which the runs' recipes differ."""
    differences = compare_recipes([run.run for run in runs])
    fields = {field for run in runs for field in flatten(run.run.recipe)} - {"name"}
    shown = differences[:MOST_FIELDS]
    names = [run.name for run in runs]
    return RecipeComparison(names, shown, len(differences) - len(shown), len(fields) - len(differences))


def describe_plan(run: IndexedRun) -> PlanProgress:
    """What plan.json says, and what was measured so far."""
    plan, cost, rate = run.run.plan, run.cost, run.run.flops_per_image
    images = parse_positive(plan.get("images")) or parse_positive(run.run.recipe.get("images"))
    flops = parse_positive(plan.get("train_flops")) or (parse_finite(images * rate) if images and rate else None)
    lines = [
        PlannedQuantity(name, planned, measured or None, _divide(measured, planned))
        for name, planned, measured in (("images", images, cost.images), ("training FLOPs", flops, cost.flops))
        if planned is not None
    ]
    lines += sorted(run.planned, key=lambda line: ("bytes" in line.name, line.name))
    return PlanProgress(run.name, run.run.parameters, _divide(cost.images, images), lines, cost)


def _divide(measured: float | None, planned: float | None) -> float | None:
    return measured / planned if measured and planned else None


def list_failures(now: Snapshot, settings: str, problem: str) -> FailureList:
    failed: list[EvaluationFailure] = []
    unread: list[UnreadableFile] = []
    for run in now.runs:
        for step, outcome in run.read_outcomes(settings).items():
            if outcome.state == "failed":
                reason, at = read_reason(run.run.uri, settings, step, outcome.attempt)
                failed.append(EvaluationFailure(run.name, step, reason, at, outcome.attempt))
        unread += [UnreadableFile(run.name, reason) for reason in list_problems(run)]
    return FailureList(failed, unread + [UnreadableFile("", note) for note in now.notes], problem)

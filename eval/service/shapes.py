"""The shapes of the JSON API's answers: what OpenAPI describes, and what `views`, `law` and the routes must return.

A number that was not measured is null. FLOPs are of training (forward and backward), intervals are of 95 %.
"""

from typing import Literal, NotRequired

from typing_extensions import TypedDict  # typing's own makes no schema before Python 3.12

from eval.scaling.frontier import Frontier
from eval.service.claims import State
from eval.studies.human import StudySide, WinRate


class Point(TypedDict):
    """A metric at one number of training images; `count`: samples behind it."""

    images: int
    value: float | None
    low: float | None
    high: float | None
    count: int


class Interval(TypedDict):
    """`level` is 0.95."""

    value: float | None
    low: float | None
    high: float | None
    level: float


class Cost(TypedDict):
    """`efficiency`: achieved over the device's peak FLOPs per second (MFU)."""

    images: int
    seconds: float | None
    images_per_second: float | None
    flops: float | None
    flops_per_second: float | None
    efficiency: float | None


class Checkpoint(TypedDict):
    run: str
    step: int


class Work(TypedDict):
    """What `Status` says of evaluation."""

    evaluates: bool
    checkpoints: int
    working: list[Checkpoint]
    since: float
    elsewhere: int
    waiting: int
    failed: int
    problem: str
    looked: float


class Status(Work):
    """`created`, `time`, `since` and `looked` are seconds since 1970; `reading`: runs read and runs to read.

    `working` are checkpoints that this service evaluates (since `since`), `elsewhere` counts those that others have
    claimed, `waiting` those that nobody has. `problem` says what keeps the service from its work, "" when nothing does.
    """

    uri: str
    generation: int
    runs: int
    created: float
    reading: tuple[int, int] | None
    version: str
    time: float


class RunLine(TypedDict):
    """`last`: when its latest row was written (ISO 8601); `scores`: overall ones, by metric."""

    name: str
    depth: int | None
    parameters: int | None
    flops_per_image: float | None
    images: int
    planned_images: float | None
    recipe_hash: str
    last: str
    loss: Point | None
    scores: dict[str, Point]
    cost: Cost
    checkpoints: int
    evaluated: int
    failed: int
    running: int
    problems: int
    pictures: bool


class RunList(TypedDict):
    """`metric`: the validation loss that most runs have."""

    runs: list[RunLine]
    metric: str | None


class StepState(TypedDict):
    step: int
    state: State


class RunDetails(TypedDict):
    """`recipe`: dotted field -> its value in words; `numbers`: metric -> its last value."""

    name: str
    depth: int | None
    parameters: int | None
    images: int
    recipe_hash: str
    code_versions: list[str]
    last: str
    recipe: dict[str, str]
    cost: Cost
    numbers: dict[str, Point]
    checkpoints: list[StepState]
    problems: list[str]


class RecipeRow(TypedDict):
    name: str
    values: list[str]


class Recipes(TypedDict):
    """`fields` differ between the runs (`more` of them are not shown), `same` of them do not."""

    fields: list[str]
    more: int
    same: int
    runs: list[RecipeRow]


class Planned(TypedDict):
    name: str
    planned: float
    measured: float | None
    ratio: float | None


class Plan(TypedDict):
    """`progress`: share of the planned images that were trained on."""

    name: str
    parameters: int | None
    progress: float | None
    lines: list[Planned]
    cost: Cost


class Plans(TypedDict):
    runs: list[Plan]


class Failure(TypedDict):
    run: str
    step: int
    reason: str
    at: str
    attempts: int


class Unreadable(TypedDict):
    """`run` is "" for what belongs to none."""

    run: str
    reason: str


class Failures(TypedDict):
    evaluations: list[Failure]
    unreadable: list[Unreadable]
    problem: str


class TaskMetrics(TypedDict):
    """`metrics`: split ("seen", "unseen" or "all") -> name of the metric."""

    task: str
    metrics: dict[str, str]


class Metrics(TypedDict):
    loss: str | None
    families: dict[str, list[TaskMetrics]]
    metrics: list[str]


class RunSeries(TypedDict):
    """Columns of equal length."""

    name: str
    parameters: int | None
    depth: int | None
    flops_per_image: float | None
    images: list[int]
    value: list[float | None]
    low: list[float | None]
    high: list[float | None]
    count: list[int]


class SeriesOf(TypedDict):
    """`left_out`: runs measured under other protocols only -> their hashes."""

    metric: str
    protocol: str | None
    higher_is_better: bool
    left_out: dict[str, str]
    runs: list[RunSeries]


class RunLevels(TypedDict):
    """Columns of equal length: noise level t (1 is noise) and the loss there."""

    name: str
    images: int
    t: list[float]
    value: list[float | None]


class Levels(TypedDict):
    """`levels`: noise level -> name of the metric."""

    metric: str | None
    levels: dict[str, str]
    runs: list[RunLevels]


class ScoreLine(TypedDict):
    """`runs`: by name; `left_out` as in a series."""

    task: str
    split: str
    metric: str
    higher_is_better: bool
    runs: dict[str, Point]
    left_out: dict[str, str]


class Scores(TypedDict):
    """`world`: judged by the world's small judges, so never comparable with `published` (model -> task -> score)."""

    family: str
    world: bool
    lines: list[ScoreLine]
    published: dict[str, dict[str, float]]


class Control(TypedDict):
    value: float
    low: float | None
    high: float | None
    count: int


class CalibrationLine(TypedDict):
    """What one metric gives to pictures that are right, to right ones of other prompts and to noise."""

    metric: str
    ground_truth: Control | None
    shuffled: Control | None
    noise: Control | None
    protocols: list[str]
    verdict: str | None


class Calibration(TypedDict):
    lines: list[CalibrationLine]


class LawFigures(TypedDict):
    """L = floor + sum of coefficient / x ** exponent. `scatter_between_runs`: standard deviation in log loss."""

    floor: Interval
    coefficients: list[float]
    exponents: list[Interval]
    scatter_between_runs: float
    degrees_of_freedom: float


class Prediction(TypedDict):
    """What the law says of a model that it has not seen, at `images`; `actual`: what that model then had."""

    depth: int | None
    parameters: int
    images: float
    loss: Interval
    actual: float | None


class Laws(TypedDict):
    """`reason` says why there is no fit, and then there is nothing else but perhaps `notes`.

    `laws`: "L(N)", "L(N,D)", "L(C)"; `optimum`: best parameters and images for the costliest run's compute.
    """

    reason: str | None
    notes: NotRequired[list[str]]
    images: NotRequired[float]
    equal_ends: NotRequired[bool]
    laws: NotRequired[dict[str, LawFigures]]
    frontier: NotRequired[Frontier | None]
    optimum: NotRequired[dict[str, float] | None]
    size_exponent: NotRequired[Interval | None]
    images_exponent: NotRequired[Interval | None]
    next_rung: NotRequired[Prediction | None]
    held_out: NotRequired[Prediction | None]


class FittedRun(TypedDict):
    name: str
    parameters: int
    loss: float | None
    images: float


class Band(TypedDict):
    """Columns of equal length: L(N) over sizes, with what the bootstrap gives."""

    parameters: list[float | None]
    value: list[float | None]
    low: list[float | None]
    high: list[float | None]


class FrontierCurve(TypedDict):
    """Columns of equal length: L(C) over training FLOPs."""

    compute: list[float | None]
    value: list[float | None]


class GradedPrediction(Prediction):
    """A prediction as committed, and what came of it: `run` is the run of that depth, if there is one.

    `first`: it was committed before that run had any row; null, as `actual`, where `reason` says why it is not graded.
    """

    metric: str
    created: str
    fitted_to: list[str]
    backbone: str
    run: str | None
    first: bool | None
    reason: str
    inside: bool | None
    title: str


class Fitting(TypedDict):
    """The law of these runs is being fitted; ask again."""

    state: Literal["fitting"]
    runs: list[str]


class Fitted(TypedDict):
    state: Literal["done"]
    metric: str | None
    scaling: Laws
    runs: list[FittedRun]
    band: Band | None
    frontier: FrontierCurve | None
    predictions: list[GradedPrediction]


class Picture(TypedDict):
    """`file` is for /api/picture."""

    file: str
    step: int | None
    images: int | None


class RunPictures(TypedDict):
    """`gallery`: drawn by the service at the same seeds for all runs; `samples`: the trainer's own grids."""

    name: str
    kind: Literal["gallery", "samples"]
    files: list[Picture]


class Sheets(TypedDict):
    runs: list[RunPictures]


class Prompts(TypedDict):
    """`columns`: tiles per row of a gallery's sheet."""

    prompts: list[str]
    columns: NotRequired[int]


class StudyLine(TypedDict):
    """`runs`: the two checkpoints, in an order that does not tell which is a."""

    name: str
    runs: list[str]
    pairs: int
    questions: list[str]
    created: str


class StudyList(TypedDict):
    """`questions`: all that can be asked -> the words a rater sees."""

    studies: list[StudyLine]
    unreadable: list[str]
    questions: dict[str, str]


class NextPair(TypedDict):
    """`item` is null when this rater has seen all pairs."""

    item: int | None
    done: int
    total: int
    prompt: NotRequired[str]
    questions: NotRequired[dict[str, str]]


class Kept(TypedDict):
    kept: bool


class StudyResults(StudyLine):
    """`runs` as in `StudyLine`; `a` and `b` say which is which."""

    a: StudySide
    b: StudySide
    rates: list[WinRate]

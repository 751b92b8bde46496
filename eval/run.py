"""`python -m eval run --runs RUNS`: every exported checkpoint is evaluated once; rows go to the run's own result store.

Reads RUNS/*/weights/step_*/ema.safetensors. A metric whose rows are there under the same protocol is not measured
again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

import tyro

from eval.calibrate import calibrate
from eval.drawing.generate import Sampling
from eval.drawing.precision import settle_precision
from eval.judging.judges import Judges, build_judges
from eval.judging.metric import PictureMetric, Prompt, WeightsMetric
from eval.judging.official import OfficialPaths
from eval.measure import Checkpoint, Measurement, Subject, find_checkpoints, measure_pictures, measure_weights
from eval.metrics.registry import DEFAULT_METRICS, METRICS
from eval.protocol import describe_protocol
from infra import storage
from infra.cli import GROUP
from infra.device import choose_device, resolve_device
from infra.errors import UserError, nearest
from infra.runner import run_units


@dataclass(frozen=True)
class RunOptions:
    """What to measure and how; the defaults suit the world on two cores."""

    runs: str
    """folder (or s3:// prefix) of run folders, or one run folder"""
    metrics: Annotated[tuple[str, ...], tyro.conf.arg(help=f"any of {', '.join(METRICS)}")] = DEFAULT_METRICS
    prompts_per_task: int = 16
    """prompts of each task, for seen and for unseen compositions"""
    images_per_prompt: int = 2
    """pictures of each of these prompts"""
    captions: int = 256
    """captions (one image each) for metrics that draw captions, such as CLIP score"""
    checkpoints: str = "all"
    """all, last, or a number: that many of each run, evenly spread, the last one always among them"""
    workers: int = 0
    """Ray workers that share the checkpoints (RAY_ADDRESS, or a private Ray here); 0 does all in this process"""
    gpus_per_worker: float = 0
    """with --device cuda: the share of a GPU that each worker gets"""
    data: str | None = None
    """dataset on which the weights' own loss is measured, where the trainer left no such rows"""
    judges: str = "world"
    """world, or official (needs local checkpoints)"""
    t5: Literal["with", "without", "both"] = "with"
    """draw with the text in the T5 seat, with zeros there (rows end in _no_t5), or both"""
    calibration: bool = True
    """score ground-truth, shuffled and noise images too, once per protocol"""
    sampling: Annotated[Sampling, GROUP] = field(default_factory=Sampling)
    official: OfficialPaths = field(default_factory=OfficialPaths)

    def check(self) -> None:
        """Raises UserError for a number with which nothing could be drawn."""
        for name, least in (("prompts_per_task", 1), ("images_per_prompt", 1), ("captions", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {least} or more")


def run(options: RunOptions) -> None:
    """Evaluate what is missing, checkpoint by checkpoint; each one's rows are stored before the next begins."""
    check_metrics(options.metrics)
    options.check()
    if options.workers == 0:  # else it is the workers' machine that counts
        resolve_device(options.sampling.device)
    checkpoints = find_checkpoints(options.runs, options.checkpoints)
    options = settle(options)
    prepare(options)
    units = [{"id": f"{c.run} step {c.step}", "checkpoint": asdict(c)} for c in checkpoints]
    failed = run_units(EvaluateTask(options), units, workers=options.workers, gpus=options.gpus_per_worker)
    if failed:
        raise UserError(f"{len(failed)} of {len(checkpoints)} checkpoints could not be evaluated; see the lines above")


def settle(options: RunOptions) -> RunOptions:
    """The options with a device and a precision that mean the same to each worker, and to whoever goes on later."""
    asked_sampling = options.sampling
    device = choose_device(asked_sampling.device, workers=options.workers, gpus_each=options.gpus_per_worker)
    precision = settle_precision(asked_sampling.precision, device, results=storage.join(options.runs, "results"))
    return replace(
        options,
        sampling=replace(asked_sampling, device=device, precision=precision),
        official=replace(options.official, device=device),
    )


def prepare(options: RunOptions) -> None:
    """What must hold before any checkpoint: all judges are there, and it is known what they give to truth and noise."""
    judges = build_judges(options.judges, options.official)
    measurements = plan_all(judges, options)
    if options.calibration:
        calibrate(storage.join(options.runs, "results"), judges, measurements)


@dataclass(frozen=True)
class EvaluateTask:
    """Evaluates one checkpoint per unit; judges are built once per worker."""

    options: RunOptions

    def open(self) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        options = self.options
        judges = build_judges(options.judges, options.official)
        measurements = plan_all(judges, options)
        metrics = [METRICS[name](judges) for name in check_metrics(options.metrics)]
        of_weights = [metric for metric in metrics if isinstance(metric, WeightsMetric)]

        def evaluate(unit: Mapping[str, Any]) -> dict[str, Any]:
            subject = Subject(Checkpoint(**unit["checkpoint"]), options.sampling.device)
            for metric in of_weights:
                measure_weights(subject, metric, options.data)
            measure_pictures(subject, measurements, judges)
            return {}

        return evaluate


def check_metrics(names: Sequence[str]) -> list[str]:
    """The names, each once; UserError at one that METRICS does not know."""
    for name in names:
        if name not in METRICS:
            between = "; write names with spaces between them" if "," in name else ""
            raise UserError(f"unknown metric {name!r}{nearest(name, METRICS)}{between}; known: {', '.join(METRICS)}")
    if not names:
        raise UserError(f"--metrics is empty; choose from {', '.join(METRICS)}")
    return list(dict.fromkeys(names))


def plan_all(judges: Judges, options: RunOptions) -> list[Measurement]:
    """A measurement for every metric that judges pictures, with and without T5 as asked."""
    ways = {"with": (False,), "without": (True,), "both": (False, True)}[options.t5]
    metrics = [METRICS[name](judges) for name in check_metrics(options.metrics)]
    return [
        plan(metric, judges, options, sampling=replace(options.sampling, without_t5=way or options.sampling.without_t5))
        for way in ways
        for metric in metrics
        if not isinstance(metric, WeightsMetric)
    ]


def plan(
    metric: PictureMetric, judges: Judges, options: RunOptions, *, sampling: Sampling, row: str | None = None
) -> Measurement:
    """Which prompts a metric draws, and the protocol that this makes. `row` None: the name that the score may carry."""
    if not judges.of_world:
        judges.paths.refuse_missing(metric.needs, metric.name)
    prompts = metric.prompts(options.captions if metric.draws_captions else options.prompts_per_task)
    images = 1 if metric.draws_captions else options.images_per_prompt
    suffix = "_no_t5" if sampling.without_t5 else ""
    name = row or name_row(metric, judges, prompts=prompts, images_per_prompt=images) + suffix
    protocol = describe_protocol(metric, prompts, sampling=sampling.protocol(), images_per_prompt=images)
    return Measurement(metric.name, name, tuple(prompts), images, sampling, protocol, headline_only=row is not None)


def name_row(metric: PictureMetric, judges: Judges, *, prompts: Sequence[Prompt], images_per_prompt: int) -> str:
    """What rows call the metric: a benchmark's own name only for its whole prompt set with all its images."""
    if judges.prefix or metric.official_images is None:
        return f"{judges.prefix}{metric.name}"
    tasks = {prompt.task for prompt in prompts}
    all_prompts = [prompt for prompt in metric.prompts(None) if prompt.task in tasks]
    complete = len(prompts) == len(all_prompts) and images_per_prompt >= metric.official_images
    return metric.name if complete else f"{metric.name}_partial"

"""`python -m eval run --runs RUNS`: every exported checkpoint is evaluated once; rows go to the run's own result store.

Reads RUNS/*/weights/step_*/ema.safetensors. A metric whose rows are there under the same protocol is not measured
again. Metrics that ask for the same words share the picture.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from eval.calibrate import calibrate
from eval.drawing.generate import Job, Painter, Sampling
from eval.drawing.precision import use_device
from eval.judging.judges import Judges, OfficialPaths, build_judges
from eval.judging.metric import Metric, Prompt, Sample, Score
from eval.metrics.registry import METRICS
from eval.metrics.val_loss import val_loss
from eval.protocol import keep_protocol, protocol_hash, protocol_of
from infra import storage
from infra.errors import UserError, nearest
from infra.log import Progress, get_logger
from infra.results import ResultRow, ResultStore
from infra.runner import run_units
from infra.values import keep_values
from infra.version import code_version

log = get_logger("eval")

_CHECKPOINT = re.compile(r"(?P<run>.*?)/?weights/step_(?P<step>\d+)/ema\.safetensors$")
CAPTION_METRICS = ("clip_score", "fid", "fid_inception")


@dataclass(frozen=True)
class RunOptions:
    """What to measure and how; the defaults suit the world on two cores."""

    runs: str
    """folder (or s3:// prefix) of run folders, or one run folder"""
    metrics: str = "val_loss,geneval,compbench,clip_score,fid"
    """comma-separated: val_loss, geneval, compbench, clip_score, fid, fid_inception, typography"""
    prompts_per_task: int = 16
    """prompts of each task, for seen and for unseen compositions"""
    images_per_prompt: int = 2
    captions: int = 256
    """captions (one image each) for clip_score and fid"""
    checkpoints: str = "all"
    """all, last, or a number: that many of each run, evenly spread, the last one always among them"""
    workers: int = 0
    """Ray workers that share the checkpoints (RAY_ADDRESS, or a private Ray here); 0 does all in this process"""
    gpus_per_worker: float = 0
    """with --device cuda: the share of a GPU that each worker gets"""
    data: str | None = None
    """dataset for val_loss where the trainer left no such rows"""
    judges: str = "world"
    """world, or official (needs local checkpoints)"""
    t5: Literal["with", "without", "both"] = "with"
    """draw with the text in the T5 seat, with zeros there (rows end in _no_t5), or both"""
    calibration: bool = True
    """score ground-truth, shuffled and noise images too, once per protocol"""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    official: OfficialPaths = field(default_factory=OfficialPaths)

    def check(self) -> None:
        """Raises UserError for a number with which nothing could be drawn."""
        for name, least in (("prompts_per_task", 1), ("images_per_prompt", 1), ("captions", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {least} or more")


@dataclass(frozen=True)
class Checkpoint:
    run: str
    run_uri: str
    step: int
    weights: str


@dataclass(frozen=True)
class Task:
    """One metric with its prompts and its protocol."""

    metric: str
    prompts: tuple[Prompt, ...]
    images_per_prompt: int
    protocol: Mapping[str, Any]
    name: str
    without_t5: bool = False

    @property
    def hash(self) -> str:
        return protocol_hash(self.protocol)


def find_checkpoints(runs: str, which: str = "all") -> list[Checkpoint]:
    """Every exported EMA of every run, by run and step."""
    found: dict[str, list[Checkpoint]] = {}
    root = runs.rstrip("/")
    for uri in storage.list_files(root, suffix="ema.safetensors"):
        match = _CHECKPOINT.match(uri[len(root) :].lstrip("/"))
        if match:
            run_uri = storage.join(root, match["run"]) if match["run"] else root
            name = match["run"] or root.rsplit("/", 1)[-1]
            found.setdefault(run_uri, []).append(Checkpoint(name, run_uri, int(match["step"]), uri))
    if not found:
        raise UserError(f"no checkpoints under {runs}: expected RUN/weights/step_*/ema.safetensors; train first")
    return [c for run in sorted(found) for c in _choose(sorted(found[run], key=lambda c: c.step), which)]


def _choose(checkpoints: list[Checkpoint], which: str) -> list[Checkpoint]:
    if which == "all":
        return checkpoints
    if which != "last" and not (which.isdecimal() and int(which) > 0):
        raise UserError(f"--checkpoints {which!r}: expected all, last or a number from 1 on")
    count = 1 if which == "last" else min(int(which), len(checkpoints))
    return [checkpoints[-1 - (len(checkpoints) * back) // count] for back in reversed(range(count))]


def run(options: RunOptions) -> None:
    """Evaluate what is missing, checkpoint by checkpoint; each one's rows are stored before the next begins."""
    names = parse_metrics(options.metrics)
    options.check()
    if options.workers == 0:  # else it is the workers' machine that counts
        for device in (options.sampling.device, *([options.official.device] if options.judges == "official" else [])):
            use_device(device)
    options = replace(options, sampling=options.sampling.decided())  # here, not by each worker's machine
    checkpoints = find_checkpoints(options.runs, options.checkpoints)
    judges = build_judges(options.judges, options.official)
    tasks = plan_all(names, judges, options)
    if options.calibration and judges.truth is not None:
        calibrate(storage.join(options.runs, "results"), judges, [(t.metric, t.prompts) for t in tasks])
    units = [{"id": f"{c.run} step {c.step}", "checkpoint": asdict(c)} for c in checkpoints]
    failed = run_units(EvaluateTask(options), units, workers=options.workers, gpus=options.gpus_per_worker)
    if failed:
        raise UserError(f"{len(failed)} of {len(checkpoints)} checkpoints could not be evaluated; see the lines above")


@dataclass(frozen=True)
class EvaluateTask:
    """Evaluates one checkpoint per unit; judges are built once per worker."""

    options: RunOptions

    def open(self) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        names = parse_metrics(self.options.metrics)
        judges = build_judges(self.options.judges, self.options.official)
        tasks = plan_all(names, judges, self.options)

        def work(unit: Mapping[str, Any]) -> dict[str, Any]:
            evaluate(Checkpoint(**unit["checkpoint"]), judges, tasks, self.options, loss="val_loss" in names)
            return {}

        return work


def parse_metrics(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = ("val_loss", *METRICS)
    for name in names:
        if name not in known:
            raise UserError(f"unknown metric {name!r}; known: {', '.join(known)}{nearest(name, known)}")
    if not names:
        raise UserError(f"--metrics is empty; choose from {', '.join(known)}")
    return list(dict.fromkeys(names))


def plan_all(names: Sequence[str], judges: Judges, options: RunOptions) -> list[Task]:
    """A task for every metric that looks at pictures, with and without T5 as asked."""
    ways = {"with": (False,), "without": (True,), "both": (False, True)}[options.t5]
    return [plan(name, judges, options, without_t5=way) for way in ways for name in names if name != "val_loss"]


def plan(name: str, judges: Judges, options: RunOptions, *, without_t5: bool = False) -> Task:
    """Which prompts a metric draws here, and the protocol that this makes."""
    metric = METRICS[name](judges)
    captions = name in CAPTION_METRICS
    prompts = metric.prompts(options.captions if captions else options.prompts_per_task)
    per_prompt = 1 if captions else options.images_per_prompt
    sampling = replace(options.sampling, without_t5=without_t5 or options.sampling.without_t5)
    protocol = protocol_of(metric, prompts, sampling.protocol(), per_prompt)
    suffix = "_no_t5" if sampling.without_t5 else ""
    called = f"{score_name(name, judges, prompts, per_prompt)}{suffix}"
    return Task(name, tuple(prompts), per_prompt, protocol, called, without_t5=sampling.without_t5)


def score_name(name: str, judges: Judges, prompts: Sequence[Prompt], images_per_prompt: int) -> str:
    """What rows call the metric: a benchmark's own name only for its whole prompt set with all its images."""
    whole = {"geneval": (judges.geneval_prompts, 4), "compbench": (judges.compbench_prompts, 10)}
    if judges.prefix or name not in whole:
        return f"{judges.prefix}{name}"
    everything, images = whole[name]
    tasks = {prompt.task for prompt in prompts}
    wanted = [prompt for prompt in everything(None) if prompt.task in tasks]
    return name if len(prompts) == len(wanted) and images_per_prompt >= images else f"{name}_partial"


def evaluate(checkpoint: Checkpoint, judges: Judges, tasks: Sequence[Task], options: RunOptions, *, loss: bool) -> None:
    """All that this checkpoint lacks."""
    store = ResultStore(storage.join(checkpoint.run_uri, "results"))
    painter = Painter(checkpoint.weights, device=options.sampling.device)
    origin = origin_of(checkpoint, painter.meta)
    done = {
        (row.metric.split("/")[0], row.protocol_hash)
        for row in store.rows(recipe_hash=origin["recipe_hash"])
        if row.images_seen == origin["images_seen"]
    }
    if loss:
        _measure_loss(store, painter, origin, options)
    missing = [task for task in tasks if (task.name, task.hash) not in done]
    if not missing:
        log.info("%s at %s images: nothing to do", checkpoint.run, f"{origin['images_seen']:,}")
        return
    for without_t5 in (False, True):
        mine = [task for task in missing if task.without_t5 is without_t5]
        _measure(painter, mine, judges, options, store=store, origin=origin)


def _measure(
    painter: Painter,
    tasks: Sequence[Task],
    judges: Judges,
    options: RunOptions,
    *,
    store: ResultStore,
    origin: Mapping[str, Any],
) -> None:
    """Draw what these tasks ask for, which is drawn in one way, and store values, protocols and rows."""
    if not tasks:
        return
    metrics = {task.metric: METRICS[task.metric](judges) for task in tasks}
    sampling = replace(options.sampling, without_t5=tasks[0].without_t5)
    label = f"{origin['run']} at {origin['images_seen']:,}{' without T5' if sampling.without_t5 else ''}"
    _paint_and_judge(painter, tasks, metrics, sampling, label)
    for task in tasks:
        keep_protocol(store.uri, task.protocol)
        metric = metrics[task.metric]
        keep_values(store.uri, task.hash, origin["recipe_hash"], origin["images_seen"], metric.kept())
        scores = metric.compute()
        store.append(to_rows(task.name, scores, origin, task.hash, higher_is_better=metric.higher_is_better))
        for score in scores:
            if score.path.startswith("overall") or not score.path:
                log.info("%s %s: %.4f", origin["run"], f"{task.name}/{score.path}".rstrip("/"), score.value)


def origin_of(checkpoint: Checkpoint, meta: Mapping[str, Any]) -> dict[str, Any]:
    """The row fields that name the weights."""
    for key in ("recipe_hash", "images_seen"):
        if key not in meta:
            raise UserError(f"{checkpoint.weights}: its metadata has no {key}; export it with the trainer")
    return {
        "run": checkpoint.run,
        "recipe_hash": str(meta["recipe_hash"]),
        "code_version": code_version(),
        "images_seen": int(meta["images_seen"]),
    }


def to_rows(
    name: str, scores: Iterable[Score], origin: Mapping[str, Any], protocol: str, *, higher_is_better: bool
) -> list[ResultRow]:
    return [
        ResultRow(
            **origin,
            metric=f"{name}/{score.path}".rstrip("/"),
            value=score.value,
            higher_is_better=higher_is_better if score.higher_is_better is None else score.higher_is_better,
            sample_count=score.sample_count,
            protocol_hash=protocol,
            low=score.low,
            high=score.high,
            details=json.dumps(dict(score.details)) if score.details else "",
        )
        for score in scores
    ]


def _paint_and_judge(
    painter: Painter, tasks: Sequence[Task], metrics: Mapping[str, Metric], sampling: Sampling, label: str
) -> None:
    """Draw every picture once and hand it to each metric that asked for it, a batch at a time."""
    wanted: dict[Job, list[tuple[str, Prompt, int]]] = {}
    for task in tasks:
        for index, prompt in enumerate(task.prompts):
            for number in range(task.images_per_prompt):
                job = Job(prompt.text, prompt.source, number)
                wanted.setdefault(job, []).append((task.metric, prompt, index))
    with Progress(len(wanted), "images", desc=label) as progress:
        pictures: dict[Job, np.ndarray] = {}
        for job, image in painter.paint(wanted, sampling):
            pictures[job] = image
            progress.update(1)
            if len(pictures) == sampling.batch:
                _hand_over(pictures, wanted, metrics)
        _hand_over(pictures, wanted, metrics)


def _hand_over(
    pictures: dict[Job, np.ndarray],
    wanted: Mapping[Job, list[tuple[str, Prompt, int]]],
    metrics: Mapping[str, Metric],
) -> None:
    for name, metric in metrics.items():
        samples = [
            Sample(prompt, index, image)
            for job, image in pictures.items()
            for asked, prompt, index in wanted[job]
            if asked == name
        ]
        if samples:
            metric.update(samples)
    pictures.clear()


def _measure_loss(store: ResultStore, painter: Painter, origin: Mapping[str, Any], options: RunOptions) -> None:
    """The trainer measures it while training; here only where it did not."""
    if store.has(origin["recipe_hash"], "val_loss/sd3", images_seen=origin["images_seen"]):
        if options.data is not None:
            log.info("%s has its val_loss already, so --data is not looked at", origin["run"])
        return
    if options.data is None:
        log.warning("%s has no val_loss at %s images: give --data URI", origin["run"], f"{origin['images_seen']:,}")
        return
    scores, protocol, kept = val_loss(painter, options.data)
    keep_values(store.uri, protocol, origin["recipe_hash"], origin["images_seen"], kept)
    store.append(to_rows("val_loss", scores, origin, protocol, higher_is_better=False))

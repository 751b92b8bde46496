"""`python -m eval fewstep --runs RUNS`: teacher and students drawn from the same noise in 1, 2, 4 ... steps.

Rows are `fewstep/<steps>x<guidance>/<metric>` of each run and `fewstep/flow/<guidance>/<figure>`; what is there already
is not measured again. `python -m eval report` makes a page of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

from eval.drawing.generate import Painter, Sampling
from eval.judging.judges import Judges, build_judges
from eval.judging.prompt_files import choose_captions
from eval.measure import Checkpoint, Measurement, Subject, find_checkpoints, measure_pictures
from eval.metrics.registry import METRICS, build_picture_metric
from eval.run import RunOptions, plan
from eval.studies.fewstep_figures import compare_clip_scores, measure_flow, measure_times
from eval.studies.fewstep_sheet import keep_sheet
from eval.studies.options import DrawingOptions
from infra.errors import UserError
from infra.help_text import FLAT
from infra.log import get_logger
from infra.runner import run_units

log = get_logger("fewstep")


@dataclass(frozen=True)
class FewStepOptions:
    """Which runs, which steps, how many pictures."""

    runs: str
    """folder (or s3:// prefix) of run folders: the teacher's and its students'; each one's last checkpoint is judged"""
    steps: tuple[int, ...] = (1, 2, 4, 8, 25, 50)
    """steps of the Euler solver; CLIP scores are also told relative to the most"""
    guidance: tuple[float, ...] = (1.0, 4.0)
    """a student that has guidance baked in is drawn with 1 alone"""
    metrics: tuple[str, ...] = ("fid", "clip_score", "geneval", "diversity", "saturation")
    """judges of pictures, as of `eval run`"""
    captions: int = 256
    """pictures for fid, clip_score and saturation"""
    prompts_per_task: int = 8
    """prompts of each task for geneval and diversity"""
    images_per_prompt: int = 4
    """pictures of each of these prompts"""
    flows: int = 32
    """captions whose whole path is solved for straightness, length and bend; 0: none"""
    repeats: int = 6
    """how often each time is taken; 0: no times. Let nothing else run on the machine meanwhile"""
    speed_batch: int = 10
    """pictures at a time, where time per picture is told for a batch beside that of one"""
    shown: int = 4
    """captions whose pictures and paths the page shows"""
    drawing: Annotated[DrawingOptions, FLAT] = field(default_factory=DrawingOptions)

    def check(self) -> None:
        """Raises UserError for settings of which none or two could be meant."""
        for name in ("steps", "guidance", "metrics"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise UserError(f"--{name}: expected different values, at least one; found {given}")
        if min(self.steps) < 1 or self.speed_batch < 1 or self.shown < 1:
            raise UserError("--steps, --speed-batch and --shown must be 1 or more")
        if self.flows < 0 or self.repeats < 0 or self.flows == 1:
            raise UserError("--flows must be 0, or 2 or more (an interval needs two); --repeats 0 or more")
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown:
            raise UserError(f"unknown metric {unknown[0]!r}; known: {', '.join(METRICS)}")

    def as_run(self) -> RunOptions:
        """What `eval run` would be told; steps and guidance are the settings' own."""
        return self.drawing.make_run(
            self.runs, metrics=self.metrics, captions=self.captions, prompts_per_task=self.prompts_per_task,
            images_per_prompt=self.images_per_prompt,
        )  # fmt: skip

    def samplings(self) -> list[Sampling]:
        """All settings, those of one guidance from most steps to fewest."""
        base = self.as_run().sampling
        each = [(steps, guidance) for guidance in self.guidance for steps in sorted(self.steps, reverse=True)]
        return [replace(base, steps=steps, guidance=guidance) for steps, guidance in each]


def measure_few_steps(options: FewStepOptions) -> None:
    """Draw and judge every run with every number of steps, and measure how straight its flow is."""
    options.check()
    options.as_run().check()
    checkpoints = find_checkpoints(options.runs, "last")
    options = replace(options, drawing=options.drawing.settle(options.as_run()))
    drawing = options.drawing
    plan_setting(build_judges(drawing.judges, drawing.official), options, options.samplings()[0])  # refuses at once
    units = [{"id": checkpoint.run, "checkpoint": asdict(checkpoint)} for checkpoint in checkpoints]
    failed = run_units(FewStepTask(options), units, workers=drawing.workers, gpus=drawing.gpus_per_worker)
    if failed:
        raise UserError(f"{len(failed)} of {len(units)} runs could not be measured; see the lines above")
    log.info("for the page: python -m eval report --runs %s", options.runs)


@dataclass(frozen=True)
class FewStepTask:
    """Measures one run per unit; judges are built once per worker."""

    options: FewStepOptions

    def open(self) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        options = self.options
        judges = build_judges(options.drawing.judges, options.drawing.official)

        def measure(unit: Mapping[str, Any]) -> dict[str, Any]:
            subject = Subject(Checkpoint(**unit["checkpoint"]), options.drawing.device)
            allowed = choose_settings(subject.painter, options)
            for guidance in dict.fromkeys(sampling.guidance for sampling in allowed):
                samplings = [sampling for sampling in allowed if sampling.guidance == guidance]
                planned = [plan_setting(judges, options, sampling) for sampling in samplings]
                measure_pictures(subject, [m for of_setting in planned for m in of_setting], judges)
                compare_clip_scores(subject, planned)
                if options.flows:
                    flow = replace(samplings[0], precision="fp32")
                    measure_flow(subject, choose_captions(judges, options.flows), flow)
                for sampling in samplings if options.repeats else []:
                    captions = choose_captions(judges, options.speed_batch)
                    measure_times(subject, captions, sampling, repeats=options.repeats, batch=options.speed_batch)
            captions = choose_captions(judges, options.shown)
            keep_sheet(subject, captions, sorted(allowed, key=_rank_setting), flows=options.flows > 0)
            return {}

        return measure


def _rank_setting(sampling: Sampling) -> tuple[float, int]:
    return sampling.guidance, sampling.steps


def choose_settings(painter: Painter, options: FewStepOptions) -> list[Sampling]:
    """The settings with which these weights may be drawn, those of one guidance from most steps to fewest."""
    found, reasons = [], []
    for sampling in options.samplings():
        try:
            painter.check(sampling)
            found.append(sampling)
        except UserError as error:
            reasons.append(str(error))
    for reason in dict.fromkeys(reasons):
        log.info("left out: %s", reason)
    if not found:
        raise UserError(reasons[0])
    return found


def plan_setting(judges: Judges, options: FewStepOptions, sampling: Sampling) -> list[Measurement]:
    """Every metric for one setting, with rows `fewstep/<steps>x<guidance>/<metric>`."""
    row = f"fewstep/{sampling.steps}x{sampling.guidance}"
    metrics = [build_picture_metric(name, judges) for name in options.metrics]
    planned = [
        plan(metric, judges, options.as_run(), sampling=sampling, row=f"{row}/{judges.prefix}{metric.name}")
        for metric in metrics
    ]
    return [replace(measurement, headline_only=False) for measurement in planned]

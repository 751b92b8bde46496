"""`python -m eval fewstep --runs RUNS`: teacher and students drawn from the same noise in 1, 2, 4 ... steps.

Rows are `fewstep/<steps>x<guidance>/<metric>` of each run and `fewstep/flow/<guidance>/<figure>`; what is there already
is not measured again. `python -m eval report` makes a page of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from eval.drawing.generate import Painter, Sampling
from eval.judging.judges import Judges, build_judges
from eval.judging.official import OfficialPaths
from eval.judging.prompt_files import choose_captions
from eval.measure import Checkpoint, Measurement, Subject, find_checkpoints, measure_pictures
from eval.metrics.registry import METRICS, build_picture_metric
from eval.run import RunOptions, plan, settle
from eval.studies.fewstep_figures import compare_clip_scores, measure_flow, measure_times
from eval.studies.fewstep_sheet import keep_sheet
from infra.device import Precision
from infra.errors import UserError
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
    judges: str = "world"
    """world, or official (needs local checkpoints)"""
    workers: int = 0
    """Ray workers that share the runs; 0 does all in this process"""
    gpus_per_worker: float = 0
    """with --device cuda: the share of a GPU that each worker gets"""
    seed: int = 0
    """of the noise, which is the same for all runs"""
    precision: Precision = "auto"
    """of the network: fp32, bf16, or auto: what this machine does best"""
    batch: int = 64
    """pictures drawn at a time"""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N"""
    official: OfficialPaths = field(default_factory=OfficialPaths)

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
        sampling = Sampling(seed=self.seed, precision=self.precision, batch=self.batch, device=self.device)
        return RunOptions(
            self.runs, metrics=self.metrics, captions=self.captions, prompts_per_task=self.prompts_per_task,
            images_per_prompt=self.images_per_prompt, judges=self.judges, official=self.official, sampling=sampling,
            workers=self.workers, gpus_per_worker=self.gpus_per_worker,
        )  # fmt: skip

    def settle(self) -> "FewStepOptions":
        """The options with device and precision resolved, the same for all workers."""
        found = settle(self.as_run())
        return replace(self, device=found.sampling.device, precision=found.sampling.precision, official=found.official)

    def samplings(self, guidance: float) -> list[Sampling]:
        """The settings of one guidance, from most steps to fewest."""
        base = self.as_run().sampling
        return [replace(base, steps=steps, guidance=guidance) for steps in sorted(self.steps, reverse=True)]


def measure_few_steps(options: FewStepOptions) -> None:
    """Draw and judge every run with every number of steps, and measure how straight its flow is."""
    options.check()
    options.as_run().check()
    checkpoints = find_checkpoints(options.runs, "last")
    options = options.settle()
    for guidance in options.guidance:
        plan_settings(build_judges(options.judges, options.official), options, guidance)  # refuses before any work
    units = [{"id": checkpoint.run, "checkpoint": asdict(checkpoint)} for checkpoint in checkpoints]
    failed = run_units(FewStepTask(options), units, workers=options.workers, gpus=options.gpus_per_worker)
    if failed:
        raise UserError(f"{len(failed)} of {len(units)} runs could not be measured; see the lines above")
    log.info("for the page: python -m eval report --runs %s", options.runs)


@dataclass(frozen=True)
class FewStepTask:
    """Measures one run per unit; judges are built once per worker."""

    options: FewStepOptions

    def open(self) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        asked = self.options
        judges = build_judges(asked.judges, asked.official)

        def measure(unit: Mapping[str, Any]) -> dict[str, Any]:
            subject = Subject(Checkpoint(**unit["checkpoint"]), asked.device)
            options = keep_steps(subject.painter, asked)
            allowed = choose_guidance(subject.painter, options.guidance, steps=options.steps[0])
            for guidance in allowed:
                planned = plan_settings(judges, options, guidance)
                measure_pictures(subject, [m for of_setting in planned for m in of_setting], judges)
                compare_clip_scores(subject, planned)
                samplings = options.samplings(guidance)
                if options.flows:
                    flow = replace(samplings[0], precision="fp32")
                    measure_flow(subject, choose_captions(judges, options.flows), flow)
                for sampling in samplings if options.repeats else []:
                    captions = choose_captions(judges, options.speed_batch)
                    measure_times(subject, captions, sampling, repeats=options.repeats, batch=options.speed_batch)
            shown = [sampling for guidance in allowed for sampling in reversed(options.samplings(guidance))]
            keep_sheet(subject, choose_captions(judges, options.shown), shown, flows=options.flows > 0)
            return {}

        return measure


def keep_steps(painter: Painter, options: FewStepOptions) -> FewStepOptions:
    """The options with those numbers of steps that lie on the grid of these weights; UserError where none does."""
    student = painter.student
    if student is None or student.steps is None:
        return options
    kept = tuple(steps for steps in options.steps if steps in student.step_counts)
    if not kept:
        painter.check(Sampling(guidance=1.0, steps=options.steps[0]))  # says why
    return replace(options, steps=kept)


def choose_guidance(painter: Painter, asked: Sequence[float], *, steps: int) -> list[float]:
    """The guidances with which these weights may be drawn."""
    found = list(_allowed(painter, asked, steps=steps))
    if not found:
        painter.check(Sampling(guidance=asked[0], steps=steps))  # says why
    return found


def _allowed(painter: Painter, asked: Sequence[float], *, steps: int) -> Iterator[float]:
    for guidance in asked:
        try:
            painter.check(Sampling(guidance=guidance, steps=steps))
        except UserError as error:
            log.info("guidance %g is left out: %s", guidance, error)
        else:
            yield guidance


def plan_settings(judges: Judges, options: FewStepOptions, guidance: float) -> list[list[Measurement]]:
    """For each number of steps, most first: every metric, with rows `fewstep/<steps>x<guidance>/<metric>`."""
    base = options.as_run()
    found = []
    for sampling in options.samplings(guidance):
        row = f"fewstep/{sampling.steps}x{guidance}"
        metrics = [build_picture_metric(name, judges) for name in options.metrics]
        planned = [
            plan(metric, judges, base, sampling=sampling, row=f"{row}/{judges.prefix}{metric.name}")
            for metric in metrics
        ]
        found.append([replace(measurement, headline_only=False) for measurement in planned])
    return found

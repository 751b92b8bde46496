"""`python -m eval study --runs RUNS --out DIR`: rank formulations as SD3's section 5.1 does, from their runs.

Each run is drawn with its raw and its EMA weights under six sampler settings; CLIP score and FID of the same pictures
are rows `study/<ema|raw>/<steps>x<guidance>/<metric>` of the run, stored as they land; none is drawn twice.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

from eval.judging.judges import Judges, build_judges
from eval.measure import Checkpoint, Measurement, Subject, find_checkpoints, measure_pictures
from eval.metrics.registry import build_picture_metric
from eval.run import RunOptions, plan
from eval.studies.options import DrawingOptions
from eval.studies.ranking import TABLE_1, Ranking, StudyCell, compare_with_paper, rank
from infra import storage
from infra.codec import from_json, to_json
from infra.errors import UserError
from infra.help_text import FLAT
from infra.log import get_logger
from infra.markdown import wrap_prose
from infra.results import ResultStore
from infra.runner import run_units
from model.files.weights import read_meta

log = get_logger("study")

METRIC_NAMES = ("clip_score", "fid")
KINDS = ("ema", "raw")


@dataclass(frozen=True)
class StudyOptions:
    """Which runs, which settings, how many pictures."""

    runs: str
    """folder (or s3:// prefix) of runs of `trainer sweep formulations`, several seeds of each"""
    out: str
    """study.md and study.json go here"""
    captions: int = 128
    """pictures per run, kind of weights and setting (the paper: 1000)"""
    settings: tuple[str, ...] = ("50x1.0", "50x2.5", "50x5.0", "5x5.0", "10x5.0", "25x5.0")
    """STEPSxGUIDANCE, each with the Euler solver"""
    drawing: Annotated[DrawingOptions, FLAT] = field(default_factory=DrawingOptions)

    def as_run(self) -> RunOptions:
        """What `eval run` would be told; steps and guidance are the settings' own."""
        return self.drawing.make_run(self.runs, captions=self.captions)


@dataclass(frozen=True)
class StudyEntry:
    """One trained run: variant, seed, dataset, and the checkpoint that is judged with both kinds of its weights."""

    variant: str
    seed: int
    dataset: str
    checkpoint: Checkpoint
    weights: dict[str, str]
    chosen: str
    """how the checkpoint was chosen"""

    def with_weights(self, kind: str) -> Checkpoint:
        """The checkpoint as its EMA or its raw weights show it."""
        return replace(self.checkpoint, weights=self.weights[kind])


def study(options: StudyOptions) -> None:
    """Measure what is missing, rank what is complete; write study.md, study.json and every number to cells.jsonl."""
    settings = [parse_setting(text) for text in options.settings]
    if len(set(settings)) < len(settings) or options.captions < 2:
        raise UserError("--settings must differ and --captions be 2 or more")
    entries, unfit = find_entries(options.runs)
    for run, reason in unfit.items():
        log.warning("%s is left out: %s", run, reason)
    if not entries:
        raise UserError(f"no run can be judged; {next(iter(unfit))}: {next(iter(unfit.values()))}")
    options = replace(options, drawing=options.drawing.settle(options.as_run()))
    judges = build_judges(options.drawing.judges, options.drawing.official)
    measurements = {kind: plan_settings(judges, options, kind) for kind in KINDS}
    units = [
        {"id": f"{e.checkpoint.run}/{kind}", "checkpoint": asdict(e.with_weights(kind)), "kind": kind}
        for e in entries
        for kind in KINDS
    ]
    failed = run_units(StudyTask(options), units, workers=options.drawing.workers, gpus=options.drawing.gpus_per_worker)
    cells = [cell for entry in entries for cell in _read_cells(entry, measurements)]
    if not cells:
        raise UserError("no run could be measured; see the lines above")
    ranking = rank(cells)
    text = wrap_prose(format_markdown(ranking, options, entries=entries, unfit=unfit))
    print(text, end="")
    record = {
        "ranking": ranking,
        "against_paper": compare_with_paper(ranking),
        "options": options,
        "chosen": {e.checkpoint.run: e.chosen for e in entries},
        "left_out_runs": unfit,
        "failed": failed,
    }
    storage.write_bytes(storage.join(options.out, "study.md"), f"# Formulations, ranked\n\n{text}".encode())
    as_json = json.dumps(to_json(record, finite=True), indent=1) + "\n"
    storage.write_bytes(storage.join(options.out, "study.json"), as_json.encode())
    numbers = "".join(json.dumps(cell._asdict()) + "\n" for cell in cells)
    storage.write_bytes(storage.join(options.out, "cells.jsonl"), numbers.encode())
    if failed:
        raise UserError(f"{len(failed)} of {len(units)} measurements failed; see the lines above; run again for them")


def parse_setting(text: str) -> tuple[int, float]:
    """`50x2.5` -> 50 steps at guidance 2.5."""
    steps, _, guidance = text.partition("x")
    try:
        parsed = int(steps), float(guidance)
    except ValueError:
        parsed = 0, math.nan
    if parsed[0] < 1 or not math.isfinite(parsed[1]):
        raise UserError(f"--settings {text!r}: expected STEPSxGUIDANCE such as 50x2.5")
    return parsed


def find_entries(runs: str) -> tuple[list[StudyEntry], dict[str, str]]:
    """One per run: the checkpoint with the least EMA validation loss that has raw weights too, else the last one.

    Second, run -> reason of those without raw weights: unstable ones, and those that are still being trained.
    """
    found: dict[str, list[Checkpoint]] = {}
    for checkpoint in find_checkpoints(runs):
        found.setdefault(checkpoint.run_uri, []).append(checkpoint)
    sorted_out = {checkpoints[0].run: _choose_entry(checkpoints) for checkpoints in found.values()}
    entries = [entry for entry in sorted_out.values() if isinstance(entry, StudyEntry)]
    unfit = {run: reason for run, reason in sorted_out.items() if isinstance(reason, str)}
    seen: dict[tuple[str, int, str], str] = {}
    for entry in entries:
        key = (entry.variant, entry.seed, entry.dataset)
        if key in seen:
            raise UserError(
                f"{seen[key]} and {entry.checkpoint.run} are both {entry.variant} with seed {entry.seed} on one "
                "dataset; move one of them away"
            )
        seen[key] = entry.checkpoint.run
    return sorted(entries, key=lambda e: (e.variant, e.seed, e.dataset)), unfit


def _choose_entry(checkpoints: Sequence[Checkpoint]) -> StudyEntry | str:
    """The run's entry, or why it has none."""
    run, last = checkpoints[0].run_uri, checkpoints[-1]
    recipe_uri, last_raw = storage.join(run, "recipe.json"), storage.join(run, "weights", "raw.safetensors")
    if not storage.exists(recipe_uri):
        raise UserError(f"{run} has no recipe.json: the study reads a run's seed from it")
    seed = int(_read_object(recipe_uri).get("seed", 0))
    raw = {c.step: storage.join(c.weights.rsplit("/", 1)[0], "raw.safetensors") for c in checkpoints}
    raw = {step: uri for step, uri in raw.items() if storage.exists(uri)}
    if last.step not in raw and storage.exists(last_raw):
        raw[last.step] = last_raw
    if not raw:
        unstable = storage.join(run, "unstable.json")  # of a run that the trainer's guard ended
        if storage.exists(unstable):
            return f"its training was unstable ({_read_object(unstable).get('problem', 'no reason')})"
        return "no raw weights (weights/raw.safetensors), which are ranked beside the EMA; they come with its last step"
    metas = {c.step: read_meta(storage.localize(c.weights)) for c in checkpoints}
    losses = {
        row.images_seen: row.value for row in ResultStore(storage.join(run, "results")).rows(metric="val_loss/sd3")
    }
    both = [c for c in checkpoints if c.step in raw]
    scored = [(losses[metas[c.step]["images_seen"]], c.step) for c in both if metas[c.step]["images_seen"] in losses]
    step = min(scored)[1] if len(both) > 1 and scored else both[-1].step
    chosen = next(c for c in checkpoints if c.step == step)
    how = "least EMA validation loss" if len(both) > 1 and scored else "the only one with raw weights"
    meta = metas[step]
    weights = {"ema": chosen.weights, "raw": raw[step]}
    return StudyEntry(
        str(meta["formulation"]), seed, str(meta["data_fingerprint"]), chosen, weights, f"step {step}: {how}"
    )


def _read_object(uri: str) -> dict[str, Any]:
    advice = "restore it, or move its run away"
    return from_json(dict[str, Any], storage.read_bytes(uri), where=uri, advice=advice)


@dataclass(frozen=True)
class StudyTask:
    """Measures one run's EMA or raw weights under all settings; judges are built once per worker."""

    options: StudyOptions

    def open(self) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        judges = build_judges(self.options.drawing.judges, self.options.drawing.official)
        measurements = {kind: plan_settings(judges, self.options, kind) for kind in KINDS}

        def measure(unit: Mapping[str, Any]) -> dict[str, Any]:
            subject = Subject(Checkpoint(**unit["checkpoint"]), self.options.drawing.device)
            measure_pictures(subject, measurements[unit["kind"]], judges)
            return {}

        return measure


def plan_settings(judges: Judges, options: StudyOptions, kind: str) -> list[Measurement]:
    """Both metrics under every setting; rows are called `study/<ema|raw>/<steps>x<guidance>/<metric>`."""
    base = options.as_run()
    found = []
    for steps, guidance in map(parse_setting, options.settings):
        sampling = replace(base.sampling, steps=steps, guidance=guidance)
        for name in METRIC_NAMES:
            row = f"study/{kind}/{steps}x{guidance}/{name}"
            found.append(plan(build_picture_metric(name, judges), judges, base, sampling=sampling, row=row))
    return found


def _read_cells(entry: StudyEntry, measurements: Mapping[str, Sequence[Measurement]]) -> list[StudyCell]:
    """Controls of this run that have both numbers, measured the way that is asked for now."""
    images_seen = int(read_meta(storage.localize(entry.weights["ema"]))["images_seen"])
    rows = {
        (row.metric, row.protocol_hash): row.value
        for row in ResultStore(storage.join(entry.checkpoint.run_uri, "results")).rows(prefix="study")
        if row.images_seen == images_seen
    }
    found = []
    for kind, planned in measurements.items():
        for pair in zip(planned[::2], planned[1::2]):  # CLIP score and FID under one setting
            clip, fid = (rows.get((measurement.row, measurement.hash)) for measurement in pair)
            if clip is not None and fid is not None:
                control = (entry.dataset, kind, pair[0].row.split("/")[2])
                found.append(StudyCell(entry.variant, entry.seed, control, clip, fid))
    return found


def format_markdown(
    ranking: Ranking, options: StudyOptions, *, entries: Sequence[StudyEntry], unfit: Mapping[str, str]
) -> str:
    """The seed noise first, then the table: no order is drawn inside a group."""
    seeds = ", ".join(map(str, ranking.seeds))
    if math.isfinite(ranking.seed_noise):
        noise = (
            f"Seed-to-seed noise of an average rank: {ranking.seed_noise:.2f}. Variants less than "
            f"{ranking.least_difference:.2f} apart are not told apart; they share a group."
        )
    else:
        noise = "One seed only: the noise of a rank is not known, so this is no order."
    amounts = f"{ranking.controls} controls; {options.captions} pictures each; judges: {options.drawing.judges}"
    lines = [
        f"{noise} Seeds {seeds}; {amounts}.",
        "",
        "| groups | variant | all | few steps | most steps | by seed | SD3, Table 1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ranking.rows:
        by_seed = " ".join(f"{value:.2f}" for value in row.by_seed.values())
        groups = " ".join(map(str, row.groups))
        paper = f"{TABLE_1[row.variant]:.2f}" if row.variant in TABLE_1 else ""
        lines.append(
            f"| {groups} | {row.variant} | {row.overall:.2f} | {row.few_steps:.2f} | {row.many_steps:.2f} "
            f"| {by_seed} | {paper} |"
        )
    lines += ["", *(f"Left out: {name}: {why}." for name, why in {**ranking.left_out, **unfit}.items())]
    same = compare_with_paper(ranking)
    if same is not None:
        lines.append(
            f"Spearman's correlation with Table 1 over {same['variants']} variants: {same['spearman']:.2f} "
            f"[{same['low']:.2f}, {same['high']:.2f}]."
        )
    ways = sorted({entry.chosen.split(": ")[1] for entry in entries})
    lines.append(f"Checkpoint of a run: {'; '.join(ways)}.")
    return "\n".join(lines) + "\n"

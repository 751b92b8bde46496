"""The commands of `python -m data_pipeline`."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from data_pipeline.flow.estimate import ScaleAssumptions
from data_pipeline.sources.fetch import FetchLimits
from data_pipeline.sources.registry import SOURCES
from infra.cli import FLAT, parse, take_name
from infra.errors import UserError
from infra.log import format_duration

if TYPE_CHECKING:
    from data_pipeline.flow.pipeline import Pipeline
    from data_pipeline.plans import DatasetPlan
    from data_pipeline.sources.source import Source


SOURCE_HELP = (
    f"Your own data, one or several KIND:URI, e.g. folder:/photos or wds:s3://bucket/raw; kinds: {', '.join(SOURCES)}. "
    "Without it the plan `world` draws its own scenes. When you add a source, keep the earlier ones: their rows stay "
    "as they are."
)


@dataclass(frozen=True)
class PipelineOptions:
    """Where from, where to, how many workers."""

    HELP_GROUPS: ClassVar = {
        "columns: where a source keeps images and captions": ("split", "fetch_urls", "image_column", "caption_column"),
        "machines: what each worker gets": ("cpus_per_worker", "gpus_per_worker", "caption_workers", "caption_gpus"),
    }
    out: str
    """Root of the dataset: a folder or s3://bucket/prefix (endpoint from AWS_ENDPOINT_URL)."""
    source: Annotated[tuple[str, ...], tyro.conf.arg(help=SOURCE_HELP)] = ()
    split: Literal["all", "train", "val"] = "all"
    """Take only this split of a source that has splits of its own (COCO's val for validation)."""
    fetch_urls: bool = False
    """parquet: fetch the images that a url column names."""
    fetch: FetchLimits = FetchLimits()  # noqa: RUF009
    """Limits of a download."""
    image_column: str = ""
    """parquet: the column with image bytes or a local path; found by name if left out."""
    caption_column: str = ""
    """The column of a table, or field of a JSON file, with the caption; found by name if left out."""
    images: int = 4000
    """Scenes to draw for training (plan `world` without --source)."""
    val_images: int | None = None
    """Scenes to draw for validation; an eighth of --images, at most 1,000, if left out."""
    seed: int = 0
    """Seed of the scenes."""
    workers: int | None = None
    """Ray workers; one per CPU of the cluster if left out, 0 to work in this process without Ray."""
    cpus_per_worker: float = 1
    """CPUs (and torch threads) of each worker."""
    gpus_per_worker: float = 0
    """GPUs of each worker, also fractions (several workers overlap decoding with a GPU's work); above 0 the networks
    run there."""
    caption_workers: int | None = None
    """Workers that only caption, before the others encode; the same workers do both if left out."""
    caption_gpus: float | None = None
    """GPUs of each captioning worker, where it needs more than the others."""
    keep_going: bool = False
    """Pack what there is even if some files or shards failed."""
    rebuild: tuple[str, ...] = ()
    """Columns to rebuild (with what reads them) if the dataset at --out was made with other settings; without it such
    a plan is refused."""
    until: Literal["gate", "pack"] = "pack"
    """gate: stop before captions and latents, and show what each threshold would keep."""


def run(words: list[str]) -> None:
    """Raw images to training shards. The same command again does only what is missing."""
    from data_pipeline.flow.plan_file import SUFFIXES, encode_plan_file, read_plan_file
    from data_pipeline.plans import PLANS, DatasetPlan, get_plan
    from infra import storage

    known = {name: str(make.__doc__) for name, make in PLANS.items()}
    known["FILE.yaml"] = "a file that names a plan and options (every run leaves its own as OUT/plan.yaml)"
    prog = "python -m data_pipeline run"
    if words and words[0].endswith(SUFFIXES):
        name, written = read_plan_file(words[0])
        rest = [*written, *gather_sources(words[1:])]
    else:
        name, rest = take_name(words, known, prog=prog, what="plan")
        rest = gather_sources(rest)
    default = get_plan(name)

    def call(options: Annotated[PipelineOptions, FLAT], plan: Annotated[DatasetPlan, FLAT] = default) -> None:
        run_plan(options, plan.settle())
        if options.until == "pack":
            # consent to one rebuild is not consent to the next
            encoded = encode_plan_file(name, replace(options, rebuild=()), plan, (PipelineOptions(out=""), default))
            storage.write_bytes(storage.join(options.out, "plan.yaml"), encoded)

    parse(call, rest, prog=f"{prog} {words[0]}", description=run.__doc__)


def gather_sources(args: list[str]) -> list[str]:
    """`--source A --source B` as `--source A B`: of an option that is given twice, tyro would take the last alone."""
    rest, found = [], []
    at = 0
    while at < len(args):
        word, equals, value = args[at].partition("=")
        at += 1
        if word != "--source":
            rest.append(args[at - 1])
            continue
        found += [value] if equals else []
        while at < len(args) and not args[at].startswith("--"):
            found.append(args[at])
            at += 1
    return [*rest, "--source", *found] if found else rest


def run_plan(options: PipelineOptions, plan: "DatasetPlan") -> None:
    """Everything from source to dataset.json, then the table of what happened."""
    from data_pipeline.flow.pipeline import Pipeline
    from data_pipeline.flow.summary import format_summary
    from infra.runner import WorkerPool

    started = time.monotonic()
    _check(options)
    captioning = None
    if options.caption_workers is not None or options.caption_gpus is not None:
        gpus = options.gpus_per_worker if options.caption_gpus is None else options.caption_gpus
        captioning = WorkerPool(options.caption_workers or options.workers, options.cpus_per_worker, gpus)
    pipeline = Pipeline(
        plan,
        options.out,
        _source_of(options),
        workers=WorkerPool(options.workers, options.cpus_per_worker, options.gpus_per_worker),
        caption_workers=captioning,
        keep_going=options.keep_going,
        only_split=None if options.split == "all" else options.split,
        rebuild=options.rebuild,
    )
    if options.until == "gate":
        _print_gate(pipeline)
        return
    outcome = pipeline.run()
    print(format_summary(options.out, outcome))
    print(f"\nfinished in {format_duration(time.monotonic() - started)}: {options.out}")
    if outcome.failed:
        raise UserError(f"{len(outcome.failed)} units failed and are not in the dataset: run the same command again")


def _check(options: PipelineOptions) -> None:
    """What can be refused before any work."""
    from infra import storage

    if options.workers is not None and options.workers < 0:
        raise UserError(f"--workers {options.workers}: expected 0 (no Ray) or more")
    # Ray unpacks the working directory of a submitted job below this name and deletes it afterwards
    out = options.out
    if "working_dir_files" in Path.cwd().parts and not storage.is_remote(out) and not Path(out).is_absolute():
        raise UserError(
            f"--out {out}: a submitted job runs in a temporary copy of the working directory, which is deleted: "
            "give an absolute path that every node sees, or s3://bucket/prefix"
        )
    storage.exists(out)  # UserError where it cannot be reached


def _source_of(options: PipelineOptions) -> "Source":
    from data_pipeline.sources.registry import open_sources
    from data_pipeline.sources.source import SourceOptions

    if not options.source:
        return world_source(options)
    reading = SourceOptions(options.image_column, options.caption_column, options.fetch_urls, options.fetch)
    return open_sources(options.source, reading)


def _print_gate(pipeline: "Pipeline") -> None:
    """What would go on to captioner and autoencoder, and what other thresholds would make of it."""
    from data_pipeline.curation.threshold_counts import count_kept, format_kept
    from data_pipeline.stages.row_status import count_by_status

    counts = count_by_status(pipeline.run_gate())
    print(format_kept(count_kept(pipeline.root, pipeline.columns.fingerprints), pipeline.plan.strict))
    print("\nrows at the gate: " + ", ".join(f"{n:,} {status}" for status, n in counts.most_common()))


def world_source(options: PipelineOptions) -> "Source":
    """The world's raw shards as a source; drawn below the root unless they are there."""
    from data_pipeline.sources.registry import open_source
    from data_pipeline.world.write import write_world
    from infra import storage

    val_images = default_val_images(options.images) if options.val_images is None else options.val_images
    raw = storage.join(options.out, f"raw/world-{options.seed}-{options.images}-{val_images}")
    mark = storage.join(raw, "complete.json")
    if not storage.exists(mark):
        write_world(raw, images=options.images, val_images=val_images, seed=options.seed)
        storage.write_bytes(mark, b"{}\n")
    return open_source(f"wds:{raw}")


def default_val_images(images: int) -> int:
    return max(1, min(1000, images // 8))


def world(out: str, *, images: int = 20_000, seed: int = 0, val_images: int | None = None) -> None:
    """Raw scenes of the embedded world, with ground truth, in the layout that img2dataset writes.

    Args:
        out: folder or s3://bucket/prefix.
        images: scenes for training.
        seed: which world; every scene is a pure function of seed, split and number.
        val_images: scenes for validation; an eighth of images, at most 1,000, if left out.
    """
    from data_pipeline.world.write import write_world

    num_val = default_val_images(images) if val_images is None else val_images
    write_world(out, images=images, val_images=num_val, seed=seed)


def pairs(
    plan: Annotated[str, tyro.conf.Positional],
    source: Annotated[str, tyro.conf.Positional],
    *,
    out: str,
    val_fraction: float = 0.02,
    device: str = "auto",
) -> None:
    """Preference pairs for DPO, cut to squares and encoded by a plan's networks; the last lines become split val.

    Args:
        plan: world or sd3: its autoencoder, text encoders and resolution.
        source: JSON lines {"caption": ..., "preferred": PATH, "rejected": PATH}, paths relative to the file.
        out: root of the dataset to write.
        val_fraction: share of the pairs kept for validation.
        device: where the networks run: auto (a GPU where there is one), cpu, cuda or cuda:N.
    """
    from data_pipeline.packing.pairs import read_pairs, write_pairs
    from data_pipeline.plans import get_plan, read_vae_meta
    from infra import storage
    from infra.device import resolve_device

    device = resolve_device(device)
    chosen, found = get_plan(plan), read_pairs(source)
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction}: expected a share of at least 0 and below 1")
    num_val = round(len(found) * val_fraction)
    splits = {"train": found[: len(found) - num_val], "val": found[len(found) - num_val :]}
    info = write_pairs(
        out, {name: part for name, part in splits.items() if part}, text_spec=chosen.text_spec,
        vae=read_vae_meta(chosen.vae), resolution=chosen.resolution,
        made_by={"source": storage.sha256_hex(storage.read_bytes(source))}, device=device,
    )  # fmt: skip
    print(f"{out}: {len(found)} pairs, {num_val} of them for validation; fingerprint {info.fingerprint}")


def verify(uri: Annotated[str, tyro.conf.Positional], *, columns: bool = True) -> None:
    """Read everything back: every object's hash, every row's bytes, every count, no row twice.

    Args:
        uri: root of the dataset.
        columns: also check what the stages wrote, not only the training shards.
    """
    from data_pipeline.inspection.verify import verify_dataset as check

    findings = check(uri, columns=columns)
    for problem in findings.problems[:50]:
        print(f"BAD  {problem}")
    counts = ", ".join(f"{split} {count:,}" for split, count in findings.samples.items())
    print(f"{findings.objects:,} objects, {findings.num_bytes / 1e6:,.1f} MB read; samples: {counts}")
    if findings.problems:
        raise UserError(
            f"{uri}: {len(findings.problems)} problems: delete the objects named above that are still there, "
            "then run the command that made the dataset again: it makes what is missing"
        )
    print("everything is as its manifests say")


def lint(
    uri: Annotated[str, tyro.conf.Positional],
    *,
    sample: int = 1000,
    all: bool = False,
    json: str | None = None,
    bucket_aspect: float = 1.0,
    image_column: str = "",
    caption_column: str = "",
    fetch_urls: bool = False,
) -> None:
    """What a source holds and what a run would make of it, by the run's own readers. Nothing is written to it.

    Args:
        uri: KIND:URI as for `run --source`; the kind may be left out where the names that lie there show it.
        sample: rows to read, from at most 20 tars, row groups or lists of files that are spread over the source.
        all: read everything.
        json: a file or URI to write all findings to.
        bucket_aspect: most elongated bucket; 1 crops everything square.
        image_column: tables: the column with image bytes or a path; found by name if left out.
        caption_column: the column of a table, or field of a JSON file, with the caption; found by name if left out.
        fetch_urls: parquet: fetch the images that a url column names.
    """
    from data_pipeline.formats.schema import canonical_json
    from data_pipeline.inspection.lint import lint_source, list_fields
    from data_pipeline.inspection.lint_text import format_fields, format_findings
    from data_pipeline.sources.registry import guess_kind, open_source
    from data_pipeline.sources.source import SourceOptions
    from infra import storage
    from infra.codec import to_json

    if sample < 1:
        raise UserError(f"--sample {sample}: expected 1 or more rows, or --all")
    kind, colon, place = uri.partition(":")
    if not colon or place.startswith("//"):
        kind, place = guess_kind(uri), uri
    source = open_source(f"{kind}:{place}", SourceOptions(image_column, caption_column, fetch_urls))
    try:
        found = lint_source(source, f"{kind}:{place}", place, rows=None if all else sample, aspect=bucket_aspect)
    except UserError:
        # a table whose columns are not understood: which ones there are helps to name them
        if kind in ("parquet", "hf") and storage.exists(place) and (fields := list_fields(source)):
            print(format_fields(fields))
        raise
    print(format_findings(found))
    if json:
        storage.write_bytes(json, canonical_json(to_json(found, finite=True)) + b"\n")


def takedown(
    uri: Annotated[str, tyro.conf.Positional],
    *,
    keys: tuple[str, ...] = (),
    hashes: tuple[str, ...] = (),
    runs: tuple[str, ...] = (),
) -> None:
    """Take images out of every later training and pack, and list the runs that saw them.

    Args:
        uri: root of the dataset.
        keys: keys of images.
        hashes: hashes of pixels (column `exact`), or SHA-256 of files where the source gave them.
        runs: folders below which runs are looked for.
    """
    from data_pipeline.selection.takedown import describe_takedown, find_runs, find_sightings, take_down

    folders = find_runs(runs)
    record, new = take_down(uri, keys, hashes)
    print(describe_takedown(uri, record, new, find_sightings(uri, record, folders), runs=len(folders)))


def report(uri: Annotated[str, tyro.conf.Positional]) -> None:
    """How many rows each single threshold would keep, from what was measured; computes nothing anew.

    Args:
        uri: root of the dataset.
    """
    from data_pipeline.curation.threshold_counts import count_kept, format_kept
    from data_pipeline.formats.schema import read_dataset_info

    print(format_kept(count_kept(uri, read_dataset_info(uri).columns)))


def estimate(scale: Annotated[ScaleAssumptions, FLAT]) -> None:
    """What a data set with SD3's encoders would take; every assumption is an option."""
    from data_pipeline.flow.estimate import format_estimate

    if scale.captions < 2:
        raise UserError(f"--captions {scale.captions}: expected 2 or more, the original and a synthetic one")
    print(format_estimate(scale))


def inspect(
    uri: Annotated[str, tyro.conf.Positional], *, out: str | None = None, count: int = 24, split: str = ""
) -> None:
    """What a dataset holds; with --out also a grid of samples, decoded from the stored latents.

    Args:
        uri: root of the dataset.
        out: a .png or .html to write the grid to.
        count: samples in the grid.
        split: which one; train if there is one, else the first, if left out.
    """
    from data_pipeline.formats.schema import read_dataset_info
    from data_pipeline.inspection.inspect import describe_dataset, pick_samples, write_grid
    from data_pipeline.loading.loader import open_dataset

    splits = read_dataset_info(uri).splits
    for name, text in describe_dataset(uri):
        print(f"{name:<12} {text}")
    chosen = split or ("train" if "train" in splits else next(iter(splits), ""))
    dataset = open_dataset(uri, split=chosen)
    shown = pick_samples(dataset, count)
    for item in shown[:8]:
        print(f"  {item.key}")
        for name, caption in item.captions.items():
            print(f"    {name:<10} {caption}")
    if out:
        write_grid(dataset.vae, shown, out)
        print(f"grid of {len(shown)} samples: {out}")

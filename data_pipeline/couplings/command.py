"""`python -m data_pipeline couple`: what is asked for, what it will take, and the work."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import tyro

from data_pipeline.couplings.couple import SHARD_ROWS, check_out, describe_dataset, list_shards, make_couplings
from data_pipeline.couplings.prompts import read_prompts, write_prompts
from data_pipeline.couplings.teacher import TeacherFile, count_forwards, time_pass
from data_pipeline.formats.couplings import Couplings
from data_pipeline.formats.schema import DATASET_FILE, DatasetInfo, read_dataset_info
from data_pipeline.loading.couplings import Prompts
from infra import storage
from infra.device import Precision, resolve_device, resolve_precision
from infra.errors import UserError
from infra.log import format_duration
from infra.runner import WorkerPool
from model.backbone import read_config
from model.diffusion.few_step import FewStep
from model.diffusion.sampler import Solver
from model.diffusion.timesteps import require_shift
from model.encoders.vae import Latents

TAR_BYTES = 2048  # of a tar around each sample: two headers, its JSON, padding


@dataclass(frozen=True)
class CoupleOptions:
    """Couplings for few-step students: noise, and the latent that a teacher's solver makes of it."""

    HELP_GROUPS: ClassVar = {
        "solver: how the teacher goes from noise to latents": (
            "solver", "steps", "guidance", "unconditional", "shift", "grid", "precision", "tolerance",
        ),
        "machines: what each worker gets": ("workers", "cpus_per_worker", "gpus_per_worker", "batch", "device"),
    }  # fmt: skip
    teacher: str
    """Weights of the teacher: RUN/weights/ema.safetensors."""
    prompts: str
    """A dataset, whose captions and text features are used where they lie, or a file: a prompt a line, or .jsonl with
    "prompt"."""
    out: str
    """Root of the dataset of couplings: a folder or s3://bucket/prefix."""
    count: int
    """Couplings to have in the end. A greater count later adds to those that are there."""
    solver: Solver = "heun"
    steps: int = 25
    guidance: float | None = None
    """Classifier-free guidance of the teacher, baked into the couplings; 1: none, at half the cost. Default: 1.5, or 1
    where the teacher learnt a guidance from couplings of its own."""
    unconditional: Literal["zeros", "empty_prompt"] = "zeros"
    shift: float | None = None
    """Resolution shift of the times; the teacher's own if left out."""
    grid: Literal["default", "released"] = "default"
    precision: Precision = "auto"
    """Of the network; the solver's state and times are fp32 always."""
    tolerance: float = 1e-4
    """Of solver rk."""
    seed: int = 0
    """Of noise, prompts and captions: a coupling is a function of (seed, index)."""
    split: str = "train"
    """Of the dataset of prompts."""
    original_captions: float = 0.5
    """Share of original captions where prompts have both; the rest are synthetic ones."""
    val_every: int = 50
    """One prompt of so many is held out with all its couplings: split val."""
    workers: int | None = None
    """Ray workers; one per CPU or GPU if left out, 0 to work in this process without Ray."""
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0
    batch: int = 64
    """Couplings that are solved at once."""
    device: str = "auto"
    estimate: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Tell forwards, hours and bytes, and stop."""
    shard_rows: int = SHARD_ROWS
    """Couplings of a training shard: the unit of work and of loss."""


def couple(options: CoupleOptions) -> None:
    """Couplings for few-step students: noise, and the latent that a teacher's solver makes of it."""
    started = time.monotonic()
    _check(options)
    pool = WorkerPool(options.workers, options.cpus_per_worker, options.gpus_per_worker)
    teacher = TeacherFile(options.teacher)
    if options.estimate:
        print(format_estimate(options, teacher, pool))
        return
    couplings = describe_couplings(options, teacher, workers=pool)
    prompts = Prompts(options.out, couplings)
    info = describe_dataset(couplings, teacher, prompts)
    check_out(options.out, couplings)
    shards = list_shards(couplings, prompts, shard_rows=options.shard_rows)
    made = make_couplings(options.out, options.teacher, info, shards, workers=pool, batch=options.batch,
                          device=_worker_device(options))  # fmt: skip
    counts = ", ".join(f"{count:,} {status}" for status, count in made.counts.items())
    splits = ", ".join(f"{name} {split.num_samples:,}" for name, split in made.splits.items())
    took = format_duration(time.monotonic() - started)
    print(f"{options.out}: {splits} ({counts}) in {took}; fingerprint {made.fingerprint}")


def _check(options: CoupleOptions) -> None:
    """What can be refused before anything is read."""
    if options.shift is not None:
        require_shift(options.shift)
    for name, value, least in (
        ("count", options.count, 1), ("steps", options.steps, 1), ("batch", options.batch, 1),
        ("shard_rows", options.shard_rows, 1), ("val_every", options.val_every, 2),
    ):  # fmt: skip
        if value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected at least {least}")
    if not 0 <= options.original_captions <= 1:
        raise UserError(f"--original-captions {options.original_captions}: expected a share between 0 and 1")
    if not 0 < options.tolerance < 1:
        raise UserError(f"--tolerance {options.tolerance}: expected a number between 0 and 1")
    if options.guidance is not None and not -1e3 < options.guidance < 1e3:
        raise UserError(f"--guidance {options.guidance}: expected a finite number, 1 for none")
    if not storage.exists(options.prompts) and not _holds_dataset(options.prompts):
        raise UserError(f"--prompts {options.prompts}: neither a dataset nor a file of prompts is there")


def _holds_dataset(uri: str) -> bool:
    return storage.exists(storage.join(uri, DATASET_FILE))


def _worker_device(options: CoupleOptions) -> str:
    """`auto` on workers is a GPU where each is given some of one."""
    if options.device != "auto" or options.workers == 0:
        return options.device
    return "cuda" if options.gpus_per_worker > 0 else "cpu"


def describe_couplings(options: CoupleOptions, teacher: TeacherFile, *, workers: WorkerPool) -> Couplings:
    """With the prompts found, or encoded where they come from a file."""
    of_dataset = _holds_dataset(options.prompts)
    if of_dataset:
        split, root = options.split, options.prompts
        # Absolute: a later training may start in another folder.
        where = root.rstrip("/") if storage.is_remote(root) else str(storage.local_path(root).resolve())
    else:
        split, where = "train", write_prompts(
            options.out, read_prompts(options.prompts), teacher.text_spec, teacher.vae, workers=workers,
            device=_worker_device(options),
        )  # fmt: skip
        root = storage.join(options.out, where)
    info = read_dataset_info(root)
    if split not in info.splits:
        raise UserError(f"{options.prompts}: no split {split!r}, it has {', '.join(info.splits)}")
    if info.couplings is not None:
        raise UserError(f"{options.prompts} holds couplings: give the dataset that their text is in")
    guidance, student = choose_guidance(options, teacher), FewStep.of(teacher.meta)
    if student is not None:
        student.check(steps=options.steps, guidance=guidance, solver=options.solver)
    return Couplings(
        teacher=teacher.sha256, formulation=teacher.meta["formulation"], solver=options.solver, steps=options.steps,
        grid=options.grid, shift=_choose_shift(options, teacher), guidance=guidance,
        unconditional=options.unconditional, precision=resolve_precision(options.precision, _worker_device(options)),
        seed=options.seed, captions=_weigh_captions(options, info),
        bucket="" if of_dataset else _name_square_bucket(teacher),
        val_every=options.val_every, prompts_split=split, prompts_index=info.splits[split].index, prompts=where,
        count=options.count, tolerance=options.tolerance, round=1 + int(teacher.few_step.get("round", 0)),
        baked_guidance=teacher.baked_guidance,
    )  # fmt: skip


def choose_guidance(options: CoupleOptions, teacher: TeacherFile) -> float:
    """UserError where the teacher cannot be guided: it has a guidance baked in, or never saw a dropped caption."""
    if teacher.few_step.get("guidance_kind") != "baked":
        return 1.5 if options.guidance is None else options.guidance
    if options.guidance not in (None, 1.0):
        baked = teacher.baked_guidance
        why = f"has guidance {baked:g} baked in" if baked != 1.0 else "learnt with no captions dropped"
        raise UserError(f"{teacher.uri} {why}: give --guidance 1 or leave it out")
    return 1.0


def _choose_shift(options: CoupleOptions, teacher: TeacherFile) -> float:
    return float(teacher.meta.get("shift", 1.0) if options.shift is None else options.shift)


def _name_square_bucket(teacher: TeacherFile) -> str:
    return f"{teacher.resolution}x{teacher.resolution}"


def _weigh_captions(options: CoupleOptions, info: DatasetInfo) -> Mapping[str, float]:
    wanted = {"original": options.original_captions, "synthetic": 1 - options.original_captions}
    found = {name: weight for name, weight in wanted.items() if weight > 0 and name in info.captions}
    if not found:
        raise UserError(
            f"{options.prompts} has captions {', '.join(info.captions)}, none of them is asked for by "
            f"--original-captions {options.original_captions}"
        )
    return found


def format_estimate(options: CoupleOptions, teacher: TeacherFile, workers: WorkerPool) -> str:
    """Passes, operations and bytes by arithmetic; hours by a pass that is timed here. Writes nothing."""
    if _holds_dataset(options.prompts):
        prompts = Prompts(options.out, describe_couplings(options, teacher, workers=workers))
        names, counts = np.unique(prompts.buckets_of(np.arange(options.count)), return_counts=True)
        number = prompts.dataset.num_samples
    else:
        names, counts = np.array([_name_square_bucket(teacher)]), np.array([options.count])
        number = len(read_prompts(options.prompts))
    shapes = [_get_latent_shape(str(name), teacher.vae) for name in names]
    total = sum(count * (2 * int(np.prod(shape)) + TAR_BYTES) for shape, count in zip(shapes, counts.tolist()))
    head = f"{options.count:,} couplings of {number:,} prompts: {total / 1e9:,.3f} GB, and no bytes of their text"
    forwards = count_forwards(options.solver, options.steps, guidance=choose_guidance(options, teacher),
                              formulation=teacher.meta["formulation"])  # fmt: skip
    if forwards is None:
        return f"{head}\nrk chooses its own steps: passes and hours are known when the first shard is made"
    config = read_config(teacher.meta["backbone"], teacher.meta["config"])
    tokens = teacher.text_spec.context_tokens
    flops = sum(n * config.count_forward_flops(*shape[1:], tokens) for shape, n in zip(shapes, counts.tolist()))
    precision = resolve_precision(options.precision, _worker_device(options))
    seconds = time_pass(teacher, shapes[int(counts.argmax())], batch=options.batch, precision=precision,
                        device=resolve_device(options.device))  # fmt: skip
    passes, processes = options.count * forwards, max(1, options.workers or 1)
    hours = passes * seconds / processes / 3600
    return "\n".join(
        [
            head,
            f"{forwards} passes each, {passes:,} in all, {forwards * flops:.3g} operations",
            f"{hours:,.2f} hours on {processes} workers, each at the {1 / seconds:,.1f} passes a second that one "
            f"process reaches here (batches of {options.batch})",
        ]
    )


def _get_latent_shape(bucket: str, vae: Latents) -> tuple[int, int, int]:
    height, width = (int(side) // vae.factor for side in bucket.split("x"))
    return vae.channels, height, width

"""Training: start reading here. `train` is the command, `assemble` puts a run together, `run` is its loop.

Progress is counted in images (for preference data: in pairs). A function that says "collective" must be called on all
ranks, as the ranks exchange data in it.
"""

import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from data_pipeline.loading.loader import Dataset
from data_pipeline.selection.choice import DataChoice
from infra import storage
from infra.codec import to_json
from infra.errors import UserError
from infra.log import get_logger
from infra.outcome import PREEMPTED
from trainer.checks.preflight import PreparedRun, agree_on_precision, prepare, report_once
from trainer.feed import DeviceBatch, Prefetcher
from trainer.guard import find_problem, roll_back
from trainer.launchers import find_launchers, launcher_has_ended
from trainer.machines import detect_machine
from trainer.network import Losses, Network
from trainer.objective import asks_teacher, bind_objective, count_network_passes
from trainer.perceptual import PerceptualLoss, open_perceptual
from trainer.planning.frozen import count_frozen
from trainer.planning.hardware_plan import HardwarePlan, make_hardware_plan
from trainer.recipe import Recipe, count_micro_batches
from trainer.runfolder import PLAN, RECIPE, name_step, write_data
from trainer.state import Saver, StopSignal, TrainingState, load_init, open_feed, restore
from trainer.validate import Validator
from trainer.watching.monitor import Monitor
from trainer.watching.progress import RunLog
from trainer.watching.samples import Sampler
from trainer.watching.watchdog import Watchdog, end_together
from trainer.zero.ema import ShardedEMA
from trainer.zero.engine import ZeroEngine
from trainer.zero.group import Group, leave, start
from trainer.zero.uploads import Uploads

log = get_logger("train")


def train(
    recipe: Recipe,
    *,
    data: DataChoice,
    out: str,
    resume: str = "latest",
    init_from: str | None = None,
    dry_run: bool = False,
) -> None:
    """Train `recipe` on `data` into the run folder `out` (a folder or s3://); an interrupted run continues.

    `resume`: "latest" checkpoint, "none", or the folder of a checkpoint. `init_from`: exported weights to start from.
    `dry_run`: check everything, print the plan, write nothing. UserError for what cannot be trained. SystemExit with
    code PREEMPTED where the run was asked to stop: the same command continues it.
    """
    world_size, launchers = int(os.environ.get("WORLD_SIZE", "1")), find_launchers()
    if launcher_has_ended(launchers):
        if os.environ.get("RANK", "0") == "0":
            log.warning("the launcher ended while its ranks were starting: nothing was begun, the same command does it")
        raise SystemExit(PREEMPTED)
    with report_once():
        prepared = prepare(
            recipe, data=data, out=out, resume=resume, init_from=init_from, world_size=world_size, thorough=dry_run
        )
    if dry_run:
        if os.environ.get("RANK", "0") == "0":
            end = "dry run: the data fits the recipe; nothing was written"
            perceptual = open_perceptual(prepared.recipe, prepared.dataset.vae, torch.device("cpu"))
            plan = _make_plan(prepared.recipe, world_size, perceptual).describe()
            print("\n".join(filter(None, [plan, prepared.continues_at, end])))
        return

    group = start()
    prepared = agree_on_precision(prepared, group)
    with end_together(Watchdog(group, out, stall_s=recipe.logging.stall_s, launchers=launchers)) as watchdog:
        training = assemble(prepared, group, watchdog)
        with freeze_garbage():
            done = run(training)
    leave()
    if not done:
        raise SystemExit(PREEMPTED)


@dataclass
class Training:
    """The parts of a run on this rank, and its state. `compute_losses` is the recipe's objective."""

    recipe: Recipe
    dataset: Dataset
    out: str
    group: Group
    engine: ZeroEngine
    ema: ShardedEMA
    state: TrainingState
    micro_batches: Prefetcher
    compute_losses: Callable[[Network, DeviceBatch], Losses]
    stop: StopSignal
    monitor: Monitor
    run_log: RunLog
    validator: Validator | None
    sampler: Sampler | None
    uploads: Uploads
    saver: Saver
    free: tuple[str, ...]
    """Fields of the recipe in which an earlier checkpoint of the run may differ."""


def assemble(prepared: PreparedRun, group: Group, watchdog: Watchdog) -> Training:
    """Build the parts of a run on this rank (model, EMA, data, monitor, writers), and restore its checkpoint if there
    is one. Rank 0 also writes recipe.json, plan.json and data.json. Collective."""
    recipe, dataset, val, out = prepared.recipe, prepared.dataset, prepared.val, prepared.out
    perceptual = open_perceptual(recipe, dataset.vae, group.device)
    stop, plan = StopSignal(), _make_plan(recipe, group.world_size, perceptual)
    accumulation, passes = count_micro_batches(recipe, group.world_size), count_network_passes(recipe)
    engine = ZeroEngine(recipe, group, accumulation=accumulation, passes=passes.backward)
    if prepared.init_from is not None:
        load_init(engine, prepared.init_from)  # under adapters these weights stay, and no checkpoint holds them
    if asks_teacher(recipe):
        engine.keep_teacher()
    ema = ShardedEMA(recipe.ema.profiles, engine.masters)
    state = restore(recipe, engine, ema, out=out, resume=prepared.resume, free=prepared.free)
    if group.rank == 0:
        log.info("%s", plan.describe())
        storage.write_bytes(storage.join(out, RECIPE), json.dumps(recipe.to_json(), indent=1).encode())
        write_data(out, dataset, prepared.trained_on, images_seen=state.images_seen)
        storage.write_bytes(storage.join(out, PLAN), json.dumps(to_json(plan), indent=1).encode())
    run_log = RunLog(recipe, group, out, images_seen=state.images_seen, seconds=state.seconds)
    uploads = Uploads(group, out)
    return Training(
        recipe, dataset, out, group, engine, ema, state,
        micro_batches=open_feed(recipe, dataset, group, state),
        compute_losses=bind_objective(recipe, perceptual=perceptual),
        stop=stop,
        monitor=Monitor(
            recipe, group, detect_machine(recipe.precision), watchdog, datasets=dataset.datasets,
            frozen_flops=plan.perceptual.flops_per_image if plan.perceptual else 0,
        ),
        run_log=run_log,
        validator=Validator(recipe, val) if val is not None else None,
        sampler=Sampler(recipe, val, group) if val is not None and recipe.logging.samples else None,
        uploads=uploads,
        saver=Saver(engine, ema, run_log, uploads, dataset.info, prepared.init_from),
        free=prepared.free,
    )  # fmt: skip


def _make_plan(recipe: Recipe, world_size: int, perceptual: PerceptualLoss | None) -> HardwarePlan:
    cost = None if perceptual is None else count_frozen(perceptual, recipe.data.latent_shape)
    return make_hardware_plan(recipe, world_size=world_size, perceptual=cost)


@contextmanager
def freeze_garbage() -> Iterator[None]:
    """Inside the block garbage collection leaves out all objects that exist now.

    DeepSpeed's empty_partition_cache runs a collection each time forward passes change to other weights. Each would
    walk the modules, tables and imported code for half a second, although no step makes garbage of them.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def run(training: Training) -> bool:
    """The training loop on each rank; False when it was asked to stop before the last image. Collective.

    A step: read and compute `engine.accumulation` micro-batches, agree on the loss, step or go back, update the EMA,
    then what is due: log, validation, samples, checkpoint.
    """
    recipe, group, engine, ema = training.recipe, training.group, training.engine, training.ema
    state, monitor, run_log, batch = training.state, training.monitor, training.run_log, recipe.global_batch
    validator, sampler, uploads = training.validator, training.sampler, training.uploads
    if state.images_seen >= recipe.images:
        log.info("%s is trained already: %s images", training.out, f"{state.images_seen:,}")
    with run_log:
        while state.images_seen < recipe.images:
            images_after = state.images_seen + batch  # this step
            loss_sum, keys = torch.zeros((), dtype=torch.float64, device=group.device), []
            for number in range(engine.accumulation):
                with monitor.mark_phase("reading data", state.step):
                    micro = next(training.micro_batches)
                    keys += micro.batch.keys
                    state.exceptions = micro.exceptions
                with monitor.mark_phase("computing", state.step):
                    record_attention = number == 0 and recipe.is_due("log", images_after)
                    with monitor.watch_forward(engine.model, attention=record_attention):
                        losses = training.compute_losses(engine, micro.to(group.device))
                    engine.backpropagate(losses)
                    loss_sum += losses.loss_B.detach().double().sum()
                    monitor.add(micro.t_B, losses, dataset_B=micro.batch.dataset_B)
            with monitor.mark_phase("stepping", state.step):
                # One small collective a step: the loss of the whole batch, and whether anyone was asked to stop.
                total, stop_votes = group.sum([loss_sum.item(), float(training.stop.asked)])
                loss, lr = total / batch, recipe.compute_lr(images_after)
                problem = find_problem(loss, state.recent, recipe.guard, batch=batch)
                result = engine.discard() if problem else engine.step(lr)
            if problem or not result.applied:
                state = go_back(training, problem or "the gradient is not finite", keys)
                continue
            state.advance(loss, batch)
            with monitor.mark_phase("averaging", state.step):
                ema.update(engine.masters, state.images_seen, batch)
            monitor.end_step(loss)
            run_log.advance(state.images_seen, loss, lr)

            last = state.images_seen >= recipe.images
            if last or recipe.is_due("log", state.images_seen):
                run_log.add_training(lr=lr, grad_norm=result.grad_norm, step=state.step, **monitor.take())
            if validator is not None and (last or recipe.is_due("validate", state.images_seen)):
                with monitor.mark_phase("validating", state.step), engine.use_weights(ema.first):
                    run_log.add_validation(validator.run(engine, group), profile=recipe.ema.profiles[0])
            if sampler is not None and (last or recipe.is_due("save", state.images_seen)):
                with monitor.mark_phase("sampling", state.step), engine.use_weights(ema.first):
                    sampler.draw(engine, storage.join(uploads.place, "samples", f"{name_step(state.step)}.png"))
            if last or stop_votes or recipe.is_due("save", state.images_seen):
                with monitor.mark_phase("saving", state.step):
                    final = last or stop_votes > 0
                    written = training.saver.save(state, final=final, activations=monitor.activations)
                if last and not written:
                    what = "the end of the run could not be written"
                    raise UserError(f"{training.out}: {what}; make room, then run the same command again")
            if stop_votes and not last:
                how = "saved" if written else "NOT saved: the last good checkpoint counts"
                log.info("stopped by signal at %s images, %s; the same command continues", state.images_seen, how)
                break
    training.micro_batches.close()
    uploads.close()
    return state.images_seen >= recipe.images


def go_back(training: Training, problem: str, keys: list[str]) -> TrainingState:
    """Go back to the last checkpoint instead of taking a step. `problem`: why, in words; `keys`: the samples of the bad
    batch, which is left out from now on. UnstableRun after too many bad batches. Collective."""
    training.uploads.wait()  # the checkpoint to go back to may still be on its way
    recipe, engine, out = training.recipe, training.engine, training.out
    training.state = roll_back(problem, keys, recipe, engine, training.ema, training.state, out=out, free=training.free)
    training.micro_batches.close()
    training.micro_batches = open_feed(recipe, training.dataset, training.group, training.state)
    training.run_log.rewind(training.state.images_seen)
    training.monitor.take()  # figures of steps that do not count any more
    return training.state

"""Training: start reading here. `train` is the whole run from top to bottom; progress is counted in images."""

import json
import math
import os
from typing import Literal

import torch

from data_pipeline.loading.loader import Dataset
from infra import storage
from infra.errors import UserError
from infra.log import get_logger
from trainer.checks.preflight import one_voice, prepare
from trainer.guard import keep_recent, problem_of, roll_back
from trainer.launchers import PREEMPTED, ended_before, launchers_above
from trainer.machines import this_machine
from trainer.objective import get_objective, loss_function
from trainer.planning.plan import describe, make_plan
from trainer.recipe import Recipe, count_micro_batches
from trainer.runfolder import DATA, PLAN, RECIPE, step_name
from trainer.state import Saver, StopSignal, load_init, open_feed, restore
from trainer.validate import HeldOutPairs, Validator
from trainer.watching.monitor import Monitor
from trainer.watching.progress import RunLog
from trainer.watching.samples import Sampler
from trainer.watching.watch import Watch, together
from trainer.zero.ema import ShardedEMA
from trainer.zero.engine import ZeroEngine
from trainer.zero.group import Group, leave, start
from trainer.zero.uploads import Uploads

log = get_logger("train")


def train(
    recipe: Recipe, *, data: str, out: str, resume: str = "latest", init_from: str | None = None, dry_run: bool = False
) -> None:
    """Train `recipe` on the data at `data` into the run folder `out`; an interrupted run continues."""
    world, launchers = int(os.environ.get("WORLD_SIZE", "1")), launchers_above()
    if ended_before(launchers):
        if os.environ.get("RANK", "0") == "0":
            log.warning("the launcher ended while its ranks were starting: nothing was begun, the same command does it")
        raise SystemExit(PREEMPTED)
    with one_voice():
        ready = prepare(recipe, data=data, out=out, resume=resume, init_from=init_from, world=world, thorough=dry_run)
    recipe = ready.recipe
    if dry_run:
        if os.environ.get("RANK", "0") == "0":
            end = "dry run: the data fits the recipe; nothing was written"
            print("\n".join(filter(None, [describe(make_plan(recipe, world=world)), ready.goes_on, end])))
        return

    group = start()
    with together(Watch(group, out, stall_s=recipe.logging.stall_s, launchers=launchers)) as watch:
        done = run(recipe, ready.dataset, ready.val, group, watch, out=out, resume=ready.resume, init_from=init_from)
    leave()
    if not done:
        raise SystemExit(PREEMPTED)


def run(
    recipe: Recipe,
    dataset: Dataset,
    val: Dataset | None,
    group: Group,
    watch: Watch,
    *,
    out: str,
    resume: str,
    init_from: str | None,
) -> bool:
    """What each rank does from the first step to the last; False when it was asked to stop before."""
    stop, plan = StopSignal(), make_plan(recipe, world=group.world)
    batch, accumulation = recipe.global_batch, count_micro_batches(recipe, group.world)
    engine = ZeroEngine(recipe, group, accumulation=accumulation)
    if init_from is not None:
        load_init(engine, init_from)  # under adapters these weights stay, and no checkpoint holds them
    ema = ShardedEMA(recipe.ema.profiles, engine.masters)
    state = restore(recipe, engine, ema, out=out, resume=resume)
    if group.rank == 0:
        log.info("%s", describe(plan))
        storage.write_bytes(storage.join(out, RECIPE), json.dumps(recipe.to_json(), indent=1).encode())
        storage.write_bytes(storage.join(out, DATA), dataset.info.to_bytes())
        storage.write_bytes(storage.join(out, PLAN), json.dumps(plan, indent=1).encode())
    run_log = RunLog(recipe, group, out, images_seen=state.images_seen, seconds=state.seconds)
    validator = Validator(recipe, val) if val is not None else None
    held_out = HeldOutPairs(recipe, val) if val is not None and get_objective(recipe.objective).pairs else None
    sampler = Sampler(recipe, val, group) if val is not None and recipe.logging.samples else None
    feed = open_feed(recipe, dataset, group, state)
    uploads = Uploads(group, out)
    saver = Saver(engine, ema, run_log, uploads, dataset.info, init_from)
    compute, monitor = loss_function(recipe), Monitor(recipe, group, this_machine(recipe.precision))
    unlogged: list[float] = []  # losses of the steps since the last line of the log
    if state.images_seen >= recipe.images:
        log.info("%s is trained already: %s images", out, f"{state.images_seen:,}")

    with run_log:
        while state.images_seen < recipe.images:
            loss_sum, keys = torch.zeros((), dtype=torch.float64, device=group.device), []
            for number in range(accumulation):
                watch.at("reading data", state.step)
                with monitor.waiting():
                    micro = next(feed)
                keys += micro.batch.keys
                watch.at("computing", state.step)
                look = number == 0 and due(recipe, "log", state.images_seen + batch)
                with monitor.looking(look), monitor.counting(engine.model):
                    losses = compute(engine, micro.to(group.device))
                engine.backward(losses.loss_B.mean())
                loss_sum += losses.loss_B.detach().double().sum()
                monitor.add(micro.t_B, losses)
                if number + 1 < accumulation:
                    engine.step(0.0, boundary=False)
            # One small collective a step: the loss of the whole batch, and whether anyone was asked to stop.
            total, stop_votes = group.sum([loss_sum.item(), float(stop.asked)])
            loss, lr = total / batch, recipe.lr_at(state.images_seen + batch)
            problem = problem_of(loss, state.recent, recipe.guard, batch=recipe.global_batch)
            result = engine.discard() if problem else engine.step(lr)
            if problem or not result.applied:
                problem = problem or "the gradient is not finite"
                uploads.wait()  # it may be the checkpoint to go back to
                state = roll_back(problem, keys, recipe, engine, ema, state, feed, out=out)
                feed.close()
                feed, unlogged = open_feed(recipe, dataset, group, state), []
                run_log.rewind(state.images_seen)
                monitor.take()
                continue
            state.images_seen += batch
            state.step += 1
            keep_recent(state, loss)
            with monitor.averaging():
                ema.update(engine.masters, state.images_seen, batch)
            run_log.advance(state.images_seen, loss, lr)
            unlogged.append(loss)

            last = state.images_seen >= recipe.images
            if last or due(recipe, "log", state.images_seen):
                mean = math.fsum(unlogged) / len(unlogged)
                run_log.train(mean, lr=lr, grad_norm=result.grad_norm, step=state.step, **monitor.take())
                unlogged = []
            if validator is not None and (last or due(recipe, "validate", state.images_seen)):
                watch.at("validating", state.step)
                with engine.weights(ema.first):
                    found = validator.run(engine, group)
                    if held_out is not None:
                        run_log.held_out(held_out.run(engine, group), held_out.pair_count, found.protocol_hash)
                run_log.validation(found, profile=recipe.ema.profiles[0])
            if sampler is not None and (last or due(recipe, "save", state.images_seen)):
                watch.at("sampling", state.step)
                with engine.weights(ema.first):
                    sampler.draw(engine, storage.join(uploads.place, "samples", f"{step_name(state.step)}.png"))
            if last or stop_votes or due(recipe, "save", state.images_seen):
                watch.at("saving", state.step)
                final = last or stop_votes > 0
                written = saver.save(state, feed.exceptions, final=final, activations=monitor.activations)
                if last and not written:
                    raise UserError(
                        f"{out}: the end of the run could not be written; make room, then run the same command again"
                    )
            if stop_votes and not last:
                how = "saved" if written else "NOT saved: the last good checkpoint counts"
                log.info("stopped by signal at %s images, %s; the same command continues", state.images_seen, how)
                break

    feed.close()
    uploads.close()
    return state.images_seen >= recipe.images


def due(recipe: Recipe, what: Literal["log", "validate", "save"], images_seen: int) -> bool:
    """Does the step that ends at `images_seen` cross a multiple of the cadence? (It need not divide by the batch.)"""
    every, before = recipe.cadence(what), images_seen - recipe.global_batch
    if what == "save" and any(before < at <= images_seen for at in recipe.logging.save_at):
        return True
    return every is not None and images_seen // every > before // every

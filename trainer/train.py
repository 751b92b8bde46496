"""Training: start reading here. `train` is the whole run from top to bottom; progress is counted in images."""

import json
import math
import os
from typing import Literal

import torch

from infra import storage
from infra.errors import UserError
from infra.log import get_logger
from model.flow import get_formulation
from trainer.objective import pretrain
from trainer.plan import describe, make_plan
from trainer.preflight import check_run_folder, fit, micro_batches, one_voice, with_init
from trainer.progress import RunLog
from trainer.recipe import Recipe
from trainer.samples import Sampler
from trainer.state import State, StopSignal, load_init, open_batches, refuse_non_finite, restore, save
from trainer.validate import Validator
from trainer.zero.ema import ShardedEMA
from trainer.zero.engine import ZeroEngine
from trainer.zero.group import leave, start

log = get_logger("train")
PREEMPTED = 75  # exit code after SIGTERM or Ctrl-C: saved, the same command continues (EX_TEMPFAIL of sysexits.h)


def train(
    recipe: Recipe, *, data: str, out: str, resume: str = "latest", init_from: str | None = None, dry_run: bool = False
) -> None:
    """Train `recipe` on the data at `data` into the run folder `out`; an interrupted run continues."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    with one_voice():
        recipe, dataset, val = fit(with_init(recipe, init_from), data, world=world)
        check_run_folder(recipe, out, resume)
        plan = make_plan(recipe, world=world)
    if dry_run:
        if os.environ.get("RANK", "0") == "0":
            print(describe(plan) + "\ndry run: the data fits the recipe; nothing was written")
        return

    group, stop = start(), StopSignal()
    batch, accumulation = recipe.global_batch, micro_batches(recipe, world)
    engine = ZeroEngine(recipe, group, accumulation=accumulation)
    if init_from is not None:
        load_init(engine, init_from)
    ema = ShardedEMA(recipe.ema.profiles, engine.masters)
    state = restore(recipe, engine, ema, out=out, resume=resume)
    if group.rank == 0:
        log.info("%s", describe(plan))
        storage.write_bytes(storage.join(out, "recipe.json"), json.dumps(recipe.to_json(), indent=1).encode())
        storage.write_bytes(storage.join(out, "plan.json"), json.dumps(plan, indent=1).encode())
    run_log = RunLog(recipe, group, out, images_seen=state.images_seen, seconds=state.seconds)
    validator = Validator(recipe, val) if val is not None else None
    sampler = Sampler(recipe, val, group) if val is not None and recipe.logging.samples else None
    batches = open_batches(recipe, dataset, group, state)
    formulation = get_formulation(recipe.formulation)
    losses: list[float] = []
    if state.images_seen >= recipe.images:
        log.info("%s is trained already: %s images", out, f"{state.images_seen:,}")

    with run_log:
        while state.images_seen < recipe.images:
            loss_sum = torch.zeros((), dtype=torch.float64, device=group.device)
            for number in range(accumulation):
                micro = next(batches)
                loss_B = pretrain(
                    engine, micro, formulation=formulation, seed=recipe.seed, shift=recipe.shift, device=group.device
                )
                engine.backward(loss_B.mean())
                loss_sum += loss_B.detach().double().sum()
                if number + 1 < accumulation:
                    engine.step(0.0, boundary=False)
            # One small collective a step: the loss of the whole batch, and whether anyone was asked to stop.
            total, stop_votes = group.sum([loss_sum.item(), float(stop.asked)])
            loss, lr = total / batch, recipe.lr_at(state.images_seen + batch)
            refuse_non_finite(loss, "loss", state, recipe, micro)
            result = engine.step(lr)
            refuse_non_finite(result.grad_norm if result.applied else math.nan, "gradient", state, recipe, micro)
            state.images_seen += batch
            state.step += 1
            ema.update(engine.masters, state.images_seen, batch)
            run_log.advance(state.images_seen, loss, lr)
            losses.append(loss)

            last = state.images_seen >= recipe.images
            if last or due(state, recipe, "log"):
                mean = math.fsum(losses) / len(losses)
                run_log.train(mean, lr=lr, grad_norm=result.grad_norm, step=state.step)
                losses = []
            if validator is not None and (last or due(state, recipe, "validate")):
                with engine.weights(ema.first):
                    found = validator.run(engine, group)
                run_log.validation(found, profile=recipe.ema.profiles[0])
            if sampler is not None and (last or due(state, recipe, "save")):
                with engine.weights(ema.first):
                    sampler.draw(engine, storage.join(out, "samples", f"step_{state.step:07d}.png"))
            if last or stop_votes or due(state, recipe, "save"):
                written = save(recipe, engine, ema, state, run_log, batches, dataset.info, out=out)
                if last and not written:
                    raise UserError(
                        f"{out}: the end of the run could not be written; make room, then run the same command again"
                    )
            if stop_votes and not last:
                how = "saved" if written else "NOT saved: the last good checkpoint counts"
                log.info("stopped by signal at %s images, %s; the same command continues", state.images_seen, how)
                break

    batches.close()
    leave()
    if state.images_seen < recipe.images:
        raise SystemExit(PREEMPTED)


def due(state: State, recipe: Recipe, what: Literal["log", "validate", "save"]) -> bool:
    """Did this step cross a multiple of the cadence? So a recipe keeps its meaning when the batch size changes."""
    every = recipe.cadence(what)
    return every is not None and state.images_seen // every > (state.images_seen - recipe.global_batch) // every

"""How fast the devices here take steps of a recipe: what a plan is made with before any run.

    python -m trainer plan d38 --gpus 64 --trial

Two shallow models of the recipe's own width take real steps, under its ZeRO stage and switches, on made-up batches.
The difference of their times is the cost of the additional blocks, by FLOPs and by parameters. On a GPU the trial
tells which share of its peak FLOP/s one device reaches. On a CPU it times the whole step, on as many ranks as there
are cores, because exchanges and copies are work of the same cores.
"""

import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch

from data_pipeline.loading.batch import LatentBatch
from infra.codec import from_json, to_json
from infra.errors import UserError
from infra.log import get_logger
from infra.steal import read_stolen_seconds, subtract_stolen
from model.backbones.trunk import TokenConfig
from model.encoders.text import TextCond
from trainer.feed import MicroBatch, draw_for
from trainer.launchers import start_training
from trainer.objective import asks_teacher, bind_objective, count_network_passes, count_train_flops, get_objective
from trainer.planning.estimates import Cost, StepCost
from trainer.recipe import Recipe
from trainer.zero.ema import ShardedEMA
from trainer.zero.engine import ZeroEngine
from trainer.zero.group import Group, find_free_port, leave, start

log = get_logger("plan")
BLOCKS = (2, 4)  # of the two shallow models
ROUNDS = 3  # steps that are timed, after one that warms up
TRIES = 3  # of trials in which more blocks take no longer, before the machine counts as too busy
ANSWER = "trial: "
PASSES = 2  # micro-batches of a step: passes that only add up gradients and those that end a step take their turns


@dataclass(frozen=True)
class MeasuredModel:
    """What a model took, and how large it is."""

    cost: StepCost
    flops: int
    parameters: int


def time_step(recipe: Recipe, *, micro_batch: int, ranks: int) -> StepCost:
    """What a micro-batch and an update take on `ranks` processes of this machine."""
    *smaller, larger = _measure_models(recipe, micro_batch=micro_batch, ranks=ranks)
    micro, update = larger.cost.micro_batch, larger.cost.update
    for one in smaller:
        flops = _find_place(count_train_flops(recipe), one.flops, larger.flops)
        parameters = _find_place(recipe.model.count_parameters(), one.parameters, larger.parameters)
        # What is small is noise, too: never less than the larger one's.
        micro = one.cost.micro_batch.interpolate(micro, flops).at_least(micro)
        update = one.cost.update.interpolate(update, parameters).at_least(update)
    return StepCost(micro, update)


def measure_flops(recipe: Recipe, *, micro_batch: int) -> float:
    """FLOP/s that the recipe's blocks reach on one device."""
    *smaller, larger = _measure_models(recipe, micro_batch=micro_batch, ranks=1)
    flops, seconds = larger.flops, larger.cost.micro_batch.seconds
    for one in smaller:
        flops, seconds = flops - one.flops, seconds - one.cost.micro_batch.seconds
    return flops * micro_batch / seconds


def make_shallow(config: TokenConfig, blocks: int) -> TokenConfig:
    """A model as wide as `config`, of fewer blocks."""
    kind = type(config)
    as_wide = type(kind.__name__, (kind,), {"width": config.width, "heads": config.heads})
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if dual := fields.get("dual_attention"):
        fields["dual_attention"] = tuple(number for number in dual if number < blocks - 1)
    return as_wide(**fields | {"depth": blocks})


def _find_place(value: int, smaller: int, larger: int) -> float:
    """0 at the smaller one, 1 at the larger one."""
    return (value - smaller) / (larger - smaller)


def _measure_models(recipe: Recipe, *, micro_batch: int, ranks: int) -> list[MeasuredModel]:
    """The shallow models, smallest first; of a model that is as shallow itself, that one alone."""
    for _ in range(TRIES):
        found = _try_models(recipe, micro_batch=micro_batch, ranks=ranks)
        seconds = [one.cost.micro_batch.seconds for one in found]
        if all(less < more for less, more in pairwise(seconds)):
            return found
    few, many = BLOCKS
    raise UserError(f"{many} blocks took no longer than {few}: something else works on this machine, plan again later")


def _try_models(recipe: Recipe, *, micro_batch: int, ranks: int) -> list[MeasuredModel]:
    counts = BLOCKS if recipe.model.depth > BLOCKS[-1] else (recipe.model.depth,)
    found = []
    for blocks in counts:
        log.info("trying %d blocks of width %d on %d rank(s)", blocks, recipe.model.width, ranks)
        one = replace(recipe, model=make_shallow(recipe.model, blocks))
        cost = _try_model(recipe, blocks, micro_batch=micro_batch, ranks=ranks)
        found.append(MeasuredModel(cost, count_train_flops(one), one.model.count_parameters()))
    return found


def _try_model(recipe: Recipe, blocks: int, *, micro_batch: int, ranks: int) -> StepCost:
    """This module on `ranks` processes."""
    words = [Path(sys.executable).name, "-W", "ignore", "-m", "trainer.planning.trial", str(blocks), str(micro_batch)]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port())}
    meeting |= {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "TRIAL_RECIPE": json.dumps(recipe.to_json())}
    with tempfile.TemporaryFile("w+") as output:
        processes = [
            start_training(words, environment={**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}, output=output)
            for rank in range(ranks)
        ]
        try:
            codes = [process.wait() for process in processes]
        finally:  # Ctrl-C does not reach them
            for process in processes:
                process.kill()
                process.wait()
        output.seek(0)
        lines = output.read().splitlines()
    answer = next((line.removeprefix(ANSWER) for line in lines if line.startswith(ANSWER)), None)
    if answer is None or any(codes):
        why = lines[-1] if lines else f"exit codes {codes}"
        raise UserError(f"the trial of {blocks} blocks on {ranks} rank(s) did not end well: {why}")
    return from_json(StepCost, answer, where="the answer of the trial")


def take_steps(recipe: Recipe, group: Group, *, blocks: int, micro_batch: int) -> StepCost:
    """What each rank of a trial does: the busier one's medians, the same on all. Collective."""
    parallel = replace(recipe.parallel, micro_batch=micro_batch, hpz=min(recipe.parallel.hpz, group.world_size))
    batch = micro_batch * PASSES * group.world_size
    recipe = replace(recipe, model=make_shallow(recipe.model, blocks), global_batch=batch, parallel=parallel)
    engine = ZeroEngine(recipe, group, accumulation=PASSES, passes=count_network_passes(recipe).backward)
    if asks_teacher(recipe):
        engine.keep_teacher()
    ema = ShardedEMA(recipe.ema.profiles, engine.masters)
    compute, micro = bind_objective(recipe), make_up_batch(recipe, micro_batch)
    if group.device.type == "cuda":
        micro = micro.pin_memory()
    timer = Timer(group)
    passes, updates = [], []
    for number in range(1 + ROUNDS):
        for _ in range(PASSES):
            timer.start()
            engine.backpropagate(compute(engine, micro.to(group.device)))
            passes.append(timer.take())
        timer.start()
        group.sum([0.0])
        engine.step(recipe.optimizer.lr)
        ema.update(engine.masters, batch * (number + 1), batch)
        updates.append(timer.take())
    # The first round makes Adam's moments and compiles; of work the busier rank's counts, as in a run's log.
    medians = [statistics.median(values) for found in (passes[PASSES:], updates[1:]) for values in zip(*found)]
    slowest = group.max(medians)
    return StepCost(Cost(*slowest[:2]), Cost(*slowest[2:]))


class Timer:
    """Seconds and CPU seconds of this process since `start`, as a run's log counts them."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def _read_clocks(self) -> tuple[float, float, float]:
        if self._group.device.type == "cuda":
            torch.cuda.synchronize(self._group.device)
        return time.perf_counter(), time.process_time(), read_stolen_seconds()

    def start(self) -> None:
        self._since = self._read_clocks()

    def take(self) -> tuple[float, float]:
        seconds, work, stolen = (now - then for now, then in zip(self._read_clocks(), self._since))
        if self._group.device.type == "cuda":
            return seconds, work
        return subtract_stolen(seconds, stolen=stolen, work=work, ranks=self._group.world_size), work


def make_up_batch(recipe: Recipe, count: int) -> MicroBatch:
    """A micro-batch of the recipe's shapes."""
    config, shape = recipe.model, (count, *recipe.data.latent_shape)
    text = TextCond(
        torch.randn(count, recipe.data.text_tokens, config.context_width, dtype=torch.float16),
        torch.randn(count, config.pooled_width),
    )
    places, words = torch.LongTensor(range(count)), [""] * count
    other = torch.randn(shape) if get_objective(recipe.objective).pairs else None
    batch = LatentBatch(torch.randn(shape), text, places, words, words, other)
    return draw_for(recipe, batch)


def main() -> None:
    blocks, micro_batch = map(int, sys.argv[1:])
    recipe, group = Recipe.from_json(os.environ["TRIAL_RECIPE"]), start()
    found = take_steps(recipe, group, blocks=blocks, micro_batch=micro_batch)
    leave()
    if group.rank == 0:
        print(f"{ANSWER}{json.dumps(to_json(found))}", flush=True)


if __name__ == "__main__":
    main()

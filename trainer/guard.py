"""Bad batches: a loss or gradient that is not finite, or far too large, never reaches the optimizer.

The batch is reported and skipped, and the run goes back to its last good checkpoint. If the batch is bad again with
other images in its place, the batches before it are skipped too. After a few skips the run stops.
"""

import json
import math
import statistics
from collections.abc import Sequence, Set

from data_pipeline.loading.order import DataExceptions
from infra import storage
from infra.codec import from_json, to_json
from infra.errors import UserError
from infra.log import get_logger
from trainer.recipe import Guard, Recipe
from trainer.runfolder import UNSTABLE, name_rank, name_step
from trainer.state import TrainingState, restore
from trainer.zero.ema import ShardedEMA
from trainer.zero.engine import ZeroEngine
from trainer.zero.group import Group

log = get_logger("guard")
ENOUGH = 16  # steps whose losses must be known to judge the next one
LEAST = 2.0  # a spike is at least this many times the largest recent loss ...
LARGE = 256  # ... in batches of this many; 8 times in batches of 16, where one t near 1 gave 6 medians in a sound run


class UnstableRun(UserError):
    """The run met more bad batches than it may skip."""


def find_problem(loss: float, recent: Sequence[float], guard: Guard, *, batch: int) -> str:
    """Why a step with this loss must not be taken; "" when it may. `recent` are the losses of the steps before it,
    each a mean over `batch` images."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if guard.spike is None or len(recent) < ENOUGH:
        return ""
    median = statistics.median(recent)
    deviation = 1.4826 * statistics.median(abs(value - median) for value in recent)  # sigma of a normal distribution
    least = LEAST * max(1.0, math.sqrt(LARGE / batch))
    if loss > max(least * max(recent), median + guard.spike * deviation):
        return f"the loss jumped to {loss:.4g} from a median of {median:.4g} over {len(recent)} steps"
    return ""


def roll_back(
    problem: str,
    keys: list[str],
    recipe: Recipe,
    engine: ZeroEngine,
    ema: ShardedEMA,
    state: TrainingState,
    *,
    out: str,
    free: tuple[str, ...] = (),
) -> TrainingState:
    """Go back to the last checkpoint; the state to continue from, which leaves the bad batch out of the data.
    UnstableRun when more batches were bad than the recipe allows. Collective.

    Without a checkpoint the run continues where it is: the bad step was not taken.
    """
    group, batch = engine.group, recipe.global_batch
    first = state.step * batch
    where = f"images {first:,} to {first + batch - 1:,}"
    _write_skipped_keys(problem, keys, state, group, out=out)
    suspects = find_suspects(first, batch, state.exceptions.positions)
    before = len(suspects) // batch - 1
    exceptions = _gather_exceptions(state.exceptions, group) | DataExceptions(positions=frozenset(suspects))
    skips = state.skips + 1  # a batch that fails again, with substitutes for its images, counts again
    if skips > recipe.guard.max_skips:
        if group.rank == 0:
            storage.write_bytes(storage.join(out, UNSTABLE), json.dumps({"problem": problem, "images": first}).encode())
        raise UnstableRun(
            f"{problem} at {where} (keys {keys[0]} ...), and {skips - 1} batches were left out already "
            f"(--guard.max-skips {recipe.guard.max_skips}): the step was not taken; look at these images, or start "
            "from the last checkpoint with a lower --optimizer.lr"
        )
    found = restore(recipe, engine, ema, out=out, resume="latest", free=free)
    at = found if found.step else state
    at.exceptions, at.skips = at.exceptions | exceptions.go_back_to(at.images_seen), skips
    if group.rank == 0:
        then = f"back to the checkpoint at {at.images_seen:,} images" if found.step else "no checkpoint yet: going on"
        left = f"that batch and the {before} before it: with other images it failed again" if before else "that batch"
        log.warning(
            "%s at %s: the step was not taken; %s, without %s (%d of %d)",
            problem, where, then, left, skips, recipe.guard.max_skips,
        )  # fmt: skip
    return at


def find_suspects(first: int, batch: int, left_out: Set[int]) -> range:
    """Sample positions to leave out when the batch that begins at `first` was bad.

    The first time that is the batch itself. If it is bad again with other images in its place, the steps before it
    have done the harm: then eight times as many batches as were left out without success. (PaLM left out 200 to 500
    batches before and during a spike: arXiv 2204.02311, section 5.1.)"""
    in_vain = 0
    while first - in_vain * batch in left_out:
        in_vain += 1
    return range(max(0, first - 8 * in_vain * batch), first + batch)


def _write_skipped_keys(problem: str, keys: list[str], state: TrainingState, group: Group, *, out: str) -> None:
    """Write the keys of the bad batch's images to RUN/skipped/, one file per rank."""
    uri = storage.join(out, "skipped", f"{name_step(state.step)}_{name_rank(group.rank)}.json")
    record = {"problem": problem, "step": state.step, "images_seen": state.images_seen, "keys": keys}
    try:
        storage.write_bytes(uri, json.dumps(record, indent=1).encode())
    except (UserError, OSError) as error:
        log.warning("the keys of the bad batch are not written: %s", error)


def _gather_exceptions(own: DataExceptions, group: Group) -> DataExceptions:
    """What any rank leaves out (quarantined shards): after going back all ranks must leave out the same."""
    if group.world_size == 1:
        return own
    found = DataExceptions()
    for text in group.gather(json.dumps(to_json(own))):
        found |= from_json(DataExceptions, text, where="what a rank left out")
    return found

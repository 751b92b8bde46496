"""What survives an interruption: saving, restoring, and stopping in time."""

import signal
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from data_pipeline.loading.loader import Batches, Dataset
from data_pipeline.loading.order import Exceptions
from data_pipeline.pairs import Partners
from data_pipeline.schema import DatasetInfo
from infra import storage
from infra.errors import UserError
from infra.log import get_logger
from trainer.checks.fitting import caption_weights
from trainer.checks.preflight import same_recipe
from trainer.exports.card import weights_meta
from trainer.exports.export import export, weights_reader
from trainer.recipe import Recipe
from trainer.watching.progress import RunLog
from trainer.zero import checkpoint
from trainer.zero.ema import ShardedEMA
from trainer.zero.engine import MOMENTS, ZeroEngine
from trainer.zero.group import Group
from trainer.zero.uploads import Uploads

log = get_logger("train")


@dataclass
class State:
    """What a checkpoint keeps besides tensors: one integer for the data, and what the data leaves out."""

    images_seen: int = 0
    step: int = 0
    seconds: float = 0.0
    exceptions: Exceptions = field(default_factory=Exceptions)
    skips: int = 0
    """Batches left out because they could not be right."""
    recent: list[float] = field(default_factory=list)
    """Losses of the last steps, by which the guard knows a spike."""


class StopSignal:
    """SIGTERM (pre-emption) and the first Ctrl-C ask the loop to save and leave after the step it is in."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


def share_of(engine: ZeroEngine, ema: ShardedEMA, extra: dict[str, Any]) -> checkpoint.Share:
    """This rank's part of everything that a checkpoint holds."""
    moments = {name: engine.moments(name) for name in MOMENTS}
    averages = {f"ema/{name}": shards for name, shards in ema.shards.items()}
    segments = [flat.segments for flat in engine.partition.flats]
    if engine.partition.replicated and engine.group.rank > 0:
        segments = [() for _ in segments]  # rank 0 saves for all
    return checkpoint.Share(segments, {"master": engine.masters, **moments, **averages}, extra)


def measured(
    engine: ZeroEngine, ema: ShardedEMA, share: checkpoint.Share, activations: int | None
) -> dict[str, float]:
    """Sizes under the names of the plan's predictions: the largest rank's bytes, all ranks' checkpoint. Collective."""
    group, sizes = engine.group, engine.bytes_by_category()
    if activations is not None:
        sizes["activations"] = activations
    sizes["ema"] = sum(x.numel() * x.element_size() for shards in ema.shards.values() for x in shards)
    numel = sum(s.numel for parts in share.segments for s in parts)
    [total] = group.sum([float(numel * 4 * len(share.tensors))])
    largest = group.max([float(size) for size in sizes.values()])
    parameters = engine.describe()["parameters"]
    named = {f"bytes_per_rank/{name}": size for name, size in zip(sizes, largest)}
    return {"parameters": float(parameters), "checkpoint_bytes": total, **named}


def save(
    recipe: Recipe,
    engine: ZeroEngine,
    ema: ShardedEMA,
    state: State,
    run_log: RunLog,
    batches: Batches,
    info: DatasetInfo,
    *,
    out: str,
    uploads: Uploads,
    final: bool,
    init_from: str | None = None,
    activations: int | None = None,
) -> bool:
    """Export weights, tell the results, publish a checkpoint. False when something could not be written. Collective.

    On S3 that happens behind the training, one checkpoint at a time; a `final` one is waited for. Adapters are exported
    merged into `init_from`, checkpoints hold them alone.
    """
    group, step = engine.group, f"step_{state.step:07d}"
    if final:
        uploads.wait()
    elif group.any(uploads.busy):
        if group.rank == 0:
            log.warning("%s is left out: the checkpoint before it still travels to %s", step, out)
        return True

    def meta(kind: str) -> dict[str, object]:
        return weights_meta(recipe, info, kind=kind, images_seen=state.images_seen, run=run_log.run)

    folder = storage.join(uploads.place, "weights")
    uris = [storage.join(folder, step, "ema.safetensors"), storage.join(folder, "ema.safetensors")]
    exported = export(engine, ema.first, uris, meta("ema"), group, base=init_from)
    raw = [storage.join(folder, "raw.safetensors")]
    exported &= export(engine, engine.masters, raw, meta("raw"), group, base=init_from)
    share = share_of(engine, ema, {"exceptions": batches.exceptions.to_json()})
    run_log.cost(**measured(engine, ema, share, activations))
    kept = {
        "images_seen": state.images_seen,
        "adam_steps": engine.adam_steps,
        "seconds": run_log.seconds,
        "recipe": recipe.to_json(),
        "recipe_hash": recipe.hash,
        "recent": state.recent,
        "skips": state.skips,
    }
    root, place = (storage.join(where, "checkpoints") for where in (out, uploads.place))
    keep, said = recipe.logging.keep, f"saved {step} at {state.images_seen:,} images"
    if uploads.remote:
        manifest = checkpoint.write(place, share, group, step=state.step, state=kept)
        if manifest is None:
            _not_saved(step, group)
            return False

        def publish() -> None:
            checkpoint.publish(root, manifest, keep=keep)
            log.info("%s", said)

        uploads.start([lambda: checkpoint.withdraw(root, state.step), run_log.flush], publish)
        return exported and (uploads.wait() if final else True)
    told = _flush(run_log)
    saved = checkpoint.save(root, share, group, step=state.step, state=kept, keep=keep)
    if not saved:
        _not_saved(step, group)
    elif group.rank == 0:
        log.info("%s", said)
    return exported and saved and not group.any(not told)


def _flush(run_log: RunLog) -> bool:
    try:
        run_log.flush()
    except (UserError, OSError) as error:
        log.warning("results not written yet: %s", error)
        return False
    return True


def _not_saved(step: str, group: Group) -> None:
    if group.rank == 0:
        log.warning("checkpoint %s was not saved; the last good one stands, training goes on", step)


def restore(recipe: Recipe, engine: ZeroEngine, ema: ShardedEMA, *, out: str, resume: str) -> State:
    """Put everything back as the checkpoint had it, on any number of ranks. Collective."""
    group = engine.group
    if resume == "none":
        return State()
    if resume == "latest":
        found = checkpoint.find(storage.join(out, "checkpoints"), group)
        if found is None:
            return State()
    else:
        found = checkpoint.whole(resume, group)
    kept = found.state
    same_recipe(found.uri, kept, recipe, resume=resume)
    target = share_of(engine, ema, {})
    target.segments = [flat.segments for flat in engine.partition.flats]
    checkpoint.load(found, target, group)
    engine.set_moments({name: target.tensors[name] for name in MOMENTS}, steps=int(kept["adam_steps"]))
    engine.publish()
    if group.rank == 0:
        log.info("resumed %s at %s images", found.uri, f"{kept['images_seen']:,}")
    # What one rank's reader had to quarantine, all leave out from here on.
    exceptions = Exceptions()
    for extra in found.extras:
        exceptions |= Exceptions.from_json(extra["exceptions"])
    seconds, recent = float(kept["seconds"]), list(kept.get("recent", []))
    return State(int(kept["images_seen"]), found.step, seconds, exceptions, int(kept.get("skips", 0)), recent)


def load_init(engine: ZeroEngine, uri: str) -> None:
    """Start from exported weights; Adam and the EMA start anew. QK-norms that they lack begin as ones. Collective."""
    engine.load_whole(weights_reader(uri, engine.shapes))


def open_batches(recipe: Recipe, dataset: Dataset, group: Group, state: State) -> Batches:
    """This rank's micro-batches from where the run stands."""
    return dataset.batches(
        seed=recipe.seed,
        start=state.step * recipe.global_batch,
        global_batch=recipe.global_batch,
        rank=group.rank,
        world_size=group.world,
        caption_weights=caption_weights(recipe, dataset),
        encoder_dropout=recipe.data.encoder_dropout,
        exceptions=state.exceptions,
        micro_batch=recipe.parallel.micro_batch,
        partner=Partners(dataset) if recipe.objective == "dpo" else None,
        dealt=recipe.parallel.reverse_lanes,
    )

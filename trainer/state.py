"""What survives an interruption: saving, restoring, and stopping in time."""

import os
import signal
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any

from data_pipeline.formats.schema import DatasetInfo
from data_pipeline.loading.loader import Dataset
from data_pipeline.loading.order import DataExceptions
from data_pipeline.loading.pairs import RejectedLatents
from infra import storage
from infra.codec import from_json, to_json
from infra.errors import UserError
from infra.log import get_logger
from infra.outcome import report_saved
from trainer.exports.card import describe_weights
from trainer.exports.export import export, open_weights
from trainer.feed import Prefetcher, choose_caption_weights, draw_for
from trainer.objective import get_objective
from trainer.recipe import Recipe
from trainer.runfolder import get_checkpoints_folder, name_step
from trainer.watching.progress import RunLog
from trainer.zero import checkpoint
from trainer.zero.ema import ShardedEMA
from trainer.zero.engine import MOMENTS, ZeroEngine
from trainer.zero.group import Group
from trainer.zero.uploads import Uploads

log = get_logger("train")
RECENT = 128  # steps whose losses are remembered
# Environment variable, "1": the ranks exchange images of each batch, the same batch summed in another order.
# `verify-resume` measures with it how far rounding alone lets two runs drift. It is no option: a run needs it never.
DEAL_LANES = "BEELINE_DEAL_LANES"


@dataclass
class TrainingState:
    """What a checkpoint keeps besides tensors: one integer for the data, and what the data leaves out."""

    images_seen: int = 0
    step: int = 0
    seconds: float = 0.0
    exceptions: DataExceptions = field(default_factory=DataExceptions)
    """What is left out of the data: batches that the guard rejected on any rank, and shards that this rank's reader
    could not read, as of the last micro-batch."""
    skips: int = 0
    """Batches left out because they could not be right."""
    recent: list[float] = field(default_factory=list)
    """Losses of the last steps, by which the guard knows a spike."""

    def advance(self, loss: float, batch: int) -> None:
        """A step of `batch` images was taken."""
        self.images_seen += batch
        self.step += 1
        self.recent = [*self.recent, loss][-RECENT:]


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


def collect_share(engine: ZeroEngine, ema: ShardedEMA, extra: dict[str, Any]) -> checkpoint.RankShare:
    """This rank's part of everything that a checkpoint holds."""
    moments = {name: engine.read_moments(name) for name in MOMENTS}
    averages = {f"ema/{name}": shards for name, shards in ema.shards.items()}
    segments = [flat.segments for flat in engine.partition.flats]
    if engine.partition.replicated and engine.group.rank > 0:
        segments = [() for _ in segments]  # rank 0 saves for all
    return checkpoint.RankShare(segments, {"master": engine.masters, **moments, **averages}, extra)


def measure_sizes(
    engine: ZeroEngine, ema: ShardedEMA, share: checkpoint.RankShare, activations: int | None
) -> dict[str, float]:
    """Sizes under the names of the plan's predictions: the largest rank's bytes, all ranks' checkpoint. Collective."""
    group, sizes = engine.group, engine.count_bytes_by_category()
    if activations is not None:
        sizes["activations"] = activations
    sizes["ema"] = sum(x.numel() * x.element_size() for shards in ema.shards.values() for x in shards)
    numel = sum(s.numel for parts in share.segments for s in parts)
    [total] = group.sum([float(numel * 4 * len(share.tensors))])
    largest = group.max([float(size) for size in sizes.values()])
    parameters = engine.describe()["parameters"]
    named = {f"bytes_per_rank/{name}": size for name, size in zip(sizes, largest)}
    return {"parameters": float(parameters), "checkpoint_bytes": total, **named}


@dataclass(frozen=True)
class Saver:
    """Writes what a run leaves behind at each save: exported weights, result rows, a checkpoint."""

    engine: ZeroEngine
    ema: ShardedEMA
    run_log: RunLog
    uploads: Uploads
    info: DatasetInfo
    init_from: str | None = None
    """The frozen weights under adapters: exports are merged into them, checkpoints hold the adapters alone."""

    def save(self, state: TrainingState, *, final: bool, activations: int | None = None) -> bool:
        """False when something could not be written. Collective.

        On S3 a checkpoint is uploaded while training continues, one at a time; a `final` one is waited for.
        `activations`: bytes that a forward pass keeps, where they were counted.
        """
        group = self.engine.group
        if final:
            self.uploads.wait()
        elif group.any(self.uploads.busy):
            if group.rank == 0:
                step, out = name_step(state.step), self.uploads.out
                log.warning("%s is skipped: the checkpoint before it still travels to %s", step, out)
            return True
        exported = self._export(state)
        share = collect_share(self.engine, self.ema, {"exceptions": to_json(state.exceptions)})
        self.run_log.add_costs(**measure_sizes(self.engine, self.ema, share, activations))
        if not self.uploads.remote:
            return self._write(share, state) and exported
        if not self._upload(share, state):
            return False
        return exported and (self.uploads.wait() if final else True)

    def _export(self, state: TrainingState) -> bool:
        """EMA weights, a copy of them that stays, and raw weights; False when that failed. Collective."""
        engine, folder = self.engine, storage.join(self.uploads.place, "weights")
        ema_uris = [
            storage.join(folder, name_step(state.step), "ema.safetensors"),
            storage.join(folder, "ema.safetensors"),
        ]
        raw_uris = [storage.join(folder, "raw.safetensors")]
        exported = True
        for kind, tensors, uris in (("ema", self.ema.first, ema_uris), ("raw", engine.masters, raw_uris)):
            meta = describe_weights(
                engine.recipe, self.info, kind=kind, images_seen=state.images_seen, run=self.run_log.run
            )
            exported &= export(engine, tensors, uris, meta, engine.group, base=self.init_from)
        return exported

    def _write(self, share: checkpoint.RankShare, state: TrainingState) -> bool:
        """Result rows and a checkpoint straight into the run folder. Collective."""
        group, keep = self.engine.group, self.engine.recipe.logging.keep
        flushed = self._flush()
        root, kept = get_checkpoints_folder(self.uploads.out), self._describe(state)
        if not checkpoint.save(root, share, group, step=state.step, state=kept, keep=keep):
            self._warn_not_saved(state)
            return False
        if group.rank == 0:
            log.info("%s", _describe_save(state))
            report_saved(state.step)
        return not group.any(not flushed)

    def _upload(self, share: checkpoint.RankShare, state: TrainingState) -> bool:
        """Stage a checkpoint on a local disk and start sending it; False when it could not be staged. Collective."""
        root, keep = get_checkpoints_folder(self.uploads.out), self.engine.recipe.logging.keep
        staged = get_checkpoints_folder(self.uploads.place)
        manifest = checkpoint.write(staged, share, self.engine.group, step=state.step, state=self._describe(state))
        if manifest is None:
            self._warn_not_saved(state)
            return False
        step, saved = state.step, _describe_save(state)  # as of now: the state moves on while files travel

        def publish() -> None:
            checkpoint.publish(root, manifest, keep=keep)
            log.info("%s", saved)
            report_saved(step)

        self.uploads.start([lambda: checkpoint.withdraw(root, step), self.run_log.flush], publish)
        return True

    def _describe(self, state: TrainingState) -> dict[str, Any]:
        """What the manifest says of the run."""
        engine = self.engine
        return {
            "images_seen": state.images_seen,
            "adam_steps": engine.adam_steps,
            "seconds": self.run_log.seconds,
            "recipe": engine.recipe.to_json(),
            "recipe_hash": engine.recipe.hash,
            "recent": list(state.recent),  # a manifest is written later, when the loop may have gone on
            "skips": state.skips,
        }

    def _flush(self) -> bool:
        try:
            self.run_log.flush()
        except (UserError, OSError) as error:
            log.warning("results not written yet: %s", error)
            return False
        return True

    def _warn_not_saved(self, state: TrainingState) -> None:
        if self.engine.group.rank == 0:
            step = name_step(state.step)
            log.warning("checkpoint %s was not saved; the last good one stands, training goes on", step)


def _describe_save(state: TrainingState) -> str:
    return f"saved {name_step(state.step)} at {state.images_seen:,} images"


def restore(
    recipe: Recipe, engine: ZeroEngine, ema: ShardedEMA, *, out: str, resume: str, free: tuple[str, ...] = ()
) -> TrainingState:
    """Load a checkpoint into `engine` and `ema`, on any number of ranks; the run's state. `resume` is latest, none, or
    the folder of a checkpoint; `free` fields of the recipe may differ from the checkpoint's. Collective."""
    group = engine.group
    if resume == "none":
        return TrainingState()
    if resume == "latest":
        found = checkpoint.find_newest(get_checkpoints_folder(out), group)
        if found is None:
            return TrainingState()
    else:
        found = checkpoint.require_whole(resume, group)
    kept = found.state
    checkpoint.check_same_recipe(found.uri, kept, recipe, resume=resume, unknown=free)
    target = collect_share(engine, ema, {})
    target.segments = [flat.segments for flat in engine.partition.flats]
    checkpoint.load(found, target, group)
    engine.set_moments({name: target.tensors[name] for name in MOMENTS}, steps=int(kept["adam_steps"]))
    engine.publish()
    if group.rank == 0:
        log.info("resumed %s at %s images", found.uri, f"{kept['images_seen']:,}")
    # What one rank's reader had to quarantine, all leave out from here on.
    exceptions = DataExceptions()
    for extra in found.extras:
        exceptions |= from_json(DataExceptions, extra["exceptions"], where=f"{found.uri}: exceptions")
    seconds, recent = float(kept["seconds"]), list(kept.get("recent", []))
    return TrainingState(int(kept["images_seen"]), found.step, seconds, exceptions, int(kept.get("skips", 0)), recent)


def load_init(engine: ZeroEngine, uri: str) -> None:
    """Start from exported weights; Adam and the EMA start anew. QK-norms that they lack begin as ones. Collective."""
    engine.load_whole(open_weights(uri, engine.shapes))


def open_feed(recipe: Recipe, dataset: Dataset, group: Group, state: TrainingState) -> Prefetcher:
    """This rank's micro-batches from where the run stands."""
    batches = dataset.batches(
        seed=recipe.seed,
        start=state.step * recipe.global_batch,
        global_batch=recipe.global_batch,
        rank=group.rank,
        world_size=group.world_size,
        caption_weights=choose_caption_weights(recipe.data, dataset),
        encoder_dropout=recipe.data.encoder_dropout,
        exceptions=state.exceptions,
        micro_batch=recipe.parallel.micro_batch,
        read_rejected=RejectedLatents(dataset) if get_objective(recipe.objective).pairs else None,
        dealt=os.environ.get(DEAL_LANES) == "1",
    )
    return Prefetcher(batches, partial(draw_for, recipe), device=group.device)

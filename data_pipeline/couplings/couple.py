"""Makes couplings: which are missing, their shards through workers, then the index and dataset.json.

A shard is the unit of work. The same command again makes only what is missing; a greater --count adds to it.
"""
# Shapes: I couplings, B batch, C latent channels, H and W latent height and width.

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from data_pipeline.couplings.proofs import SetAside, ShardProof, read_shard_proofs, write_shard_proof
from data_pipeline.couplings.teacher import Teacher, TeacherFile
from data_pipeline.formats.couplings import Couplings, CouplingShard, cut_shards, format_key
from data_pipeline.formats.schema import (
    DATASET_FILE,
    DatasetInfo,
    expand_ranges,
    fingerprint,
    read_dataset_info,
    to_ranges,
)
from data_pipeline.loading.collate import DrawSettings
from data_pipeline.loading.couplings import Prompts
from data_pipeline.packing.publish import publish, write_rejected
from data_pipeline.packing.shards import TrainingSample, write_shard
from data_pipeline.stages.stage import OK
from infra import storage
from infra.errors import UserError
from infra.log import Progress
from infra.runner import UnitResult, WorkerPool, WorkUnit, run_tasks
from infra.version import code_version

NOT_FINITE = "not_finite"
SHARD_ROWS = 500


def describe_dataset(couplings: Couplings, teacher: TeacherFile, prompts: Prompts) -> DatasetInfo:
    """dataset.json without its splits; UserError where teacher and prompts do not fit together."""
    info = prompts.dataset.info
    if not info.text_spec.reads_as(teacher.text_spec):
        raise UserError(
            f"{prompts.uri} holds text of another layout or other encoders than the teacher {teacher.uri} was trained "
            "with: give prompts encoded as its training data were, or a file of prompts"
        )
    columns = {name: value for name, value in info.columns.items() if name.startswith("text_")}
    return DatasetInfo(
        teacher.text_spec, teacher.vae, teacher.resolution, info.captions,
        columns | {"latents": fingerprint(couplings.identity)}, {}, int8_seats=info.int8_seats,
        settings={name: info.settings[name] for name in columns if name in info.settings}
        | {"latents": couplings.identity},
        code_version=code_version(), couplings=couplings,
    )  # fmt: skip


def check_out(out: str, couplings: Couplings) -> None:
    """Refuse a root that holds something else."""
    if not storage.exists(storage.join(out, DATASET_FILE)):
        return
    existing = read_dataset_info(out).couplings
    if existing is None:
        raise UserError(f"{out} holds a data set that is no couplings: choose another --out")
    changed = existing.differences(couplings)
    if changed:
        raise UserError(f"{out} holds other couplings ({'; '.join(changed)}): choose another --out or the same options")
    num_old = existing.count
    if num_old > couplings.count:
        raise UserError(f"{out} holds {num_old:,} couplings, --count is {couplings.count:,}: give at least as many")


def list_shards(couplings: Couplings, prompts: Prompts, *, shard_rows: int) -> list[CouplingShard]:
    """All shards of these couplings; UserError where no coupling would be held out."""
    if couplings.count < couplings.val_every or prompts.dataset.num_samples < couplings.val_every:
        raise UserError(
            f"{couplings.count:,} couplings of {prompts.dataset.num_samples:,} prompts, of which one in "
            f"{couplings.val_every} is held out: none would be; give more, or a smaller --val-every"
        )
    bucket_I = prompts.buckets_of(np.arange(couplings.count))
    return list(cut_shards(prompts.order, couplings.count, bucket_I, shard_rows=shard_rows))


def make_couplings(
    out: str, weights: str, info: DatasetInfo, shards: list[CouplingShard], *, workers: WorkerPool, batch: int,
    device: str,
) -> DatasetInfo:  # fmt: skip
    """Make what is missing, then publish. UserError when a shard failed; what worked is kept."""
    proofs = read_shard_proofs(out, info.encoding)
    todo = [
        {"id": shard.id, "split": shard.split, "bucket": shard.bucket, "index": to_ranges(shard.index_I.tolist())}
        for shard in shards if shard.id not in proofs
    ]  # fmt: skip
    failed: dict[str, str] = {}
    total, lost = sum(len(shard.index_I) for shard in shards), 0
    num_done = sum(len(shard.index_I) for shard in shards if shard.id in proofs)
    with Progress(total, "couplings", desc="couple", initial=num_done) as progress:
        for result in run_tasks(CoupleTask(out, weights, info, batch, device), todo, workers):
            if result["error"]:
                failed[result["id"]] = result["error"]
                if result["fatal"]:
                    break
                continue
            lost += result["set_aside"]
            progress.update(result["rows"], **({NOT_FINITE: lost} if lost else {}))
    if failed:
        name, reason = next(iter(failed.items()))
        raise UserError(
            f"{len(failed)} of {len(todo)} shards failed, first {name}: {reason}; what worked is kept: run the same "
            "command again"
        )
    found = read_shard_proofs(out, info.encoding)
    return _publish(out, info, {shard.id: found[shard.id] for shard in shards})


def _publish(out: str, info: DatasetInfo, proofs: dict[str, ShardProof]) -> DatasetInfo:
    entries = [proof.entry for proof in proofs.values() if proof.entry]
    lost = [(each, shard) for shard, proof in proofs.items() for each in proof.set_aside]
    if not {"train", "val"} <= {entry.tar.split("/", 1)[0] for entry in entries}:
        raise UserError(
            f"{out}: the solver diverged on {len(lost):,} couplings and no split is left: look at the teacher, or take "
            "more --steps"
        )
    table = pa.table(
        {
            "status": pa.array([NOT_FINITE] * len(lost), pa.string()),
            "reason": pa.array([each.reason for each, _ in lost], pa.string()),
            "source": pa.array([format_key(each.index) for each, _ in lost], pa.string()),
            "shard": pa.array([shard for _, shard in lost], pa.string()),
            "row": pa.array([each.index for each, _ in lost], pa.int64()),
        }
    )
    counts = Counter({OK: sum(entry.num_samples for entry in entries)}) + Counter({NOT_FINITE: len(lost)})
    return publish(out, info, entries, counts, rejected=write_rejected(out, [table]) if lost else "")


@dataclass(frozen=True)
class CoupleTask:
    """The couplings of one shard."""

    root: str
    weights: str
    info: DatasetInfo
    batch: int
    device: str

    def open(self) -> Callable[[WorkUnit], UnitResult]:
        from infra.device import resolve_device

        info, couplings = self.info, self.info.couplings
        assert couplings is not None
        teacher = Teacher(self.weights, couplings, device=resolve_device(self.device))
        prompts = Prompts(self.root, couplings)

        def run(unit: WorkUnit) -> UnitResult:
            index_I, aside = np.array(expand_ranges(unit["index"])), list[SetAside]()
            layout = info.layout(unit["bucket"])
            samples = list(_solve(index_I, aside, teacher, prompts, info, layout.moments_shape, self.batch))
            entry = None
            if samples:
                entry = write_shard(self.root, samples, split=unit["split"], resolution=info.resolution,
                                    bucket=unit["bucket"], layout=layout, encoding=info.encoding)  # fmt: skip
            write_shard_proof(self.root, info.encoding, unit["id"], entry=entry, set_aside=aside)
            return {"rows": len(index_I), "set_aside": len(aside)}

        return run


def _solve(
    index_I: np.ndarray,
    aside: list[SetAside],
    teacher: Teacher,
    prompts: Prompts,
    info: DatasetInfo,
    shape: tuple[int, int, int],
    batch: int,
) -> Iterator[TrainingSample]:
    """Samples of those that the solver brought to finite latents; the others go to `aside`."""
    couplings = info.couplings
    assert couplings is not None
    draws = DrawSettings(couplings.seed, couplings.captions, 0.0)
    for first in range(0, len(index_I), batch):
        index_B = index_I[first : first + batch]
        names = prompts.choose_captions(index_B)
        text, words = prompts.read(index_B, names, index_B, draws)
        latent_BCHW = teacher.solve(couplings.draw_noise(index_B.tolist(), shape), text)
        raw_BCHW = info.vae.denormalise(latent_BCHW).half()
        finite_B = torch.isfinite(raw_BCHW).flatten(1).all(1).tolist()
        for index, name, caption, raw_CHW, finite in zip(index_B.tolist(), names, words, raw_BCHW, finite_B):
            if not finite:
                aside.append(SetAside(index, "the solver gave numbers that are not finite in fp16"))
                continue
            number = int(prompts.order.prompts_of(np.array([index]))[0])
            yield TrainingSample(format_key(index), raw_CHW.numpy(), {}, {name: caption}, {"prompt": number})

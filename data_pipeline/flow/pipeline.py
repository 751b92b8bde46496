"""The whole flow for one plan, source and root: ingest, dedup, columns, pack. Each step does only what is missing.

The driver keeps the parts of each shard, the status and the hash of each row on scratch disk (`stages/scratch_db.py`,
`infra/scratch.py`): its memory does not grow with rows or shards, but for a list of the source's files and one of the
training shards.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, groupby, islice
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipeline.captions.stage import MAX_CHARS, CaptionStage
from data_pipeline.curation.filters import judge_strictly, select_ok
from data_pipeline.curation.scores import ScoreStage
from data_pipeline.flow.jobs import JobRunner
from data_pipeline.flow.plan_mismatch import check_rebuild
from data_pipeline.flow.tasks import ColumnTask, IngestTask, PackTask
from data_pipeline.formats.index import ShardEntry
from data_pipeline.formats.layout import SampleLayout
from data_pipeline.formats.schema import DatasetInfo, Manifest, fingerprint_all, to_ranges
from data_pipeline.loading.taken_down import Takedown, list_takedowns
from data_pipeline.packing.generations import PublishedShards, keep_published, read_published
from data_pipeline.packing.pack import (
    PackPlan,
    PlannedShard,
    find_lost_shards,
    plan_shards,
    read_proofs,
    write_pack_plan,
)
from data_pipeline.packing.publish import assign_splits, draw_split_number, make_rejected_table, publish, write_rejected
from data_pipeline.packing.selections import RowSelection, RowSelections
from data_pipeline.packing.shards import bound_sample_bytes
from data_pipeline.plans import DatasetPlan, build_columns, read_vae_meta
from data_pipeline.selection.takedown import judge_taken_down
from data_pipeline.sources.seen import Seen, format_seen
from data_pipeline.sources.source import Source
from data_pipeline.stages.column_state import ColumnState
from data_pipeline.stages.columns import Column
from data_pipeline.stages.row_status import RowStatuses, count_by_status, ok_rows, override_statuses, status_table
from data_pipeline.stages.scratch_db import WorkList
from data_pipeline.stages.stage import OK, Stage
from infra import storage
from infra.codec import from_json
from infra.errors import UserError
from infra.log import get_logger
from infra.runner import WorkerPool, WorkUnit
from infra.version import code_version

log = get_logger("pipeline")

_DEDUP_SHARDS = 100  # that a manifest of the dedup column names


@dataclass
class PipelineResult:
    """The result of a run, for the table at its end."""

    info: DatasetInfo
    counts: dict[str, dict[str, int]]
    rejected: str
    failed: dict[str, str] = field(default_factory=dict)
    computed: dict[str, int] = field(default_factory=dict)
    seen: Mapping[str, int] = field(default_factory=dict)


class Pipeline:
    """One run over a source. `run()` reads top to bottom; `run_gate()` stops before what is expensive."""

    def __init__(
        self,
        plan: DatasetPlan,
        root: str,
        source: Source,
        *,
        workers: WorkerPool,
        caption_workers: WorkerPool | None = None,
        keep_going: bool = False,
        only_split: str | None = None,
        rebuild: Sequence[str] = (),
    ) -> None:
        self.root, self.source = root, source
        self.jobs = JobRunner(workers, keep_going=keep_going)
        self.caption_workers, self.only_split, self.rebuild = caption_workers, only_split, rebuild
        devices = ["cuda" if given.gpus else "cpu" for given in (workers, caption_workers or workers)]
        self.plan = plan
        self.columns = build_columns(plan, root, device=devices[0], caption_device=devices[1])
        self.state = ColumnState(root)
        self.seen = Seen()
        self.strict = RowStatuses(self.state.database)

    def run_gate(self) -> RowStatuses:
        """All cheap work: the status of every row before captions and latents are made."""
        self._ingest()
        self.strict = self._judge_strict()
        self._dedup()
        return self._judge_gate()

    def run(self) -> PipelineResult:
        if published := read_published(self.root):
            check_rebuild(self.root, published, self._describe_dataset(), self.rebuild)
        statuses = self.run_gate()
        self.encode(statuses)
        info, entries = self._pack(self._select_accepted(statuses))
        name = write_rejected(self.root, self._list_rejected(statuses))
        info = publish(self.root, info, entries, count_by_status(statuses), rejected=name)
        rejected = storage.join(self.root, name)
        return PipelineResult(info, self.state.counts, rejected, self.jobs.failed, self.jobs.computed, self.seen)

    def _list_rejected(self, statuses: RowStatuses) -> Iterator[pa.Table]:
        """Rows that are set aside, shard by shard."""
        found = self.state.map_shards(
            lambda shard: make_rejected_table(shard, statuses[shard], self.state.field("measure", shard, "source"))
        )
        return (table for _, table in found)

    # ingest, filter, signature, bucket: one pass over the source

    def _ingest(self) -> None:
        listed = self.source.list_units()
        units = [unit for unit in listed if self.only_split in (None, unit.split)]
        if not listed:
            raise UserError("the source holds no rows: nothing to do")
        if not units:
            raise UserError(f"the source has no split {self.only_split!r}: omit --split, or name another")
        ingest, column = self.columns.ingest
        split_of, shards_of = {unit.id: unit.split for unit in units}, self.state.database.new_map("unit")
        for unit, (manifest, *_) in groupby(self.state.manifests(column), lambda manifest: manifest.unit):
            if unit in split_of:
                self._record(manifest, split_of[unit])
                shards_of[unit,] = json.dumps([part.shard for part in manifest.parts]).encode()
        for _, light in self.columns.light:
            self.state.record_column(light, first=True)
        todo = WorkList(rows_known=False)
        for unit in units:
            known = (unit.id,) in shards_of
            shards = json.loads(shards_of[unit.id,]) if known else []
            if not known or not self._is_complete(shards):
                parts = {shard: self.state.describe_parts(shard) for shard in shards}
                todo.add({"id": unit.id, "split": unit.split, "where": unit.where, "known": parts})
        task = IngestTask(self.root, self.source, ingest, column, self.columns.light)
        for result in self.jobs.run_pass("ingest + measure + filter", task, todo):
            for manifest in from_json(list[Manifest], result["manifests"], where=result["id"]):
                self._record(manifest, result["split"])
        for shard in self.state.shards() if self.jobs.failed else ():
            if not self._is_complete([shard]):  # ingested by an earlier run, and its unit failed again
                self.state.remove_shard(shard)
        if not len(self.state):
            raise UserError(f"the source gave no rows in {len(units)} files: nothing to do")
        log.info("source: %s", "; ".join(format_seen(self.seen, self.state.counts["ingest"])))

    def _record(self, manifest: Manifest, split: str) -> None:
        self.state.record(manifest)
        self.seen.update(manifest.seen)
        for part in manifest.parts if manifest.stage == "ingest" else ():
            self.state.add_shard(part.shard, split)

    def _is_complete(self, shards: Sequence[str]) -> bool:
        """Have these shards all their light columns?"""
        return all(self.state.has(column.stage, shard) for _, column in self.columns.light for shard in shards)

    # dedup: one pass over all signatures

    def _dedup(self) -> None:
        stage, column = self.columns.dedup
        read: Iterable[object] = (
            [part.sha256 for name in stage.inputs for part in self.state.parts(name, shard)]
            for shard in self._iterate_by_precedence()
        )
        # of equal images one that will pass the strict thresholds stays, not one that only passed the gate
        preferring = len(self.strict) > 0
        unit = fingerprint_all(chain(read, [self.plan.strict.identity()]) if preferring else read)
        if self._reuse_dedup(column, unit):
            return
        made = stage.run(
            self.state.map_shards(self._read_signatures, self._iterate_by_precedence()),
            load=partial(self.state.read, "embed"),
            preferred=(lambda shard: ok_rows(self.strict[shard])) if preferring else None,
        )
        tables, length = made.iterate_tables(), max(1, -(-made.num_shards // _DEDUP_SHARDS))
        # parts of a series have one digest: two drivers that found different answers do not mix
        series = f"{unit}-{made.compute_digest()}-{length}"
        for number in range(length):
            name = unit if length == 1 else f"{series}-{number:06d}"
            self.state.record(column.write(name, islice(tables, _DEDUP_SHARDS)))
        self.jobs.computed["dedup"] = len(made)

    def _iterate_by_precedence(self) -> Iterator[str]:
        """Validation first: of two equal images the one that must not be trained on stays."""
        for val in (True, False):
            for shard in self.state.shards():
                if (self.state.split(shard) == "val") == val and self.state.has("signature", shard):
                    yield shard

    def _reuse_dedup(self, column: Column, unit: str) -> bool:
        """Takes what was found among the same signatures: one manifest, or a series that is whole."""
        series = Counter(manifest.unit.rpartition("-")[0] for manifest in self.state.manifests(column, prefix=unit))
        for name, count in sorted(series.items()):
            if not name or count == int(name.rpartition("-")[2]):
                self.state.record_column(column, prefix=f"{name}-" if name else f"{unit}.", first=True)
                return True
        return False

    def _read_signatures(self, shard: str) -> pa.Table:
        """The signatures of those rows of a shard that passed the filter."""
        table = self.state.read("signature", shard, ["row", "exact", "perceptual"])
        return select_ok(table, self.state.status("filter", shard))

    def _judge_strict(self) -> RowStatuses:
        """Statuses of the rows by the strict thresholds; empty if the gate has the same thresholds."""
        strict, found = self.plan.strict, RowStatuses(self.state.database)
        if strict.loosen(self.plan.gate) == strict:
            return found

        def judge(shard: str) -> pa.Table:
            scores = {name: self.state.read(name, shard) for name in strict.scorers}
            return judge_strictly(strict, self.state.read("measure", shard), scores)

        found.update(self.state.map_shards(judge))
        return found

    def _judge_gate(self) -> RowStatuses:
        """Statuses of the rows by filter, dedup and takedowns together."""
        found, of, takedowns = RowStatuses(self.state.database), self.state.status, list_takedowns(self.root)

        def judge(shard: str) -> pa.Table:
            judged = override_statuses(of("filter", shard), of("dedup", shard))
            return override_statuses(judged, self._find_taken_down(shard, takedowns)) if takedowns else judged

        found.update(self.state.map_shards(judge))
        return found

    def _find_taken_down(self, shard: str, takedowns: Sequence[Takedown]) -> pa.Table:
        signatures = self.state.read("signature", shard) if self.state.has("signature", shard) else None
        rows = judge_taken_down(takedowns, self.state.read("measure", shard), signatures)
        return status_table(rows, ["taken_down"] * len(rows), ["its key or hash is listed below takedown/"] * len(rows))

    # captions, latents, text features: only rows that passed

    def encode(self, statuses: RowStatuses) -> None:
        """Compute captions, latents and text features of the rows that passed, in one pass, so that each image is
        decoded once. Captioners with workers of their own have a pass each before."""
        heavy, captioners = self.columns.heavy, self.plan.captioners
        environments = [spec.runtime_env() for spec in captioners.values()]
        if self.caption_workers is None and not any(environments):
            self._encode(heavy, statuses, self.jobs.workers)
            return
        for pair, environment in zip(heavy, environments):  # captions come first among the heavy columns
            self._encode((pair,), statuses, self.caption_workers or self.jobs.workers, environment)
        self._encode(heavy[len(captioners) :], statuses, self.jobs.workers)

    def _encode(
        self,
        pairs: tuple[tuple[Stage, Column], ...],
        statuses: RowStatuses,
        workers: WorkerPool,
        environment: Mapping[str, Any] | None = None,
    ) -> None:
        stages = [column.stage for _, column in pairs]
        for _, column in pairs:
            self.state.record_column(column)
        todo = WorkList()
        for shard, judged in statuses.items():
            rows = ok_rows(judged)
            lacking = {stage: np.setdiff1d(rows, self.state.rows_done(stage, shard)) for stage in stages}
            missing = {stage: to_ranges(found.tolist()) for stage, found in lacking.items() if len(found)}
            if missing:
                unit = {"id": shard, "shard": shard, "missing": missing, "parts": self.state.describe_parts(shard)}
                todo.add(unit, max(map(len, lacking.values())))
        task, title = ColumnTask(self.root, pairs), " + ".join(stages)
        for result in self.jobs.run_pass(title, task, todo, workers=workers, environment=environment):
            for manifest in from_json(list[Manifest], result["manifests"], where=result["id"]):
                self.state.record(manifest)

    def _select_accepted(self, statuses: RowStatuses) -> RowSelections:
        """Rows that go into training shards, in a fixed order; `statuses` learn why others do not."""
        undecided, accepted = RowSelections(self.state.database), RowSelections(self.state.database)
        judged = self.state.map_shards(lambda shard: self._judge_shard(shard, statuses[shard]))
        for shard, (changed, selections) in judged:
            if changed is not None:
                statuses[shard] = changed
            for selection in selections:
                undecided.put(selection)
        if not undecided:
            bad = {name: n for counts in self.state.counts.values() for name, n in counts.items() if name != OK}
            first = next(row for table in self._list_rejected(statuses) for row in table.slice(0, 1).to_pylist())
            listed = storage.join(self.root, write_rejected(self.root, self._list_rejected(statuses)))
            total = sum(map(len, statuses.values()))
            raise UserError(
                f"no usable row among {total}: {_format_counts(bad)}, e.g. {first['source']} "
                f"({first['reason']}); all are listed in {listed}: mend them or add a --source"
            )
        for selection in assign_splits(undecided, self.plan.val_fraction):
            accepted.put(selection)
        return accepted

    def _judge_shard(self, shard: str, before: pa.Table) -> tuple[pa.Table | None, list[RowSelection]]:
        """The final status of a shard's rows (None: as before), and the rows that are ok, by bucket."""
        judged = override_statuses(before, self.strict[shard]) if shard in self.strict else before
        may_lack = CaptionStage | ScoreStage  # a row trains without them
        for name in (column.stage for stage, column in self.columns.heavy if not isinstance(stage, may_lack)):
            judged = override_statuses(judged, self._find_failures(name, shard, judged))
        return judged if judged is not before else None, self._group_rows(shard, ok_rows(judged))

    def _find_failures(self, stage: str, shard: str, judged: pa.Table) -> pa.Table:
        """Rows that were ok until an encoder gave nothing for them, or nonsense."""
        lost = np.setdiff1d(ok_rows(judged), self.state.rows_done(stage, shard)).tolist()
        failures = [(row, "failed", f"{stage}: {self.jobs.failed.get(shard, 'no result')}") for row in lost]
        if self.state.has_bad_rows(stage, shard):
            table = self.state.read(stage, shard)
            rows = zip(table["row"].to_pylist(), table["status"].to_pylist())
            failures += [(row, word, f"{stage} gave values that are no numbers") for row, word in rows if word != OK]
        return status_table(*zip(*failures)) if failures else status_table([], [], [])

    def _group_rows(self, shard: str, rows: np.ndarray) -> list[RowSelection]:
        """A shard's rows by bucket, each with the number that decides its split where the source has none."""
        if not len(rows):
            return []
        split = self.state.split(shard)
        bucket_of = self.state.field("bucket", shard, "bucket")
        exact = {} if split else self.state.field("signature", shard, "exact")
        name_R = np.array([bucket_of[row] for row in rows.tolist()])
        draw_R = np.array([draw_split_number(exact[row]) if exact else 0 for row in rows.tolist()], np.uint32)
        everything = RowSelection(shard, split, "", rows, draw_R)
        return [replace(everything.subset(name_R == name), bucket=str(name)) for name in np.unique(name_R)]

    # pack and publish

    def _describe_dataset(self) -> DatasetInfo:
        """dataset.json as far as the plan decides it."""
        return DatasetInfo(
            text_spec=self.plan.text_spec,
            vae=read_vae_meta(self.plan.vae),
            resolution=self.plan.resolution,
            captions=("original", *self.plan.captioners),
            columns=self.columns.fingerprints,
            splits={},
            counts=_flatten_counts(self.state.counts),
            code_version=code_version(),
            int8_seats=self.plan.int8_seats,
            settings=self.columns.settings,
        )

    def _pack(self, accepted: RowSelections) -> tuple[DatasetInfo, list[ShardEntry]]:
        info = self._describe_dataset()
        proofs = read_proofs(self.root, info.encoding)
        lost = find_lost_shards(self.root, proofs)
        full = {bucket: self._limit_rows(info.layout(bucket)) for bucket in accepted.buckets}
        published, plan, todo = PublishedShards(self.root, info), PackPlan(self.state.database), WorkList()
        kept = keep_published(accepted, published.list_full_shards(proofs, shard_rows=full))
        # lazy, so in this order: what is kept leaves `accepted` before the rest is cut into new shards
        for output in chain(kept, plan_shards(accepted, {"encoding": info.encoding}, shard_rows=full)):
            plan.add(output)
            if output.id not in proofs or output.id in lost:
                todo.add(self._pack_unit(output), output.num_rows)
        # sorted by id, whichever of them are published already: the same plan has the same name
        write_pack_plan(self.root, plan)
        for result in self.jobs.run_pass("pack", PackTask(self.root, info), todo):
            proofs[result["id"]] = from_json(ShardEntry, result["entry"], where=result["id"])
        entries = [published.number_entry(proofs[name]) for name in plan.list_ids() if name in proofs]
        self.state.counts["pack"] = {OK: sum(entry.num_samples for entry in entries)}
        return info, entries

    def _limit_rows(self, layout: SampleLayout) -> int:
        """So many samples that no shard can grow beyond its bytes, however long texts and captions are."""
        characters = self.plan.max_caption_chars + MAX_CHARS * len(self.plan.captioners)
        largest = bound_sample_bytes(layout, caption_chars=characters)
        return max(1, min(self.plan.pack_rows, self.plan.pack_mb * 2**20 // largest))

    def _pack_unit(self, output: PlannedShard) -> WorkUnit:
        made = (column.stage for stage, column in self.columns.heavy if not isinstance(stage, ScoreStage))
        stages = ["measure", *made]
        found = {shard: self.state.describe_parts(shard) for shard, _ in output.rows}
        parts = {stage: {shard: found[shard][stage] for shard in found} for stage in stages}
        rows = [(shard, to_ranges(rows.tolist())) for shard, rows in output.rows]
        return {"id": output.id, "split": output.split, "bucket": output.bucket, "rows": rows, "parts": parts}


def _flatten_counts(counts: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    return {f"{stage}.{status}": n for stage, found in counts.items() for status, n in found.items()}


def _format_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(counts.items(), key=lambda item: -item[1])) or "none"

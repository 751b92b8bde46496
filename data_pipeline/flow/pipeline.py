"""The whole flow for one plan, source and root: ingest, dedup, columns, pack. Each step does only what is missing.

The driver keeps the parts of each shard, the verdict and the hash of each row on scratch disk (`stages/scratch_db.py`,
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

from data_pipeline.captions.stage import MAX_CHARS
from data_pipeline.curation.gate import judge_strictly, select_ok
from data_pipeline.flow.jobs import JobRunner
from data_pipeline.flow.plan_mismatch import check_rebuild
from data_pipeline.flow.tasks import ColumnTask, IngestTask, PackTask
from data_pipeline.formats.index import ShardEntry
from data_pipeline.formats.layout import SampleLayout
from data_pipeline.formats.schema import DatasetInfo, Manifest, fingerprint_all, to_ranges
from data_pipeline.packing.generations import PublishedShards, keep_published, read_published
from data_pipeline.packing.pack import (
    CAPTIONS,
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
from data_pipeline.sources.source import Source
from data_pipeline.stages.column_state import ColumnState
from data_pipeline.stages.columns import Column
from data_pipeline.stages.row_status import RowStatuses, count_by_status, ok_rows, override_statuses, status_table
from data_pipeline.stages.scratch_db import WorkList
from data_pipeline.stages.stage import OK, Stage
from infra import storage
from infra.codec import from_json, to_json
from infra.errors import UserError
from infra.runner import WorkerPool, WorkUnit
from infra.version import code_version

_DEDUP_SHARDS = 100  # that a manifest of the dedup column names


@dataclass
class PipelineResult:
    """What a run found and made, for the final table."""

    info: DatasetInfo
    counts: dict[str, dict[str, int]]
    rejected: str
    failed: dict[str, str] = field(default_factory=dict)
    computed: dict[str, int] = field(default_factory=dict)


class Pipeline:
    """One run. `run()` reads top to bottom."""

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
        self.strict = RowStatuses(self.state.database)

    def run_gate(self) -> RowStatuses:
        """Everything that is cheap: the verdict on every row before captions and latents are made."""
        self._ingest()
        self.strict = self._strict()
        self._dedup()
        return self._gate()

    def run(self) -> PipelineResult:
        if stands := read_published(self.root):
            check_rebuild(self.root, stands, self._described(), self.rebuild)
        verdicts = self.run_gate()
        self.encode(verdicts)
        runs = self._accepted(verdicts)
        info, entries = self._pack(runs)
        name = write_rejected(self.root, self._dead(verdicts))
        info = publish(self.root, info, entries, count_by_status(verdicts), rejected=name)
        rejected = storage.join(self.root, name)
        return PipelineResult(info, self.state.counts, rejected, self.jobs.failed, self.jobs.computed)

    def _dead(self, verdicts: RowStatuses) -> Iterator[pa.Table]:
        """Rows that are set aside, shard by shard."""
        found = self.state.map_shards(
            lambda shard: make_rejected_table(shard, verdicts[shard], self.state.field("measure", shard, "source"))
        )
        return (table for _, table in found)

    # --- ingest, filter, signature, bucket: one pass over the source

    def _ingest(self) -> None:
        units = [unit for unit in self.source.list_units() if self.only_split in (None, unit.split)]
        if not units:
            raise UserError(f"the source has no split {self.only_split!r}: omit --split, or name another")
        ingest, column = self.columns.ingest
        split_of, shards_of = {unit.id: unit.split for unit in units}, self.state.database.new_map("unit")
        for unit, (manifest, *_) in groupby(self.state.manifests(column), lambda manifest: manifest.unit):
            if unit in split_of:
                self._take(manifest, split_of[unit])
                shards_of[unit,] = json.dumps([part.shard for part in manifest.parts]).encode()
        for _, light in self.columns.light:
            self.state.record_column(light, first=True)
        todo = WorkList(rows_known=False)
        for unit in units:
            known = (unit.id,) in shards_of
            shards = json.loads(shards_of[unit.id,]) if known else []
            if not known or not self._complete(shards):
                todo.add({**to_json(unit), "known": {shard: self.state.describe_parts(shard) for shard in shards}})
        task = IngestTask(self.root, self.source, ingest, column, self.columns.light)
        for result in self.jobs.run_pass("ingest + measure + filter", task, todo):
            for manifest in from_json(list[Manifest], result["manifests"], where=result["id"]):
                self._take(manifest, result["split"])
        for shard in self.state.shards() if self.jobs.failed else ():
            if not self._complete([shard]):  # ingested by an earlier run, and its unit failed again
                self.state.remove_shard(shard)
        if not len(self.state):
            raise UserError(f"the source gave no rows in {len(units)} files: nothing to do")

    def _take(self, manifest: Manifest, split: str) -> None:
        self.state.record(manifest)
        for part in manifest.parts if manifest.stage == "ingest" else ():
            self.state.add_shard(part.shard, split)

    def _complete(self, shards: Sequence[str]) -> bool:
        """Have these shards all their light columns?"""
        return all(self.state.has(column.stage, shard) for _, column in self.columns.light for shard in shards)

    # --- dedup: one pass over all signatures

    def _dedup(self) -> None:
        stage, column = self.columns.dedup
        found: Iterable[object] = (
            [part.sha256 for name in stage.inputs for part in self.state.parts(name, shard)]
            for shard in self._in_precedence()
        )
        # of equal images one that will pass the strict thresholds stays, not one that only passed the gate
        preferring = len(self.strict) > 0
        unit = fingerprint_all(chain(found, [self.plan.strict.identity()]) if preferring else found)
        if self._known_dedup(column, unit):
            return
        made = stage.run(
            self.state.map_shards(self._signatures, self._in_precedence()),
            load=partial(self.state.read, "embed"),
            preferred=(lambda shard: ok_rows(self.strict[shard])) if preferring else None,
        )
        tables, length = made.tables(), max(1, -(-made.num_shards // _DEDUP_SHARDS))
        # parts of a series have one digest: two drivers that found different answers do not mix
        series = f"{unit}-{made.digest()}-{length}"
        for number in range(length):
            name = unit if length == 1 else f"{series}-{number:06d}"
            self.state.record(column.write(name, islice(tables, _DEDUP_SHARDS)))
        self.jobs.computed["dedup"] = len(made)

    def _in_precedence(self) -> Iterator[str]:
        """Validation first: of two equal images the one that must not be trained on stays."""
        for val in (True, False):
            for shard in self.state.shards():
                if (self.state.split(shard) == "val") == val and self.state.has("signature", shard):
                    yield shard

    def _known_dedup(self, column: Column, unit: str) -> bool:
        """Takes what was found among the same signatures: one manifest, or a series that is whole."""
        series = Counter(manifest.unit.rpartition("-")[0] for manifest in self.state.manifests(column, prefix=unit))
        for name, count in sorted(series.items()):
            if not name or count == int(name.rpartition("-")[2]):
                self.state.record_column(column, prefix=f"{name}-" if name else f"{unit}.", first=True)
                return True
        return False

    def _signatures(self, shard: str) -> pa.Table:
        """Of rows that passed the filter."""
        table = self.state.read("signature", shard, ["row", "exact", "perceptual"])
        return select_ok(table, self.state.status("filter", shard))

    def _strict(self) -> RowStatuses:
        """What the strict thresholds say, where the gate is looser."""
        strict, found = self.plan.strict, RowStatuses(self.state.database)
        if self.plan.gate.thresholds(strict) == strict:
            return found

        def judge(shard: str) -> pa.Table:
            scores = {name: self.state.read(name, shard) for name in strict.scorers}
            return judge_strictly(strict, self.state.read("measure", shard), scores)

        found.update(self.state.map_shards(judge))
        return found

    def _gate(self) -> RowStatuses:
        """What filter and dedup say."""
        found, of = RowStatuses(self.state.database), self.state.status
        found.update(self.state.map_shards(lambda shard: override_statuses(of("filter", shard), of("dedup", shard))))
        return found

    # --- captions, latents, text features: only rows that passed

    def encode(self, verdicts: RowStatuses) -> None:
        """In one pass, so that images are decoded once; a captioner with workers of its own goes first."""
        heavy, environment = self.columns.heavy, self.plan.captioner.runtime_env()
        if self.caption_workers is None and environment is None:
            self._encode(heavy, verdicts, self.jobs.workers)
            return
        self._encode(heavy[:1], verdicts, self.caption_workers or self.jobs.workers, environment)
        self._encode(heavy[1:], verdicts, self.jobs.workers)

    def _encode(
        self,
        pairs: tuple[tuple[Stage, Column], ...],
        verdicts: RowStatuses,
        workers: WorkerPool,
        environment: Mapping[str, Any] | None = None,
    ) -> None:
        stages = [column.stage for _, column in pairs]
        for _, column in pairs:
            self.state.record_column(column)
        todo = WorkList()
        for shard, verdict in verdicts.items():
            rows = ok_rows(verdict)
            lacking = {stage: np.setdiff1d(rows, self.state.rows_done(stage, shard)) for stage in stages}
            missing = {stage: to_ranges(found.tolist()) for stage, found in lacking.items() if len(found)}
            if missing:
                unit = {"id": shard, "shard": shard, "missing": missing, "parts": self.state.describe_parts(shard)}
                todo.add(unit, max(map(len, lacking.values())))
        task, title = ColumnTask(self.root, pairs), " + ".join(stages)
        for result in self.jobs.run_pass(title, task, todo, workers=workers, environment=environment):
            for manifest in from_json(list[Manifest], result["manifests"], where=result["id"]):
                self.state.record(manifest)

    def _accepted(self, verdicts: RowStatuses) -> RowSelections:
        """Rows that go into training shards, in a fixed order; `verdicts` learn why others do not."""
        undecided, runs = RowSelections(self.state.database), RowSelections(self.state.database)
        for shard, (changed, mine) in self.state.map_shards(lambda shard: self._judged(shard, verdicts[shard])):
            if changed is not None:
                verdicts[shard] = changed
            for run in mine:
                undecided.put(run)
        if not undecided:
            bad = {name: n for counts in self.state.counts.values() for name, n in counts.items() if name != OK}
            first = next(row for table in self._dead(verdicts) for row in table.slice(0, 1).to_pylist())
            listed = storage.join(self.root, write_rejected(self.root, self._dead(verdicts)))
            raise UserError(
                f"no usable row among {sum(map(len, verdicts.values()))}: {_words(bad)}, e.g. {first['source']} "
                f"({first['reason']}); all are listed in {listed}: mend them or add a --source"
            )
        for run in assign_splits(undecided, self.plan.val_fraction):
            runs.put(run)
        return runs

    def _judged(self, shard: str, before: pa.Table) -> tuple[pa.Table | None, list[RowSelection]]:
        """The final verdict on a shard's rows (None: as before), and the runs of rows that pass it."""
        verdict = override_statuses(before, self.strict[shard]) if shard in self.strict else before
        for stage in (column.stage for _, column in self.columns.heavy if column.stage != "caption"):
            verdict = override_statuses(verdict, self._shortcomings(stage, shard, verdict))
        return verdict if verdict is not before else None, self._runs(shard, ok_rows(verdict))

    def _shortcomings(self, stage: str, shard: str, verdict: pa.Table) -> pa.Table:
        """Rows that were ok until an encoder gave nothing for them, or nonsense."""
        lost = np.setdiff1d(ok_rows(verdict), self.state.rows_done(stage, shard)).tolist()
        said = [(row, "failed", f"{stage}: {self.jobs.failed.get(shard, 'no result')}") for row in lost]
        if self.state.has_bad_rows(stage, shard):
            table = self.state.read(stage, shard)
            rows = zip(table["row"].to_pylist(), table["status"].to_pylist())
            said += [(row, word, f"{stage} gave values that are no numbers") for row, word in rows if word != OK]
        return status_table(*zip(*said)) if said else status_table([], [], [])

    def _runs(self, shard: str, rows: np.ndarray) -> list[RowSelection]:
        """A shard's rows by bucket, each with the number that decides its split where the source has none."""
        if not len(rows):
            return []
        split = self.state.split(shard)
        bucket_of = self.state.field("bucket", shard, "bucket")
        exact = {} if split else self.state.field("signature", shard, "exact")
        name_R = np.array([bucket_of[row] for row in rows.tolist()])
        draw_R = np.array([draw_split_number(exact[row]) if exact else 0 for row in rows.tolist()], np.uint32)
        run = RowSelection(shard, split, "", rows, draw_R)
        return [replace(run.subset(name_R == name), bucket=str(name)) for name in np.unique(name_R)]

    # --- pack and publish

    def _described(self) -> DatasetInfo:
        """dataset.json as far as the plan decides it."""
        return DatasetInfo(
            text_spec=self.plan.text_spec,
            vae=read_vae_meta(self.plan.vae),
            resolution=self.plan.resolution,
            captions=CAPTIONS,
            columns=self.columns.fingerprints,
            splits={},
            counts=_totals(self.state.counts),
            code_version=code_version(),
            int8_seats=self.plan.int8_seats,
            settings=self.columns.settings,
        )

    def _pack(self, runs: RowSelections) -> tuple[DatasetInfo, list[ShardEntry]]:
        info = self._described()
        proofs = read_proofs(self.root, info.encoding)
        lost = find_lost_shards(self.root, proofs)
        full = {bucket: self._shard_rows(info.layout(bucket)) for bucket in runs.buckets}
        stands, outputs, todo = PublishedShards(self.root, info), PackPlan(self.state.database), WorkList()
        kept = keep_published(runs, stands.full_shards(proofs, shard_rows=full))
        # what is kept leaves the runs before the rest is cut
        for output in chain(kept, plan_shards(runs, {"encoding": info.encoding}, shard_rows=full)):
            outputs.add(output)
            if output.id not in proofs or output.id in lost:
                todo.add(self._pack_unit(output), output.num_rows)
        # In one order, whichever of them are published already: the same plan has the same name.
        write_pack_plan(self.root, outputs)
        for result in self.jobs.run_pass("pack", PackTask(self.root, info), todo):
            proofs[result["id"]] = from_json(ShardEntry, result["entry"], where=result["id"])
        entries = [stands.numbered(proofs[name]) for name in outputs.ids() if name in proofs]
        self.state.counts["pack"] = {OK: sum(entry.num_samples for entry in entries)}
        return info, entries

    def _shard_rows(self, layout: SampleLayout) -> int:
        """So many samples that no shard can grow beyond its bytes, however long texts and captions are."""
        largest = bound_sample_bytes(layout, caption_chars=self.plan.max_caption_chars + MAX_CHARS)
        return max(1, min(self.plan.pack_rows, self.plan.pack_mb * 2**20 // largest))

    def _pack_unit(self, output: PlannedShard) -> WorkUnit:
        stages = ["measure", *(column.stage for _, column in self.columns.heavy)]
        found = {shard: self.state.describe_parts(shard) for shard, _ in output.rows}
        parts = {stage: {shard: found[shard][stage] for shard in found} for stage in stages}
        rows = [(shard, to_ranges(rows.tolist())) for shard, rows in output.rows]
        return {"id": output.id, "split": output.split, "bucket": output.bucket, "rows": rows, "parts": parts}


def _totals(counts: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    return {f"{stage}.{status}": n for stage, found in counts.items() for status, n in found.items()}


def _words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(counts.items(), key=lambda item: -item[1])) or "none"

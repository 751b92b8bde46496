"""The whole flow for one plan, source and root: ingest, dedup, columns, pack. Each step does only what is missing.

The driver holds the verdict and the hash of each row (some hundred bytes), never captions, images or features.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipeline.captions.column import MAX_CHARS
from data_pipeline.curation.gate import only_ok, strict_verdict
from data_pipeline.flow.columns import Column
from data_pipeline.flow.crew import Crew
from data_pipeline.flow.misfits import check_rebuild
from data_pipeline.flow.proven import Proven
from data_pipeline.flow.runner import Unit, Workers
from data_pipeline.flow.stage import OK, Stage
from data_pipeline.flow.tasks import ColumnTask, IngestTask, PackTask
from data_pipeline.flow.verdicts import Verdicts, ok_rows, overruled, totals, verdict_table
from data_pipeline.loading.index import ShardEntry, table_bytes
from data_pipeline.packing.generations import keep_published, published, standing
from data_pipeline.packing.layout import SampleLayout
from data_pipeline.packing.pack import CAPTIONS, Output, RowRun, lost_outputs, make_plan, plan_table, read_proofs
from data_pipeline.packing.publish import assign_splits, draw_of, publish, rejected_rows, write_rejected
from data_pipeline.packing.shards import largest_sample
from data_pipeline.plans import Plan, build_columns, vae_meta
from data_pipeline.schema import DatasetInfo, Manifest, fingerprint, row_ranges
from data_pipeline.sources.formats import Source, SourceUnit, source_to_json
from infra import storage
from infra.errors import UserError
from infra.version import code_version


@dataclass
class Outcome:
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
        plan: Plan,
        root: str,
        source: Source,
        *,
        workers: Workers,
        caption_workers: Workers | None = None,
        keep_going: bool = False,
        only_split: str | None = None,
        dollars_per_hour: float | None = None,
        rebuild: Sequence[str] = (),
    ) -> None:
        self.root, self.source = root, source
        self.crew = Crew(workers, keep_going=keep_going, dollars_per_hour=dollars_per_hour)
        self.caption_workers, self.only_split, self.rebuild = caption_workers, only_split, rebuild
        devices = ["cuda" if given.gpus else "cpu" for given in (workers, caption_workers or workers)]
        if plan.captioner.has_budget:  # each run has the whole of it
            claims = storage.join(root, f"claims/{uuid.uuid4().hex}")
            plan = replace(plan, captioner=replace(plan.captioner, claims=claims))
        self.plan = plan
        self.columns = build_columns(plan, root, device=devices[0], caption_device=devices[1])
        self.proven = Proven(root)
        self.strict: Verdicts = {}

    def run_gate(self) -> Verdicts:
        """Everything that is cheap: what is said of every row before captions and latents are made."""
        self._ingest()
        self.strict = self._strict()
        self._dedup()
        return self._gate()

    def run(self) -> Outcome:
        if stands := standing(self.root):
            check_rebuild(self.root, stands, self._described(), self.rebuild)
        verdicts = self.run_gate()
        self.encode(verdicts)
        runs = self._accepted(verdicts)
        info, entries = self._pack(runs)
        name = write_rejected(self.root, list(self._dead(verdicts).values()))
        info = publish(self.root, info, entries, totals(verdicts), rejected=name)
        rejected = storage.join(self.root, name)
        return Outcome(info, self.proven.counts, rejected, self.crew.failed, self.crew.computed)

    def _dead(self, verdicts: Verdicts) -> dict[str, pa.Table]:
        """Rows that are set aside, by shard."""
        return self.proven.each_shard(
            lambda shard: rejected_rows(shard, verdicts[shard], self.proven.field("measure", shard, "source"))
        )

    # --- ingest, filter, signature, bucket: one pass over the source

    def _ingest(self) -> None:
        units = [unit for unit in self.source.units() if self.only_split in (None, unit.split)]
        if not units:
            raise UserError(f"the source has no split {self.only_split!r}: leave --split out, or name another")
        ingest, column = self.columns.ingest
        known = {c.stage: c.manifests(heal=True) for c in (column, *(c for _, c in self.columns.light))}
        todo = []
        for unit in units:
            found = self._known(unit, known)
            for manifest in found.values():
                self.proven.take(manifest)
            if "ingest" in found:
                self.proven.splits |= {part.shard: unit.split for part in found["ingest"].parts}
            if not self._complete(found):
                todo.append(_ingest_unit(unit, found))
        by_id = {unit.id: unit for unit in units}
        task = IngestTask(self.root, source_to_json(self.source), ingest, column, self.columns.light)
        for report in self.crew.work("ingest + measure + filter", task, todo):
            for manifest in map(Manifest.from_json, report["manifests"]):
                self.proven.take(manifest)
                if manifest.stage == "ingest":
                    self.proven.splits |= {part.shard: by_id[manifest.unit].split for part in manifest.parts}
        if not self.proven.splits:
            raise UserError(f"the source gave no rows in {len(units)} files: nothing to do")

    def _known(self, unit: SourceUnit, known: Mapping[str, Mapping[str, list[Manifest]]]) -> dict[str, Manifest]:
        found = known["ingest"].get(unit.id)
        if not found:
            return {}
        proven = {"ingest": found[0]}
        for part in found[0].parts:
            for _, column in self.columns.light:
                if part.shard in known[column.stage]:
                    proven[f"{column.stage}/{part.shard}"] = known[column.stage][part.shard][0]
        return proven

    def _complete(self, proven: Mapping[str, Manifest]) -> bool:
        if "ingest" not in proven:
            return False
        shards = [part.shard for part in proven["ingest"].parts]
        return all(f"{column.stage}/{shard}" in proven for _, column in self.columns.light for shard in shards)

    # --- dedup: one pass over all signatures

    def _dedup(self) -> None:
        (stage, column), splits, parts = self.columns.dedup, self.proven.splits, self.proven.parts
        # validation first: of two equal images the one that must not be trained on stays
        shards = sorted(parts["signature"], key=lambda shard: (splits.get(shard) != "val", shard))
        found: list[object] = [
            [part.sha256 for name in stage.inputs for part in parts[name].get(shard, [])] for shard in shards
        ]
        # of equal images one that will pass the strict thresholds stays, not one that only passed the gate
        preferred = {shard: ok_rows(verdict) for shard, verdict in self.strict.items()}
        unit = fingerprint([*found, self.plan.strict.identity()] if preferred else found)
        known = column.manifests(heal=True).get(unit)
        if known:
            self.proven.take(known[0])
            return
        read = only_ok(self._signatures(shards), self.proven.verdicts("filter"))
        made = stage.run(read, load=partial(self.proven.read, "embed"), preferred=preferred or None)
        manifest = column.write(unit, made.items())
        self.crew.computed["dedup"] = sum(len(table) for table in read.values())
        self.proven.take(manifest)

    def _signatures(self, shards: Sequence[str]) -> dict[str, pa.Table]:
        found = self.proven.each_shard(lambda s: self.proven.read("signature", s, ["row", "exact", "perceptual"]))
        return {shard: found[shard] for shard in shards}

    def _strict(self) -> Verdicts:
        """What the strict thresholds say, where the gate is looser."""
        strict = self.plan.strict
        if self.plan.gate.thresholds(strict) == strict:
            return {}

        def judge(shard: str) -> pa.Table:
            scores = {name: self.proven.read(name, shard) for name in strict.scorers}
            return strict_verdict(strict, self.proven.read("measure", shard), scores)

        return self.proven.each_shard(judge)

    def _gate(self) -> Verdicts:
        """What filter and dedup say."""
        duplicates = self.proven.verdicts("dedup")
        return {shard: overruled(mine, duplicates[shard]) for shard, mine in self.proven.verdicts("filter").items()}

    # --- captions, latents, text features: only rows that passed

    def encode(self, verdicts: Verdicts) -> None:
        """In one pass, so that images are decoded once; a captioner with workers of its own goes first."""
        heavy, environment = self.columns.heavy, self.plan.captioner.runtime_env()
        try:
            if self.caption_workers is None and environment is None:
                self._encode(heavy, verdicts, self.crew.workers)
                return
            self._encode(heavy[:1], verdicts, self.caption_workers or self.crew.workers, environment)
            self._encode(heavy[1:], verdicts, self.crew.workers)
        finally:
            for claim in storage.list_files(self.plan.captioner.claims) if self.plan.captioner.claims else ():
                storage.delete(claim)

    def _encode(
        self,
        pairs: tuple[tuple[Stage, Column], ...],
        verdicts: Verdicts,
        workers: Workers,
        environment: Mapping[str, Any] | None = None,
    ) -> None:
        stages = [column for _, column in pairs]
        for column in stages:
            self.proven.take_column(column)
        todo = []
        for shard, verdict in verdicts.items():
            rows, done = ok_rows(verdict), self.proven.rows_done
            lacking = {column.stage: np.setdiff1d(rows, done(column.stage, shard)) for column in stages}
            missing = {stage: row_ranges(found.tolist()) for stage, found in lacking.items() if len(found)}
            if missing:
                parts = {stage: [asdict(p) for p in found.get(shard, [])] for stage, found in self.proven.parts.items()}
                todo.append({"id": shard, "shard": shard, "missing": missing, "parts": parts})
        task, title = ColumnTask(self.root, pairs), " + ".join(column.stage for column in stages)
        for report in self.crew.work(title, task, todo, workers=workers, environment=environment):
            for manifest in map(Manifest.from_json, report["manifests"]):
                self.proven.take(manifest)

    def _accepted(self, verdicts: Verdicts) -> list[RowRun]:
        """Rows that go into training shards, in a fixed order; `verdicts` learn why others do not."""
        for shard in sorted(verdicts):
            mine = verdicts[shard]
            if shard in self.strict:
                mine = overruled(mine, self.strict[shard])
            for stage in (column.stage for _, column in self.columns.heavy if column.stage != "caption"):
                mine = overruled(mine, self._shortcomings(stage, shard, mine))
            verdicts[shard] = mine
        found = self.proven.each_shard(lambda shard: self._runs(shard, ok_rows(verdicts[shard])))
        runs = [run for shard in sorted(found) for run in found[shard]]
        if not runs:
            bad = {name: n for counts in self.proven.counts.values() for name, n in counts.items() if name != OK}
            dead = list(self._dead(verdicts).values())
            first = next(row for table in dead for row in table.slice(0, 1).to_pylist())
            listed = storage.join(self.root, write_rejected(self.root, dead))
            raise UserError(
                f"no usable row among {sum(map(len, verdicts.values()))}: {_words(bad)}, e.g. {first['source']} "
                f"({first['reason']}); all are listed in {listed}: mend them or add a --source"
            )
        return assign_splits(runs, self.plan.val_fraction)

    def _shortcomings(self, stage: str, shard: str, verdict: pa.Table) -> pa.Table:
        """Rows that were ok until an encoder gave nothing for them, or nonsense."""
        lost = np.setdiff1d(ok_rows(verdict), self.proven.rows_done(stage, shard)).tolist()
        said = [(row, "failed", f"{stage}: {self.crew.failed.get(shard, 'no result')}") for row in lost]
        if (stage, shard) in self.proven.flawed:
            table = self.proven.read(stage, shard)
            rows = zip(table["row"].to_pylist(), table["status"].to_pylist())
            said += [(row, word, f"{stage} gave values that are no numbers") for row, word in rows if word != OK]
        return verdict_table(*zip(*said)) if said else verdict_table([], [], [])

    def _runs(self, shard: str, rows: np.ndarray) -> list[RowRun]:
        """A shard's rows by bucket, each with the number that decides its split where the source has none."""
        if not len(rows):
            return []
        split = self.proven.splits[shard]
        bucket_of = self.proven.field("bucket", shard, "bucket")
        exact = {} if split else self.proven.field("signature", shard, "exact")
        name_R = np.array([bucket_of[row] for row in rows.tolist()])
        draw_R = np.array([draw_of(exact[row]) if exact else 0 for row in rows.tolist()], np.uint32)
        run = RowRun(shard, split, "", rows, draw_R)
        return [replace(run.only(name_R == name), bucket=str(name)) for name in np.unique(name_R)]

    # --- pack and publish

    def _described(self) -> DatasetInfo:
        """dataset.json as far as the plan decides it."""
        return DatasetInfo(
            text_spec=self.plan.text_spec,
            vae=vae_meta(self.plan.vae),
            resolution=self.plan.resolution,
            captions=CAPTIONS,
            columns=self.columns.fingerprints,
            splits={},
            counts=_totals(self.proven.counts),
            code_version=code_version(),
            int8_seats=self.plan.int8_seats,
            settings=self.columns.settings,
        )

    def _pack(self, runs: Sequence[RowRun]) -> tuple[DatasetInfo, list[ShardEntry]]:
        info = self._described()
        proofs = read_proofs(self.root, info.encoding)
        full = {bucket: self._shard_rows(info.layout(bucket)) for bucket in {run.bucket for run in runs}}
        stands = published(self.root, info, proofs, shard_rows=full)
        kept, rest = keep_published(runs, stands.outputs)
        outputs = [*kept, *make_plan(rest, {"encoding": info.encoding}, shard_rows=full)]
        # In one order, whichever of them are published already: the same plan has the same name.
        plan = table_bytes(plan_table(sorted(outputs, key=lambda output: output.id)))
        storage.write_bytes(storage.join(self.root, f"pack/plan-{storage.sha256_hex(plan)[:16]}.parquet"), plan)
        lost = lost_outputs(self.root, proofs)
        todo = [self._pack_unit(output) for output in outputs if output.id not in proofs or output.id in lost]
        for report in self.crew.work("pack", PackTask(self.root, info), todo):
            proofs[report["id"]] = ShardEntry(**report["entry"])
        entries = [stands.numbered(proofs[output.id]) for output in outputs if output.id in proofs]
        self.proven.counts["pack"] = {OK: sum(entry.num_samples for entry in entries)}
        return info, entries

    def _shard_rows(self, layout: SampleLayout) -> int:
        """So many samples that no shard can grow beyond its bytes, however long texts and captions are."""
        largest = largest_sample(layout, caption_chars=self.plan.max_caption_chars + MAX_CHARS)
        return max(1, min(self.plan.pack_rows, self.plan.pack_mb * 2**20 // largest))

    def _pack_unit(self, output: Output) -> Unit:
        stages = ["measure", *(column.stage for _, column in self.columns.heavy)]
        parts = {
            stage: {shard: [asdict(part) for part in self.proven.parts[stage][shard]] for shard, _ in output.rows}
            for stage in stages
        }
        rows = [(shard, row_ranges(rows.tolist())) for shard, rows in output.rows]
        return {"id": output.id, "split": output.split, "bucket": output.bucket, "rows": rows, "parts": parts}


def _ingest_unit(unit: SourceUnit, proven: Mapping[str, Manifest]) -> Unit:
    return {**asdict(unit), "known": {name: asdict(manifest) for name, manifest in proven.items()}}


def _totals(counts: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    return {f"{stage}.{status}": n for stage, found in counts.items() for status, n in found.items()}


def _words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(counts.items(), key=lambda item: -item[1])) or "none"

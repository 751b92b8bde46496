"""The whole flow for one plan, source and root: ingest, dedup, columns, pack. Each step does only what is missing.

The driver holds statuses and row numbers, never images or features.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa

from data_pipeline.columns import Column, read_parts
from data_pipeline.crew import Crew
from data_pipeline.gate import Statuses, merge_statuses, only_ok, strict_statuses
from data_pipeline.index import ShardEntry, table_bytes
from data_pipeline.pack import CAPTIONS, Output, RowRef, make_plan, plan_table, read_proofs
from data_pipeline.plans import Plan, build_columns, vae_meta
from data_pipeline.publish import assign_splits, publish, write_rejected
from data_pipeline.runner import Unit, Workers
from data_pipeline.schema import DatasetInfo, Manifest, Part, fingerprint
from data_pipeline.sources import Source, SourceUnit, source_to_json
from data_pipeline.stage import OK, Stage
from data_pipeline.tasks import ColumnTask, IngestTask, PackTask
from infra import storage
from infra.errors import UserError
from infra.version import code_version

Parts = dict[str, list[Part]]


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
    ) -> None:
        self.plan, self.root, self.source = plan, root, source
        self.crew = Crew(workers, keep_going=keep_going, dollars_per_hour=dollars_per_hour)
        self.caption_workers, self.only_split = caption_workers, only_split
        devices = ["cuda" if given.gpus else "cpu" for given in (workers, caption_workers or workers)]
        self.columns = build_columns(plan, root, device=devices[0], caption_device=devices[1])
        self.parts: dict[str, Parts] = {}
        self.splits: dict[str, str] = {}
        self.flawed: set[tuple[str, str]] = set()
        self.strict: Statuses = {}
        self.counts: dict[str, dict[str, int]] = {}

    def run_gate(self) -> Statuses:
        """Everything that is cheap: (status, reason) of every row before captions and latents are made."""
        self._ingest()
        self.strict = self._strict()
        self._dedup()
        return self._gate()

    def run(self) -> Outcome:
        statuses = self.run_gate()
        self._encode_all({shard: [r for r, (s, _) in rows.items() if s == OK] for shard, rows in statuses.items()})
        rows = self._accepted(statuses)
        info, entries = self._pack(rows)
        rejected = write_rejected(self.root, statuses, self._read_all("measure", sorted(statuses)))
        info = publish(self.root, info, entries, statuses)
        return Outcome(info, self.counts, rejected, self.crew.failed, self.crew.computed)

    # --- ingest, filter, signature, bucket: one pass over the source

    def _ingest(self) -> None:
        units = [unit for unit in self.source.units() if self.only_split in (None, unit.split)]
        if not units:
            raise UserError(f"the source has no split {self.only_split!r}: leave --split out, or name another")
        ingest, column = self.columns.ingest
        known = {c.stage: c.manifests() for c in (column, *(c for _, c in self.columns.light))}
        todo, expected = [], 0
        for unit in units:
            proven = self._proven(unit, known)
            for manifest in proven.values():
                self._take(manifest)
            if "ingest" in proven:
                for part in proven["ingest"].parts:
                    self.splits[part.shard] = unit.split
                    expected += part.num_rows
            if not self._complete(proven):
                todo.append(_ingest_unit(unit, proven))
        by_id = {unit.id: unit for unit in units}
        task = IngestTask(self.root, source_to_json(self.source), ingest, column, self.columns.light)
        for report in self.crew.work("ingest + measure + filter", task, todo):
            for manifest in map(Manifest.from_json, report["manifests"]):
                self._take(manifest)
                if manifest.stage == "ingest":
                    for part in manifest.parts:
                        self.splits[part.shard] = by_id[manifest.unit].split
        if not self.splits:
            raise UserError(f"the source gave no rows in {len(units)} files: nothing to do")

    def _proven(self, unit: SourceUnit, known: Mapping[str, Mapping[str, list[Manifest]]]) -> dict[str, Manifest]:
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

    def _take(self, manifest: Manifest) -> None:
        mine = self.counts.setdefault(manifest.stage, {})
        for status, count in manifest.counts.items():
            mine[status] = mine.get(status, 0) + count
        if set(manifest.counts) - {OK}:
            self.flawed |= {(manifest.stage, part.shard) for part in manifest.parts}
        for part in manifest.parts:
            parts = self.parts.setdefault(manifest.stage, {}).setdefault(part.shard, [])
            if part not in parts:
                parts.append(part)

    # --- dedup: one pass over all signatures

    def _dedup(self) -> None:
        stage, column = self.columns.dedup
        # validation first: of two equal images the one that must not be trained on stays
        shards = sorted(self.parts["signature"], key=lambda shard: (self.splits.get(shard) != "val", shard))
        stages = stage.inputs
        found: list[object] = [
            [part.sha256 for name in stages for part in self.parts[name].get(shard, [])] for shard in shards
        ]
        # of equal images one that will pass the strict thresholds stays, not one that only passed the gate
        preferred = {s: {r for r, (status, _) in rows.items() if status == OK} for s, rows in self.strict.items()}
        unit = fingerprint([*found, self.plan.strict.identity()] if preferred else found)
        known = column.manifests().get(unit)
        if known:
            self._take(known[0])
            return
        read = only_ok(self._read_all("signature", shards), self._read_all("filter", shards))
        made = stage.run(read, load=partial(self._read_one, "embed"), preferred=preferred or None)
        manifest = column.write(unit, made)
        self.crew.computed["dedup"] = sum(len(table) for table in read.values())
        self._take(manifest)

    def _strict(self) -> Statuses:
        """What the strict thresholds say, where the gate is looser."""
        if self.plan.gate.thresholds(self.plan.strict) == self.plan.strict:
            return {}
        shards = sorted(self.splits)
        scores = {name: self._read_all(name, shards) for name in self.plan.strict.scorers}
        return strict_statuses(self.plan.strict, self._read_all("measure", shards), scores)

    def _read_one(self, stage: str, shard: str) -> pa.Table:
        table = read_parts(self.root, self.parts[stage].get(shard, []))
        if table is None:
            raise UserError(f"{self.root}: column {stage} has nothing for shard {shard}: run the same command again")
        return table

    def _read_all(self, stage: str, shards: Sequence[str]) -> dict[str, pa.Table]:
        with ThreadPoolExecutor(8) as pool:
            tables = pool.map(lambda shard: read_parts(self.root, self.parts[stage].get(shard, [])), shards)
            return {shard: table for shard, table in zip(shards, tables) if table is not None}

    def _gate(self) -> Statuses:
        """(status, reason) of every row so far: what filter and dedup say."""
        shards = sorted(self.splits)
        return merge_statuses(shards, self._read_all("filter", shards), self._read_all("dedup", shards))

    # --- captions, latents, text features: only rows that passed

    def _encode_all(self, wanted: Mapping[str, Sequence[int]]) -> None:
        """In one pass, so that images are decoded once; a captioner with workers of its own goes first."""
        heavy, environment = self.columns.heavy, self.plan.captioner.runtime_env()
        if self.caption_workers is None and environment is None:
            self._encode(heavy, wanted, self.crew.workers)
            return
        self._encode(heavy[:1], wanted, self.caption_workers or self.crew.workers, environment)
        self._encode(heavy[1:], wanted, self.crew.workers)

    def _encode(
        self,
        pairs: tuple[tuple[Stage, Column], ...],
        wanted: Mapping[str, Sequence[int]],
        workers: Workers,
        environment: Mapping[str, Any] | None = None,
    ) -> None:
        stages = [column for _, column in pairs]
        covered = {column.stage: self._covered(column) for column in stages}
        todo = []
        for shard, rows in wanted.items():
            missing = {
                column.stage: [row for row in rows if row not in covered[column.stage].get(shard, set())]
                for column in stages
            }
            missing = {stage: found for stage, found in missing.items() if found}
            if missing:
                parts = {stage: [asdict(p) for p in found.get(shard, [])] for stage, found in self.parts.items()}
                todo.append({"id": shard, "shard": shard, "missing": missing, "parts": parts})
        task, title = ColumnTask(self.root, pairs), " + ".join(column.stage for column in stages)
        for report in self.crew.work(title, task, todo, workers=workers, environment=environment):
            for manifest in map(Manifest.from_json, report["manifests"]):
                self._take(manifest)

    def _covered(self, column: Column) -> dict[str, set[int]]:
        """Rows already done, by shard."""
        for manifests in column.manifests().values():
            for manifest in manifests:
                if manifest.parts[0].shard in self.splits:
                    self._take(manifest)
        return self._rows_done(column.stage)

    def _rows_done(self, stage: str) -> dict[str, set[int]]:
        found = self.parts.get(stage, {})
        return {shard: set().union(*(part.row_numbers() for part in parts)) for shard, parts in found.items()}

    def _accepted(self, statuses: Statuses) -> list[RowRef]:
        """Rows that go into training shards, in a fixed order; others get their status in `statuses`."""
        shards = sorted(statuses)
        for shard, judged in self.strict.items():
            mine = statuses[shard]
            mine |= {row: found for row, found in judged.items() if found[0] != OK and mine[row][0] == OK}
        for stage in (column.stage for _, column in self.columns.heavy if column.stage != "caption"):
            flawed = [shard for shard in shards if (stage, shard) in self.flawed]
            for shard, table in self._read_all(stage, flawed).items():
                for row, status in zip(table["row"].to_pylist(), table["status"].to_pylist()):
                    if statuses[shard][row][0] == OK and status != OK:
                        statuses[shard][row] = status, f"{stage} gave values that are no numbers"
            done = self._rows_done(stage)
            for shard in shards:
                reason = f"{stage}: {self.crew.failed.get(shard, 'no result')}"
                for row in [r for r, (s, _) in statuses[shard].items() if s == OK and r not in done.get(shard, ())]:
                    statuses[shard][row] = "failed", reason
        buckets, exact = self._read_all("bucket", shards), self._read_all("signature", shards)
        accepted = []
        for shard in shards:
            bucket = dict(zip(buckets[shard]["row"].to_pylist(), buckets[shard]["bucket"].to_pylist()))
            hashes = dict(zip(exact[shard]["row"].to_pylist(), exact[shard]["exact"].to_pylist()))
            for row, (status, _) in sorted(statuses[shard].items()):
                if status == OK:
                    accepted.append((RowRef(shard, row, self.splits[shard], bucket[row]), hashes[row]))
        if not accepted:
            found = {name: n for counts in self.counts.values() for name, n in counts.items() if name != OK}
            raise UserError(f"no usable row among {sum(map(len, statuses.values()))}: {_words(found)}")
        return assign_splits(accepted, self.plan.val_fraction)

    # --- pack and publish

    def _pack(self, rows: Sequence[RowRef]) -> tuple[DatasetInfo, list[ShardEntry]]:
        info = DatasetInfo(
            text_spec=self.plan.text_spec,
            vae=vae_meta(self.plan.vae),
            resolution=self.plan.resolution,
            captions=CAPTIONS,
            columns=self.columns.fingerprints,
            splits={},
            counts=_totals(self.counts),
            code_version=code_version(),
            int8_seats=self.plan.int8_seats,
        )
        made_by = {"encoding": info.encoding, **self.columns.fingerprints}
        outputs = make_plan(rows, made_by, shard_rows=self.plan.pack_rows)
        plan = table_bytes(plan_table(outputs))
        storage.write_bytes(storage.join(self.root, f"pack/plan-{storage.sha256_hex(plan)[:16]}.parquet"), plan)
        proofs = read_proofs(self.root, info.encoding)
        todo = [self._pack_unit(output) for output in outputs if output.id not in proofs]
        for report in self.crew.work("pack", PackTask(self.root, info), todo):
            proofs[report["id"]] = ShardEntry(**report["entry"])
        entries = [proofs[output.id] for output in outputs if output.id in proofs]
        self.counts["pack"] = {OK: sum(entry.num_samples for entry in entries)}
        return info, entries

    def _pack_unit(self, output: Output) -> Unit:
        stages = ["measure", *(column.stage for _, column in self.columns.heavy)]
        parts = {
            stage: {shard: [asdict(part) for part in self.parts[stage][shard]] for shard, _ in output.rows}
            for stage in stages
        }
        return {"id": output.id, "split": output.split, "bucket": output.bucket, "rows": output.rows, "parts": parts}


def _ingest_unit(unit: SourceUnit, proven: Mapping[str, Manifest]) -> Unit:
    return {**asdict(unit), "known": {name: asdict(manifest) for name, manifest in proven.items()}}


def _totals(counts: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    return {f"{stage}.{status}": n for stage, found in counts.items() for status, n in found.items()}


def _words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(counts.items(), key=lambda item: -item[1])) or "none"

"""A root whose columns are there already, and what a driver takes that runs over it: seconds and anonymous memory.

`python tests/data_pipeline_driver.py ROOT ROWS [--distance D] [--small]`: manifests, verdicts, dedup, plan, index, all
but the workers. Signatures differ, other objects are shared by all shards; 40 % of the rows are set aside. `--small`
scales down what the driver holds at a time, so that a test of few rows sees what does not stop growing.
"""

import argparse
import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipeline.flow import pipeline
from data_pipeline.flow.pipeline import Pipeline
from data_pipeline.formats import parquet_io
from data_pipeline.formats.parquet_io import encode_table
from data_pipeline.formats.schema import ColumnPart, Manifest, expand_ranges, to_ranges
from data_pipeline.plans import world
from data_pipeline.sources.source import SourceUnit
from data_pipeline.sources.webdataset import WebDatasetSource
from data_pipeline.stages import scratch_db
from data_pipeline.stages.stage import stage_table
from infra.runner import WorkerPool
from infra.storage import sha256_hex

SHARD_ROWS = 1000
UNIT_SHARDS = 10


class Named(WebDatasetSource):
    """Stands for a source whose files were read before: there are as many as its address says."""

    def list_units(self) -> list[SourceUnit]:
        return [SourceUnit(f"all-{n:06d}", "", {"tar": str(n)}) for n in range(int(self.uri))]


class Packed:
    """Stands for the workers that pack: an entry, and no bytes."""

    def __init__(self, root: str, info: object) -> None: ...

    def open(self):
        def run(unit):
            rows = sum(len(expand_ranges(ranges)) for _, ranges in unit["rows"])
            sha = sha256_hex(unit["id"].encode())
            tar = f"{unit['split']}/64/{unit['bucket']}/{sha[:32]}"
            entry = {"tar": f"{tar}.tar", "rows": f"{tar}.parquet", "bucket": unit["bucket"], "num_samples": rows,
                     "num_bytes": 1, "sha256": sha, "rows_sha256": sha, "encoding": "e"}  # fmt: skip
            return {"rows": rows, "counts": {}, "entry": entry}

        return run


def driver(root: str, rows: int, distance: int | None = None) -> Pipeline:
    """A pipeline over `root`, with a source that names its units."""
    source = Named(str(rows // SHARD_ROWS // UNIT_SHARDS))
    return Pipeline(replace(world(), dedup_distance=distance), root, source, workers=WorkerPool(0))


def fill(made: Pipeline) -> None:
    """Manifests of all columns but dedup, written straight into the root."""
    rng = np.random.default_rng(0)
    numbers = range(SHARD_ROWS)
    small = rng.random(SHARD_ROWS) < 0.4
    reasons = [f"{n % 200 + 50}x{n % 300 + 50} pixels, at least 256 on each side" if small[n] else "" for n in numbers]
    fields = {
        "filter": {"reason": pa.array(reasons)},
        "measure": {"source": pa.array([f"picture/{n:09d}" for n in numbers])},
        "bucket": {"bucket": pa.array(["64x64"] * SHARD_ROWS)},
    }
    statuses = np.where(small, "too_small", "ok")
    tables = {
        stage: stage_table(numbers, statuses if stage == "filter" else ["ok"] * SHARD_ROWS, **more)
        for stage, more in fields.items()
    }
    passed = stage_table(np.flatnonzero(~small), ["ok"] * int((~small).sum()))
    tables |= {column.stage: passed for _, column in made.columns.heavy}
    templates = {stage: manifest(made, stage, "SHARD", ["SHARD"], table) for stage, table in tables.items()}
    for unit in (unit.id for unit in made.source.list_units()):
        shards = [f"{unit}-{n:03d}" for n in range(UNIT_SHARDS)]
        put(made, "ingest", unit, manifest(made, "ingest", unit, shards, tables["bucket"]))
        for shard in shards:
            for stage, template in templates.items():
                put(made, stage, shard, template.replace("SHARD", shard))
            hashes = rng.bytes(16 * SHARD_ROWS).hex()
            exact = pa.array([hashes[32 * n : 32 * n + 32] for n in numbers])
            near = pa.array(rng.integers(0, 2**63, SHARD_ROWS), pa.uint64())
            signature = stage_table(numbers, ["ok"] * SHARD_ROWS, exact=exact, perceptual=near)
            put(made, "signature", shard, manifest(made, "signature", shard, [shard], signature))


def manifest(made: Pipeline, stage: str, unit: str, shards: list[str], table: pa.Table) -> str:
    """Puts the object; the manifest as text."""
    data, fingerprint = encode_table(table), made.columns.fingerprints[stage]
    sha = sha256_hex(data)
    name = f"columns/{stage}/{fingerprint[:12]}/objects/{sha[:32]}.parquet"
    path = Path(made.root, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    rows = to_ranges(table["row"].to_pylist())
    parts = tuple(ColumnPart(shard, name, sha, len(data), len(table), rows) for shard in shards)
    return Manifest(stage, fingerprint, unit, parts, {"ok": len(table)}).to_bytes().decode()


def put(made: Pipeline, stage: str, unit: str, text: str) -> None:
    Path(made.root, "columns", stage, made.columns.fingerprints[stage][:12], f"{unit}.0.json").write_text(text)


class Anonymous:
    """The most anonymous memory of this process in MiB: mapped scratch files can be dropped, this cannot."""

    def __enter__(self) -> "Anonymous":
        self.before = self.peak = anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, anonymous())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def anonymous() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("rows", type=int)
    parser.add_argument("--distance", type=int, help="of perceptual hashes; exact pixels only if left out")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    if given.small:
        parquet_io._GROUP_BYTES, scratch_db.CACHE_MIB, scratch_db._PAGE, pipeline._DEDUP_SHARDS = 2**18, 1, 16, 10
    pipeline.PackTask = Packed  # type: ignore[assignment, misc]
    made = driver(given.root, given.rows, given.distance)
    fill(made)
    started = time.perf_counter()
    with Anonymous() as memory:
        outcome = made.run()
    seconds = time.perf_counter() - started
    assert sum(split.num_samples for split in outcome.info.splits.values()) == outcome.info.counts["ok"]
    found = {"rows": given.rows, "seconds": round(seconds, 1), "mib_before": round(memory.before)}
    pages = made.state.database.query("PRAGMA page_count")[0][0]
    print(json.dumps(found | {"mib": round(memory.peak, 1), "ledger_mib_on_disk": round(pages * 4096 / 2**20)}))


if __name__ == "__main__":
    main()

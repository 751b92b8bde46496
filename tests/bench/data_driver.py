"""Memory of the driver per row: verdicts, dedup, splits and the plan of a root whose columns are there already.

python tests/bench/data_driver.py [rows ...]; each count in a process of its own, 40 % of the rows set aside. What the
workers made is written straight into the columns; no picture and no network is needed for what the driver holds.
"""

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import numpy as np
import pyarrow as pa

from data_pipeline.flow.columns import Column
from data_pipeline.flow.pipeline import Pipeline
from data_pipeline.flow.runner import Workers
from data_pipeline.flow.stage import result
from data_pipeline.packing.pack import make_plan, plan_table
from data_pipeline.plans import world
from data_pipeline.schema import Part

SHARD_ROWS = 1000


def fill(made: Pipeline, shard: str, rng: np.random.Generator) -> None:
    """The light columns of one shard, and parts of the heavy ones that hold nothing but their row numbers."""
    rows = list(range(SHARD_ROWS))
    small = rng.random(SHARD_ROWS) < 0.4
    status = np.where(small, "too_small", "ok").tolist()
    why = [f"{n % 200 + 50}x{n % 300 + 50} pixels, at least 256 on each side" for n in rows]
    reason = [text if s else "" for text, s in zip(why, small)]
    texts = ["a caption of some forty letters, or so " * 4] * SHARD_ROWS
    fields: dict[str, dict[str, pa.Array]] = {
        "filter": {"reason": pa.array(reason)},
        "measure": {"caption": pa.array(texts), "source": pa.array([f"{shard}/{n:09d}" for n in rows])},
        "signature": {
            "exact": pa.array([rng.bytes(16).hex() for _ in rows]),
            "perceptual": pa.array(rng.integers(0, 2**63, SHARD_ROWS), pa.uint64()),
        },
        "bucket": {"bucket": pa.array(["64x64"] * SHARD_ROWS)},
    }
    for stage, columns in fields.items():
        said = status if stage == "filter" else ["ok"] * SHARD_ROWS
        column = Column(made.root, stage, made.columns.fingerprints[stage])
        made.proven.take(column.write(shard, [(shard, result(rows, said, **columns))]))
    for _, column in made.columns.heavy:
        part = Part(shard, "", "", 0, SHARD_ROWS, ((0, SHARD_ROWS),))
        made.proven.parts.setdefault(column.stage, {})[shard] = [part]
    made.proven.splits[shard] = ""


def measure(rows: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as root:
        made = Pipeline(world(), root, SimpleNamespace(), workers=Workers(0))  # type: ignore[arg-type]
        rng = np.random.default_rng(0)
        for number in range(rows // SHARD_ROWS):
            fill(made, f"all-{number:06d}", rng)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        made._dedup()
        verdicts = made._gate()
        outputs = make_plan(made._accepted(verdicts), {}, shard_rows=SHARD_ROWS)
        plan_table(outputs)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"rows": rows, "seconds": round(time.perf_counter() - start, 1), "mib_before": before // 1024,
            "mib_peak": peak // 1024}  # fmt: skip


def main() -> None:
    counts = [int(float(word)) for word in sys.argv[1:]] or [50_000, 250_000]
    found = []
    for rows in counts:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found.append(pool.submit(measure, rows).result())
        print(json.dumps(found[-1]))
    first, last = found[0], found[-1]
    if last["rows"] > first["rows"]:
        slope = (last["mib_peak"] - first["mib_peak"]) * 2**20 / (last["rows"] - first["rows"])
        print(json.dumps({"bytes_per_row": round(slope), "gib_for_10_million_rows": round(slope * 1e7 / 2**30, 2)}))


if __name__ == "__main__":
    main()

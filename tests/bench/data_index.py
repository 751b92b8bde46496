"""An index of 100 million rows (100,000 shards of 1,000): seconds to open and to seek, and the memory it takes.

python tests/bench/data_index.py [rows]; the shards themselves need not exist for this.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from data_pipeline.formats.index import write_split
from data_pipeline.loading.index import SplitIndex
from data_pipeline.loading.order import SampleOrder
from data_pipeline.packing.synthetic import make_index_entries


def peak_kib() -> int:
    """Of this program alone: ru_maxrss begins with what the process that forked it had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def main() -> None:
    rows = int(float(sys.argv[1])) if len(sys.argv) > 1 else 100_000_000
    buckets = ("1024x1024", "832x1216", "1216x832", "768x1344", "1344x768")
    with tempfile.TemporaryDirectory() as folder:
        name = write_split(folder, "train", make_index_entries(rows, buckets=buckets))
        before = peak_kib()
        start = time.perf_counter()
        index = SplitIndex(folder, name)
        shards = {bucket: index.shards_of(bucket) for bucket in sorted(set(index.buckets))}
        order = SampleOrder(
            {bucket: (numbers, index.num_samples_per_shard[numbers]) for bucket, numbers in shards.items()},
            seed=0, global_batch=4096,
        )  # fmt: skip
        opened = time.perf_counter()
        order.batch(10 * rows // 4096)
        sought = time.perf_counter()
    figures = {
        "rows": index.num_samples,
        "shards": len(index.tars),
        "open_s": round(opened - start, 3),
        "seek_to_the_tenth_epoch_s": round(sought - opened, 3),
        "peak_memory_gib": round(peak_kib() / 2**20, 2),
        "of_which_before_gib": round(before / 2**20, 2),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

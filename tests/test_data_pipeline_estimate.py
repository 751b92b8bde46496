"""What a billion images take: the page in infra/docs is the command's own output, and its sums are right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.flow.estimate import ScaleAssumptions, estimate_costs, format_estimate
from data_pipeline.formats.index import write_split
from data_pipeline.loading.index import SplitIndex
from data_pipeline.loading.order import SampleOrder
from data_pipeline.packing.synthetic import make_index_entries

PAGE = Path(__file__).parent.parent / "infra" / "docs" / "one_billion_images.md"


def figures(scale: ScaleAssumptions) -> dict[str, float]:
    return {line.what: line.value for line in estimate_costs(scale)}


def test_the_page_holds_the_commands_own_table():
    assert format_estimate(ScaleAssumptions(text_storage="int8")) in PAGE.read_text()


def test_the_sums_are_right():
    found = figures(ScaleAssumptions())
    assert found["captioning"] == pytest.approx(0.7e9 * 2.5 / 3600)
    assert found["captioning"] / figures(ScaleAssumptions(batching=8))["captioning"] == pytest.approx(8)
    assert found["objects"] == pytest.approx(1e6 * 13 * 2 + 6e5 * 3)
    assert found["columns"] == pytest.approx(0.7e9 * found["a sample"] / 1e9)
    small = figures(ScaleAssumptions(text_storage="int8"))
    assert found["columns"] / small["columns"] == pytest.approx(1.854, abs=0.01)
    full = figures(ScaleAssumptions(tokens=77))
    # two captions at SD3's 77 tokens: the paper's 1,019.8 kB and the text once more
    assert full["a sample"] == pytest.approx(1019.8 + 1019.8 - 65.5, abs=1)
    assert figures(ScaleAssumptions(images=2e9))["per million images"] == pytest.approx(found["per million images"])


def test_an_index_of_a_hundred_million_rows_takes_less_than_two_gibibytes():
    """In a process of its own; its seconds are told by the same bench (infra/docs/one_billion_images.md)."""
    bench = Path(__file__).parent / "bench" / "data_index.py"
    done = subprocess.run([sys.executable, str(bench)], capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    assert figures["rows"] == 100_000_000
    assert figures["peak_memory_gib"] < 2


def test_an_index_of_a_hundred_million_rows_finds_its_samples(tmp_path):
    entries = make_index_entries(100_000_000, buckets=("1024x1024", "832x1216"))
    index = SplitIndex(str(tmp_path), write_split(str(tmp_path), "train", entries))
    assert index.num_samples == 100_000_000
    assert len(index.tars) == 100_000
    shards, rows = index.locate(index.starts[[5, 70_000]] + [3, 999])
    assert (shards.tolist(), rows.tolist()) == ([5, 70_000], [3, 999])
    found = {bucket: index.shards_of(bucket) for bucket in index.bucket_ranges()}
    sizes = index.num_samples_per_shard
    order = SampleOrder({name: (numbers, sizes[numbers]) for name, numbers in found.items()}, seed=0, global_batch=4096)
    plan = order.batch(10 * order.count_batches_before(1) + 17)
    assert len(plan.shard_G) == 4096
    assert {index.buckets[shard] for shard in set(plan.shard_G.tolist())} == {plan.bucket}

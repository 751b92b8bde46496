"""What the pipeline adds to its models: caption and encode on 2 Ray workers against the bare model loop on 2 processes.

python tests/bench/data_overhead.py [images] [rounds]

Both start two processes that import, load the same networks and take the same rows in the same batches. The bare loop
has the pictures in memory and throws its results away; the pipeline reads them from its columns, decodes, proves and
writes. Rounds alternate, so that other load on the machine falls on both alike; CPU seconds of one process, which
hardly see other load, are compared too.
"""

import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from data_pipeline.captions.registry import open_captioner
from data_pipeline.checkpoints import resolve
from data_pipeline.flow.pipeline import Pipeline
from data_pipeline.plans import world
from data_pipeline.sources.registry import open_source
from data_pipeline.stages.stage import ShardView
from data_pipeline.world.write import write_world
from infra.runner import WorkerPool, connect
from model.encoders.networks import load_text_encoders
from model.encoders.text import TextSpec
from model.encoders.vae import Latents, load_vae

PLAN = replace(world(), ingest_rows=125)
Rows = list[tuple[torch.Tensor, list, list[str]]]  # per shard: pixels, pictures, captions


def pipeline(root: Path, raw: Path, workers: WorkerPool) -> Pipeline:
    return Pipeline(PLAN, str(root), open_source(f"wds:{raw}"), workers=workers)


def rows_in_memory(root: Path, raw: Path) -> Rows:
    import numpy as np

    made = pipeline(root, raw, WorkerPool(0))
    made.run_gate()
    shards: Rows = []
    for shard in made.state.shards():
        view = ShardView(str(root), shard, {stage: made.state.parts(stage, shard) for stage in ("ingest", "measure")})
        captions = view.values("measure", "caption")
        images = [view.image(row) for row in sorted(captions)]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
        shards.append((pixels, images, [str(captions[row]) for row in sorted(captions)]))
    return shards


def bare(shards: Rows) -> float:
    """Loading the networks and nothing but the networks. CPU seconds."""
    start = time.process_time()
    torch.set_num_threads(1)
    captioner = open_captioner(PLAN.captioner, "cpu")
    vae = load_vae(resolve(PLAN.vae)).to(memory_format=torch.channels_last)
    latents, spec = Latents.of(vae.config, PLAN.vae), PLAN.text_spec
    alone = [TextSpec((e,), spec.layout, spec.context_width, spec.convention) for e in spec.encoders]
    encoders = [load_text_encoders(one, resolve, device="cpu") for one in alone]
    for pixels_BCHW, images, captions in shards:
        said: list[str] = []
        for first in range(0, len(images), PLAN.batch):
            said += captioner.caption(images[first : first + PLAN.batch])
        for first in range(0, len(images), PLAN.batch):
            latents.encode(vae, pixels_BCHW[first : first + PLAN.batch].float() / 127.5 - 1)
        texts = sorted({*captions, *said}, key=lambda text: (len(text), text))
        for encoder in encoders:
            for first in range(0, len(texts), 256):
                encoder.encode(texts[first : first + 256])
    return time.process_time() - start


def bare_on_two(shards: Rows) -> float:
    context = multiprocessing.get_context("spawn")
    start = time.perf_counter()
    processes = [context.Process(target=bare, args=(shards[n::2],)) for n in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return time.perf_counter() - start


def encoded(base: Path, raw: Path, workers: WorkerPool) -> tuple[float, float]:
    """(wall seconds, CPU seconds of this process) of the pass that captions and encodes."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(shutil.copytree(base, Path(folder) / "data"))
        made = pipeline(root, raw, workers)
        statuses = made.run_gate()
        wall, cpu = time.perf_counter(), time.process_time()
        made.encode(statuses)
        return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    images = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        raw, base = Path(folder, "raw"), Path(folder, "base")
        write_world(str(raw), images=images, val_images=1, images_per_shard=250)
        shards = rows_in_memory(base, raw)
        bare(shards[:1])  # what is imported late, is imported now
        pairs = [(encoded(base, raw, WorkerPool(0))[1], bare(shards)) for _ in range(rounds)]
        ratios = [ours / theirs for ours, theirs in pairs]
        print(json.dumps({"rows": images, "cpu_seconds": [[round(a, 1), round(b, 1)] for a, b in pairs],
                          "cpu_seconds_over_bare": [round(r, 3) for r in ratios],
                          "median": round(statistics.median(ratios), 3)}))  # fmt: skip
        connect(WorkerPool(2))
        walls = [(encoded(base, raw, WorkerPool(2))[0], bare_on_two(shards)) for _ in range(rounds)]
        ratios = [ours / theirs for ours, theirs in walls]
        print(json.dumps({"wall_seconds": [[round(a, 1), round(b, 1)] for a, b in walls],
                          "wall_over_bare": [round(r, 3) for r in ratios],
                          "median": round(statistics.median(ratios), 3)}))  # fmt: skip


if __name__ == "__main__":
    main()

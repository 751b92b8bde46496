"""Loading 1 MB samples from the page cache: plain webdataset, raw tar reads, and our loader side by side.

python tests/bench/data_loader.py [samples]; figures are samples per second on one thread unless said otherwise.
"""

import json
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from data_pipeline.loader import open_dataset
from data_pipeline.synthetic import write_synthetic
from model.text import EncoderSpec, TextSpec

# SD3's own encoders with two captions of full length would be 1.9 MB; one caption at 77 tokens is 1.02 MB.
SD3_TEXT = TextSpec(
    encoders=(
        EncoderSpec("clip_l", "synthetic", "clip_hf", tokens=77, width=768, pooled=768),
        EncoderSpec("clip_g", "synthetic", "clip_hf", tokens=77, width=1280, pooled=1280),
        EncoderSpec("t5", "synthetic", "t5_hf", tokens=77, width=4096, pooled=0),
    ),
    layout="padded",
    context_width=4096,
)


def rate(count: int, start: float) -> float:
    return count / (time.perf_counter() - start)


def raw(tars: list[Path]) -> float:
    start, count = time.perf_counter(), 0
    for path in tars:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".safetensors"):
                    archive.extractfile(member).read()
                    count += 1
    return rate(count, start)


def plain_webdataset(tars: list[Path]) -> float:
    import webdataset
    from safetensors.torch import load

    start, count = time.perf_counter(), 0
    for sample in webdataset.WebDataset([str(t) for t in tars], shardshuffle=False, empty_check=False):
        load(sample["safetensors"])
        count += 1
    return rate(count, start)


def ours(uri: str, *, dropout: float, batch: int, count: int) -> float:
    stream = open_dataset(uri).batches(seed=0, global_batch=batch, encoder_dropout=dropout)
    next(stream)
    start = time.perf_counter()
    for _ in range(count // batch):
        next(stream)
    speed = rate(count // batch * batch, start)
    stream.close()
    return speed


def main() -> None:
    samples = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_synthetic(
            folder,
            num_samples=samples,
            val_samples=1,
            latent_shape=(16, 32, 32),
            text_spec=SD3_TEXT,
            buckets=("256x256",),
            shard_rows=64,
            synthetic_share=0.0,
        )
        tars = sorted(Path(folder, "train").rglob("*.tar"))
        size = sum(t.stat().st_size for t in tars) / samples
        np.concatenate([np.fromfile(t, np.uint8) for t in tars]).sum()  # into the page cache
        figures = {
            "kilobytes_per_sample": size / 1000,
            "tar_members_read_raw": raw(tars),
            "webdataset_one_safetensors_member": plain_webdataset(tars),
            "ours_no_dropout": ours(folder, dropout=0.0, batch=32, count=samples),
            "ours_dropout_0.464": ours(folder, dropout=0.464, batch=32, count=samples),
        }
    figures["ours_over_webdataset"] = figures["ours_dropout_0.464"] / figures["webdataset_one_safetensors_member"]
    print(json.dumps({name: round(value, 2) for name, value in figures.items()}, indent=1))


if __name__ == "__main__":
    main()

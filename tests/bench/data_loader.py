"""Loading 1 MB samples from the page cache: raw tar reads, plain webdataset in three ways, and our loader side by side.

python tests/bench/data_loader.py [samples] [rounds]

Each round runs all ways one after the other, and what is told is the median over rounds of a way's rate over the raw
rate of the same round: other load slows both. `bytes_into_batches` is the least that any loader does, which has to put
its samples side by side: positioned reads into one buffer, nothing checked, widened, drawn or placed.
"""

import io
import json
import os
import resource
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from data_pipeline.loading.loader import Dataset, open_dataset
from data_pipeline.packing.synthetic import write_synthetic
from model.encoders.text import EncoderSpec, TextSpec

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


def raw(tars: list[Path]) -> int:
    count = 0
    for path in tars:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".safetensors"):
                    archive.extractfile(member).read()  # type: ignore[union-attr]
                    count += 1
    return count


def npy_tars(tars: list[Path], folder: Path) -> list[Path]:
    """The same arrays as .npy members, webdataset's usual layout."""
    from safetensors.numpy import load

    folder.mkdir()
    for path in tars:
        with tarfile.open(path) as archive, tarfile.open(folder / path.name, "w") as out:
            for member in archive:
                if not member.name.endswith(".safetensors"):
                    continue
                for name, array in load(archive.extractfile(member).read()).items():  # type: ignore[union-attr]
                    data = io.BytesIO()
                    np.save(data, array)
                    info = tarfile.TarInfo(f"{member.name.removesuffix('.safetensors')}.{name}.npy")
                    info.size = data.tell()
                    data.seek(0)
                    out.addfile(info, data)
    return sorted(folder.glob("*.tar"))


def webdataset_npy(tars: list[Path]) -> int:
    import webdataset

    decoded = webdataset.WebDataset([str(t) for t in tars], shardshuffle=False, empty_check=False).decode()
    return sum(1 for _ in decoded)


def _safetensors(sample: dict) -> dict:
    from safetensors.torch import load

    return load(sample["safetensors"])


def webdataset_safetensors(tars: list[Path], workers: int = 0) -> int:
    import webdataset

    found = webdataset.WebDataset([str(t) for t in tars], shardshuffle=False, empty_check=False).map(_safetensors)
    return sum(1 for _ in torch.utils.data.DataLoader(found, batch_size=None, num_workers=workers))


def bytes_into_batches(dataset: Dataset, buffer: np.ndarray) -> int:
    count, rows_of = 0, dataset._reader.table
    for shard, tar in enumerate(dataset.index.tars):
        with open(f"{dataset.uri}/{tar}", "rb") as file:
            for offset, size in zip(rows_of(shard).offset_R.tolist(), rows_of(shard).size_R.tolist()):
                os.preadv(file.fileno(), [buffer[count % len(buffer), :size].data], offset)
                count += 1
    return count


def ours(dataset: Dataset, *, dropout: float, batch: int, count: int, widen: bool = False) -> int:
    stream = dataset.batches(seed=0, global_batch=batch, encoder_dropout=dropout)
    for _ in range(count // batch):
        text = next(stream).text
        if widen:
            text.to(dtype=torch.float32)
    stream.close()
    return count // batch * batch


def ways(folder: str, samples: int, batch: int = 32) -> dict[str, Callable[[], int]]:
    """Functions that load all samples and return their number; the first one is what the others are compared with."""
    tars = sorted(Path(folder, "train").rglob("*.tar"))
    npy, dataset = npy_tars(tars, Path(folder, "npy")), open_dataset(folder)
    buffer = np.zeros((batch, int(dataset._reader.table(0).size_R.max())), np.uint8)
    np.concatenate([np.fromfile(t, np.uint8) for t in tars]).sum()  # into the page cache
    return {
        "tar_members_read_raw": lambda: raw(tars),
        "bytes_into_batches": lambda: bytes_into_batches(dataset, buffer),
        "webdataset_npy": lambda: webdataset_npy(npy),
        "webdataset_safetensors": lambda: webdataset_safetensors(tars),
        "webdataset_safetensors_two_workers": lambda: webdataset_safetensors(tars, 2),
        "ours_no_dropout": lambda: ours(dataset, dropout=0.0, batch=batch, count=samples),
        "ours_no_dropout_widened_to_fp32": lambda: ours(dataset, dropout=0.0, batch=batch, count=samples, widen=True),
        "ours_dropout_0.464": lambda: ours(dataset, dropout=0.464, batch=batch, count=samples),
    }


def main() -> None:
    samples = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
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
        size = sum(t.stat().st_size for t in Path(folder, "train").rglob("*.tar")) / samples
        found = ways(folder, samples)
        for way in found.values():
            way()  # files opened, memory found
        turns = [{name: rates(way) for name, way in found.items()} for _ in range(rounds)]
    base = next(iter(found))
    print(f"{size / 1000:.0f} kB per sample, {rounds} rounds, medians; ratios are to the raw rate of the same round")
    for name in found:
        wall, cpu = (statistics.median(turn[name][n] / turn[base][n] for turn in turns) for n in (0, 1))
        rate = statistics.median(turn[name][0] for turn in turns)
        told = {"per_second": round(rate), "of_raw": round(wall, 3), "of_raw_per_cpu_second": round(cpu, 3)}
        print(json.dumps({name: told}))


def rates(way: Callable[[], int]) -> tuple[float, float]:
    """Samples per second of wall time, and of CPU time (workers' too), which hardly sees other load."""

    def used() -> float:
        return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

    wall, cpu = time.perf_counter(), used()
    count = way()
    return count / (time.perf_counter() - wall), count / (used() - cpu)


if __name__ == "__main__":
    main()

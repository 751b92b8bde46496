"""Loading 1 MB samples from the page cache: raw tar reads, plain webdataset in three ways, and our loader side by side.

python tests/bench/data_loader.py [samples] [rounds]
"""

import io
import json
import resource
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
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


def ours(uri: str, *, dropout: float, batch: int, count: int) -> int:
    stream = open_dataset(uri).batches(seed=0, global_batch=batch, encoder_dropout=dropout)
    for _ in range(count // batch):
        next(stream)
    stream.close()
    return count // batch * batch


def main() -> None:
    samples = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
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
        npy = npy_tars(tars, Path(folder, "npy"))
        size = sum(t.stat().st_size for t in tars) / samples
        np.concatenate([np.fromfile(t, np.uint8) for t in tars]).sum()  # into the page cache
        ways: dict[str, Callable[[], int]] = {
            "tar_members_read_raw": lambda: raw(tars),
            "webdataset_npy": lambda: webdataset_npy(npy),
            "webdataset_safetensors": lambda: webdataset_safetensors(tars),
            "webdataset_safetensors_two_workers": lambda: webdataset_safetensors(tars, 2),
            "ours_no_dropout": lambda: ours(folder, dropout=0.0, batch=32, count=samples),
            "ours_dropout_0.464": lambda: ours(folder, dropout=0.464, batch=32, count=samples),
        }
        figures = {name: [rates(way) for _ in range(rounds)] for name, way in ways.items()}
    print(f"{size / 1000:.0f} kB per sample; best of {rounds}; samples per second, and per second of CPU time")
    best = {name: tuple(max(column) for column in zip(*found)) for name, found in figures.items()}
    for name, (wall, cpu) in best.items():
        base = best["tar_members_read_raw"][1]
        print(json.dumps({name: round(wall), "per_cpu_second": round(cpu), "of_raw": round(cpu / base, 3)}))


def rates(way: Callable[[], int]) -> tuple[float, float]:
    """Samples per second of wall time, and of CPU time (workers' too), which hardly sees other load."""

    def used() -> float:
        return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

    wall, cpu = time.perf_counter(), used()
    count = way()
    return count / (time.perf_counter() - wall), count / (used() - cpu)


if __name__ == "__main__":
    main()

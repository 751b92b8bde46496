"""Run by test_trainer_export.py in a process of its own: writes weights in every format to a place, prints the
bytes of one export and the memory that all of them together added."""

import resource
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from data_pipeline.formats.schema import DatasetInfo
from data_pipeline.packing.synthetic import write_synthetic
from infra import storage
from model.backbones.mmdit import MMDiTConfig
from model.files import pipeline
from trainer.exports.export import Weights, write_as


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def export(depth: int, place: str, info: DatasetInfo) -> int:
    """Made-up weights of a depth, as a checkpoint's reader hands them out; bytes of one export."""
    config = MMDiTConfig(depth=depth, in_channels=8, context_width=64, pooled_width=64, pos_max=48)
    with torch.device("meta"):
        shapes = {name: tuple(param.shape) for name, param in config.build().named_parameters()}
    meta = {"kind": "raw", "backbone": "mmdit", "config": config.to_json(), "run": "made-up"}
    weights = Weights(shapes, lambda name: torch.ones(shapes[name]), meta)
    for form, name in (("beeline", "ours.safetensors"), ("sd3", "sd3.safetensors"), ("diffusers", "folder")):
        write_as(form, f"{place}/{name}", weights, info=info, run=f"{place}/run")
    return sum(4 * torch.Size(shape).numel() for shape in shapes.values())


def main() -> None:
    folder, place = sys.argv[1:]
    info = write_synthetic(f"{folder}/data", num_samples=8, val_samples=8)
    info = replace(info, vae=replace(info.vae, checkpoint="world:vae"))
    if storage.is_remote(place):  # a bucket that is a folder: S3's own client reads a file in parts of UPLOAD_PART
        sent = Path(folder) / "sent"
        sent.mkdir()
        storage.upload = lambda path, uri: shutil.copyfile(path, sent / uri.rsplit("/", 1)[-1])
        storage.write_bytes = lambda uri, data: (sent / uri.rsplit("/", 1)[-1]).write_bytes(data)
        storage.list_files = lambda prefix, **more: []
    export(1, place, info)  # what is imported and kept at first use
    pipeline.MAX_FILE = 60_000_000
    before = peak()
    size = export(8, place, info)
    print(size, peak() - before)


if __name__ == "__main__":
    main()

"""Run by test_trainer_export_memory.py in a process of its own: writes weights to a URI, prints bytes and memory."""

import resource
import shutil
import sys
from pathlib import Path

import torch

from infra import storage
from model.mmdit import MMDiTConfig
from trainer.export import write


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def export(depth: int, uri: str) -> int:
    """Made-up weights of a depth, as a checkpoint's reader hands them out; bytes written."""
    config = MMDiTConfig(depth=depth, context_width=64, pooled_width=64)
    with torch.device("meta"):
        shapes = {name: tuple(param.shape) for name, param in config.build().named_parameters()}
    meta = {"kind": "raw", "backbone": "mmdit", "config": config.to_json()}
    write([uri], shapes, lambda name: torch.ones(shapes[name]), meta)
    return sum(4 * torch.Size(shape).numel() for shape in shapes.values())


def main() -> None:
    folder, where = sys.argv[1:]
    uri = f"{where}/weights.safetensors"
    if storage.is_remote(where):  # a bucket that is a folder: S3's own client reads a file in parts of UPLOAD_PART
        storage.upload = lambda path, uri: shutil.copyfile(path, Path(folder) / "sent")
        storage.write_bytes = lambda uri, data: (Path(folder) / "sent").write_bytes(data)
    export(1, uri)  # what is imported and kept at first use
    before = peak()
    size = export(8, uri)
    print(size, peak() - before)


if __name__ == "__main__":
    main()

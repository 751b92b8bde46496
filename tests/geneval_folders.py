"""Folders of pictures in GenEval's official layout, for tests."""

import json
from pathlib import Path

from eval.drawing.pictures import write_picture


def write_folder(root, index, metadata, images):
    """One prompt's folder."""
    folder = Path(root) / f"{index:05d}"
    for number, image in enumerate(images):
        write_picture(folder / "samples" / f"{number:04d}.png", image)
    (folder / "metadata.jsonl").write_text(json.dumps(metadata), encoding="utf-8")
    return folder

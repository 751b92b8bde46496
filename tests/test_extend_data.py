"""A source layout and a captioner from outside the package: a class and one line each, used by the public command."""

import io
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.captions.registry import CAPTIONERS
from data_pipeline.captions.spec import CaptionerSpec
from data_pipeline.formats.schema import fingerprint
from data_pipeline.loading.loader import open_dataset
from data_pipeline.sources.registry import SOURCES
from data_pipeline.sources.source import RawRow, SourceOptions, SourceUnit, list_existing, stamp_file


class ArraySource:
    """Numpy files: NAME.npy holds images (N, H, W, 3), NAME.json their captions."""

    def __init__(self, uri: str, options: SourceOptions) -> None:
        self.uri = uri

    def list_units(self) -> list[SourceUnit]:
        files = list_existing(self.uri, (".npy",), "numpy files")
        marks = [fingerprint([Path(file).name, stamp_file(file)])[:10] for file in files]
        return [SourceUnit(f"all-{mark}", "", {"file": file}) for mark, file in zip(marks, files)]

    def read_rows(self, unit: SourceUnit) -> Iterator[RawRow]:
        file = Path(unit.where["file"])
        captions = json.loads(file.with_suffix(".json").read_text())
        for number, pixels_HW3 in enumerate(np.load(file)):
            out = io.BytesIO()
            Image.fromarray(pixels_HW3).save(out, "PNG")
            yield RawRow(f"{file.stem}-{number}", out.getvalue(), captions[number])


class ColorCaptioner:
    """Names the strongest of the three colors; needs no weights."""

    name, version = "color", 1

    def __init__(self, spec: CaptionerSpec, device: str) -> None:
        self._prompt = spec.prompt

    def caption(self, images: list[Image.Image]) -> list[str]:
        means = [np.asarray(image).mean((0, 1)) for image in images]
        return [f"{self._prompt} {('red', 'green', 'blue')[int(mean.argmax())]}" for mean in means]


def run(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["data_pipeline", "run", "world", "--workers", "0", *words])
    monkeypatch.delitem(sys.modules, "data_pipeline.__main__", raising=False)  # another test may have imported it
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("data_pipeline", run_name="__main__", alter_sys=True)
    assert not ended.value.code


def test_a_source_and_a_captioner_are_a_class_and_a_line_each(tmp_path, monkeypatch):
    colors = np.eye(3, dtype=np.uint8) * 200
    images = np.tile(np.repeat(colors, 2, 0)[:, None, None], (1, 64, 64, 1))
    images[::2, 10:30] = 255  # no two pictures are equal
    np.save(tmp_path / "six.npy", images)
    (tmp_path / "six.json").write_text(json.dumps([f"picture {n}" for n in range(6)]))
    monkeypatch.setitem(SOURCES, "arrays", ArraySource)
    monkeypatch.setitem(CAPTIONERS, "color", ColorCaptioner)

    captioner = ["--captioner.name", "color", "--captioner.checkpoint", "", "--captioner.prompt", "mostly"]
    run(monkeypatch, "--source", f"arrays:{tmp_path}", "--out", f"{tmp_path}/data", *captioner)

    found = {}
    for split in ("train", "val"):
        dataset = open_dataset(f"{tmp_path}/data", split=split)
        everything = range(dataset.num_samples)
        originals = dataset.read(everything, caption="original").captions
        found |= dict(zip(originals, dataset.read(everything, caption="synthetic").captions))
    assert found == {f"picture {n}": f"mostly {('red', 'green', 'blue')[n // 2]}" for n in range(6)}


@pytest.mark.parametrize("registry", [SOURCES, CAPTIONERS], ids=["sources", "captioners"])
def test_only_its_own_file_and_the_registry_name_a_class(registry):
    root = Path(__file__).parent.parent
    for kind in registry.values():
        own = Path(sys.modules[kind.__module__].__file__).relative_to(root)
        naming = {
            path.relative_to(root)
            for package in ("model", "infra", "data_pipeline", "trainer", "eval")
            for path in (root / package).rglob("*.py")
            if kind.__name__ in path.read_text()
        }
        assert naming == {own, own.parent / "registry.py"}

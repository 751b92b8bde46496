"""ImageNet-1k in the layout of its archive (ILSVRC/Data/CLS-LOC) or in class folders of one's own."""

import csv
import io
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline.formats.schema import fingerprint
from data_pipeline.sources.seen import count_file
from data_pipeline.sources.source import (
    IMAGE_SUFFIXES,
    ROWS_PER_UNIT,
    RawRow,
    SourceOptions,
    SourceUnit,
    draw_one,
    list_etags,
    list_existing,
    parse_split,
    read_row,
    stamp_files,
)
from infra import storage
from infra.errors import MissingError


@dataclass(frozen=True)
class ImageNetSource:
    """train/n01440764/*.JPEG and val/ (by class, or flat with LOC_val_solution.csv), names in LOC_synset_mapping.txt.

    The caption is "a photo of a <class name>", the name drawn among the class's own (SD3's protocol for its study).
    """

    uri: str
    options: SourceOptions = SourceOptions()  # noqa: RUF009 - frozen

    def list_units(self) -> list[SourceUnit]:
        names, solution, etags = self._read_names(), self._read_solution(), list_etags(self.uri)
        root = self.uri.rstrip("/") + "/"
        rows: dict[tuple[str, str], list[list[str]]] = {}
        for file in list_existing(self.uri, tuple(f".{s}" for s in IMAGE_SUFFIXES), "images"):
            relative = file.removeprefix(root)
            folders = relative.split("/")[:-1]
            split = next((parse_split(folder) for folder in folders if parse_split(folder)), "")
            stem = posixpath.basename(relative).rsplit(".", 1)[0]
            synset = folders[-1] if folders and folders[-1] in names else solution.get(stem, "")
            caption = f"a photo of a {draw_one(stem, names[synset])}" if synset in names else ""
            rows.setdefault((split, synset), []).append([relative, caption])
        units = []
        for (split, synset), found in sorted(rows.items()):
            for first in range(0, len(found), ROWS_PER_UNIT):
                chosen = found[first : first + ROWS_PER_UNIT]
                stamp = stamp_files([root + relative for relative, _ in chosen], etags)
                mark = fingerprint([chosen, stamp])[:10]
                label = f"{split or 'all'}-{synset or 'none'}-{first // ROWS_PER_UNIT:05d}-{mark}"
                units.append(SourceUnit(label, split, {"rows": chosen}))
        return units

    def _read_names(self) -> dict[str, list[str]]:
        for name in ("LOC_synset_mapping.txt", "synset_words.txt"):
            uri = storage.join(self.uri, name)
            if storage.exists(uri):
                lines = storage.read_bytes(uri).decode().splitlines()
                pairs = (line.partition(" ") for line in lines if line.strip())
                return {synset: [word.strip() for word in words.split(",")] for synset, _, words in pairs}
        raise MissingError(f"{self.uri}: no LOC_synset_mapping.txt (or synset_words.txt), so no class has a name: "
                           "it lies in ImageNet's archive beside ILSVRC/")  # fmt: skip

    def _read_solution(self) -> dict[str, str]:
        uri = storage.join(self.uri, "LOC_val_solution.csv")
        if not storage.exists(uri):
            return {}
        lines = csv.DictReader(io.StringIO(storage.read_bytes(uri).decode()))
        return {line["ImageId"]: line["PredictionString"].split()[0] for line in lines}

    def read_rows(self, unit: SourceUnit) -> Iterator[RawRow]:
        seen = unit.seen
        for relative, caption in unit.where["rows"]:
            count_file(seen, relative)
            yield read_row(relative, storage.join(self.uri, relative), caption)

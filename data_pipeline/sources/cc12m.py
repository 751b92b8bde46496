"""Conceptual 12M: cc12m.tsv lists a URL, a tab and a caption per line; the images are fetched."""

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from data_pipeline.formats.schema import fingerprint
from data_pipeline.sources.seen import BLANK
from data_pipeline.sources.source import (
    RawRow,
    SourceOptions,
    SourceUnit,
    fetch_rows,
    list_etags,
    list_existing,
    stamp_file,
)
from infra import storage


@dataclass(frozen=True)
class Cc12mSource:
    """cc12m.tsv (url, tab, caption), fetched within bounds. For all of it img2dataset and `wds:` are the better way."""

    uri: str
    options: SourceOptions = SourceOptions()  # noqa: RUF009 - frozen
    rows_per_unit: int = 1000

    def list_units(self) -> list[SourceUnit]:
        units, etags = [], list_etags(self.uri)
        for file in list_existing(self.uri, (".tsv",), "TSV files of url and caption"):
            offsets, stamp = self._offsets(storage.read_bytes(file)), stamp_file(file, etags)
            stem = posixpath.basename(file).rsplit(".", 1)[0]
            for number, (first, behind) in enumerate(pairwise(offsets)):
                mark = fingerprint([posixpath.basename(file), stamp, first])[:10]
                where = {"file": file, "start": first, "length": behind - first, "number": number}
                units.append(SourceUnit(f"all-{stem[-40:]}-{number:06d}-{mark}", "", where))
        return units

    def _offsets(self, data: bytes) -> list[int]:
        """Where units begin, and the end."""
        offsets, at, lines = [0], 0, 0
        while (newline := data.find(b"\n", at)) >= 0:
            at, lines = newline + 1, lines + 1
            if lines % self.rows_per_unit == 0:
                offsets.append(at)
        return offsets if offsets[-1] == len(data) else [*offsets, len(data)]

    def read_rows(self, unit: SourceUnit) -> Iterator[RawRow]:
        where = unit.where
        text = storage.read_bytes(where["file"], where["start"], where["length"]).decode("utf-8", "replace")
        items, bad, seen = [], [], unit.seen
        for number, line in enumerate(text.removesuffix("\n").split("\n")):
            seen["record"] += 1
            if not line.strip():
                seen[BLANK] += 1
                continue
            url, tab, caption = line.rstrip("\r").partition("\t")
            key = f"{where['number']:06d}-{number:06d}"
            if tab:
                items.append((key, url, caption))
            else:
                bad.append(RawRow(key, None, None, "no_image", "a line without a tab"))
        yield from fetch_rows(items, self.options.fetch, where["file"])
        yield from bad

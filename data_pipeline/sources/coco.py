"""COCO-2014 with its captions: annotations/captions_{train,val}2014.json, the images in folders beside it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter

from data_pipeline.formats.schema import fingerprint
from data_pipeline.sources.seen import count_file
from data_pipeline.sources.source import (
    ROWS_PER_UNIT,
    SPLITS,
    RawRow,
    SourceOptions,
    SourceUnit,
    draw_one,
    list_etags,
    read_row,
    stamp_files,
)
from infra import storage
from infra.errors import MissingError, UserError


@dataclass(frozen=True)
class CocoSource:
    """COCO-2014: annotations/captions_{train,val}2014.json with the images beside; one of the captions is drawn."""

    uri: str
    options: SourceOptions = SourceOptions()  # noqa: RUF009 - frozen

    def list_units(self) -> list[SourceUnit]:
        units, etags = [], list_etags(self.uri)
        for split in SPLITS:
            uri = storage.join(self.uri, f"annotations/captions_{split}2014.json")
            if not storage.exists(uri):
                continue
            files, captions = self._read(uri)
            rows = [
                [f"{split}2014/{name}", draw_one(name, captions[number]) if captions.get(number) else ""]
                for number, name in sorted(files.items())
            ]
            for first in range(0, len(rows), ROWS_PER_UNIT):
                chosen = rows[first : first + ROWS_PER_UNIT]
                stamp = stamp_files([storage.join(self.uri, relative) for relative, _ in chosen], etags)
                label = f"{split}-coco2014-{first // ROWS_PER_UNIT:05d}-{fingerprint([chosen, stamp])[:10]}"
                units.append(SourceUnit(label, split, {"rows": chosen}))
        if not units:
            raise MissingError(f"{self.uri}: no annotations/captions_val2014.json there: expected COCO-2014's layout")
        return units

    @staticmethod
    def _read(uri: str) -> tuple[dict[int, str], dict[int, list[str]]]:
        try:
            data = json.loads(storage.read_bytes(uri))
            files = {int(image["id"]): str(image["file_name"]) for image in data["images"]}
            captions: dict[int, list[str]] = {}
            for annotation in sorted(data["annotations"], key=itemgetter("id")):
                text = " ".join(str(annotation["caption"]).split())
                captions.setdefault(int(annotation["image_id"]), []).append(text)
            return files, captions
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{uri}: not COCO's captions ({type(error).__name__}: {error})") from error

    def read_rows(self, unit: SourceUnit) -> Iterator[RawRow]:
        seen = unit.seen
        for relative, caption in unit.where["rows"]:
            count_file(seen, relative)
            yield read_row(relative, storage.join(self.uri, relative), caption)

"""A folder of images, each with its caption in a .txt of the same name beside it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from data_pipeline.formats.schema import fingerprint
from data_pipeline.sources.source import (
    IMAGE_SUFFIXES,
    ROWS_PER_UNIT,
    RawRow,
    SourceOptions,
    SourceUnit,
    list_etags,
    list_existing,
    split_from_path,
    stamp_file,
)
from infra import storage
from infra.errors import UnavailableError, UserError


@dataclass(frozen=True)
class FolderSource:
    """Images with captions in a .txt of the same name beside them."""

    uri: str
    options: SourceOptions = SourceOptions()  # noqa: RUF009 - frozen

    def list_units(self) -> list[SourceUnit]:
        names = list_existing(self.uri, tuple(f".{s}" for s in IMAGE_SUFFIXES), "images")
        root, etags = self.uri.rstrip("/") + "/", list_etags(self.uri)
        texts = {name for name in storage.list_files(self.uri) if name.endswith(".txt")}
        by_split: dict[str, list[str]] = {}
        for name in names:
            by_split.setdefault(split_from_path(name.removeprefix(root)), []).append(name)
        units = []
        for split, files in by_split.items():
            for first in range(0, len(files), ROWS_PER_UNIT):
                rows = [self._row(name, root, texts, etags) for name in files[first : first + ROWS_PER_UNIT]]
                label = f"{split or 'all'}-{first // ROWS_PER_UNIT:05d}-{fingerprint(rows)[:10]}"
                units.append(SourceUnit(label, split, {"rows": [(image, text) for image, text, *_ in rows]}))
        return units

    @staticmethod
    def _row(name: str, root: str, texts: set[str], etags: Mapping[str, str]) -> list[object]:
        text = name.rsplit(".", 1)[0] + ".txt"
        stamps = [stamp_file(uri, etags) for uri in (name, text) if uri == name or uri in texts]
        return [name.removeprefix(root), text.removeprefix(root) if text in texts else None, *stamps]

    def read_rows(self, unit: SourceUnit) -> Iterator[RawRow]:
        for name, text in unit.where["rows"]:
            try:
                caption = storage.read_bytes(storage.join(self.uri, text)) if text else None
                image = storage.read_bytes(storage.join(self.uri, name))
            except UnavailableError:
                raise
            except UserError as error:
                yield RawRow(name, None, None, "unreadable", str(error))
                continue
            yield RawRow(name, image, caption)

"""Parquet as a source: image bytes, Hugging Face's {bytes, path}, local paths or URLs, with a caption beside them."""

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.formats.schema import fingerprint
from data_pipeline.sources.source import (
    RawRow,
    SourceOptions,
    SourceUnit,
    fetch_rows,
    list_etags,
    list_existing,
    parse_split,
    read_row,
    split_from_path,
    stamp_file,
)
from infra import storage
from infra.errors import UserError, nearest

URLS_AT_ONCE, IMAGES_AT_ONCE = 1000, 64
IMAGE_COLUMNS = ("image", "jpg", "png", "image_bytes", "bytes", "path", "image_path", "file")
CAPTION_COLUMNS = ("caption", "text", "txt", "TEXT", "prompt")


@dataclass(frozen=True)
class ParquetSource:
    """Parquet rows with image bytes (or Hugging Face's {bytes, path}, or a local path) and a caption."""

    uri: str
    options: SourceOptions = SourceOptions()  # noqa: RUF009 - frozen

    def list_units(self) -> list[SourceUnit]:
        units, etags = [], list_etags(self.uri)
        for file in list_existing(self.uri, (".parquet",), "parquet files"):
            with storage.open_read(file) as stream:
                parquet = _open_parquet(stream, file)
                image, caption = self._columns(parquet.schema_arrow, file)
                for group in range(parquet.num_row_groups):
                    where = {"file": file, "group": group, "image": image, "caption": caption}
                    relative = file.removeprefix(self.uri.rstrip("/") + "/")
                    stem = posixpath.basename(file).rsplit(".", 1)[0]
                    split = split_from_path(relative) or (parse_split(stem.split("-")[0]) if "-" in stem else "")
                    mark = fingerprint([relative, where, stamp_file(file, etags)])[:10]
                    label = f"{split or 'all'}-{stem[-40:]}-{group:04d}-{mark}"
                    units.append(SourceUnit(label.replace(".", "_"), split, where))
        return units

    def _columns(self, schema: pa.Schema, file: str) -> tuple[str, str]:
        names = schema.names
        chosen = []
        for what, asked, known in (
            ("image", self.options.image_column, IMAGE_COLUMNS),
            ("caption", self.options.caption_column, CAPTION_COLUMNS),
        ):
            name = asked or next((k for k in known if k in names), "")
            urls = [n for n in names if n.lower() == "url"]
            if what == "image" and not name and urls:
                if not self.options.fetch_urls:
                    raise UserError(
                        f"{file}: holds urls, not images: fetch them with img2dataset, then use wds:FOLDER; "
                        "or, for not too many, add --fetch-urls"
                    )
                name = urls[0]
            if name not in names:
                raise UserError(
                    f"{file}: no {what} column {name or 'named ' + ' or '.join(known[:4])}; it has {', '.join(names)}: "
                    f"name it with --{what}-column{nearest(name, names) if name else ''}"
                )
            chosen.append(name)
        return chosen[0], chosen[1]

    def read_rows(self, unit: SourceUnit) -> Iterator[RawRow]:
        """A row group may be larger than memory, and so may the images behind its URLs: some rows at a time."""
        where, number = unit.where, 0
        urls = self.options.fetch_urls and where["image"].lower() == "url"
        with storage.open_read(where["file"]) as stream:
            parquet = _open_parquet(stream, where["file"])
            has_key = "key" in parquet.schema_arrow.names
            wanted = [where["image"], where["caption"], *(["key"] if has_key else [])]
            batches = parquet.iter_batches(
                URLS_AT_ONCE if urls else IMAGES_AT_ONCE, row_groups=[where["group"]], columns=wanted,
                use_threads=False,  # as in parquet_io.py
            )  # fmt: skip
            for batch in batches:
                rows = batch.to_pylist()
                keys = [str(row["key"]) if has_key else f"{where['group']:04d}-{number + n:06d}"
                        for n, row in enumerate(rows)]  # fmt: skip
                number += len(rows)
                yield from self._fetched(keys, rows, where) if urls else self._found(keys, rows, where)

    def _fetched(self, keys: Sequence[str], rows: Sequence[Mapping], where: Mapping[str, Any]) -> Iterator[RawRow]:
        items = [(key, str(row[where["image"]] or ""), row[where["caption"]]) for key, row in zip(keys, rows)]
        return fetch_rows(items, self.options.fetch, where["file"])

    def _found(self, keys: Sequence[str], rows: Sequence[Mapping], where: Mapping[str, Any]) -> Iterator[RawRow]:
        for key, row in zip(keys, rows):
            value = row[where["image"]]
            if isinstance(value, dict):
                value = value.get("bytes") or value.get("path")
            if isinstance(value, str):
                yield self._from_path(key, value, row[where["caption"]], where["file"])
            elif value:
                yield RawRow(key, bytes(value), row[where["caption"]])
            else:
                yield RawRow(key, None, row[where["caption"]], "no_image", "the cell is empty")

    @staticmethod
    def _from_path(key: str, path: str, caption: str, file: str) -> RawRow:
        uri = path if storage.is_remote(path) or path.startswith("/") else storage.join(posixpath.dirname(file), path)
        return read_row(key, uri, caption)


def _open_parquet(stream: Any, uri: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(stream)
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{uri}: not a readable parquet file ({str(error).splitlines()[0][:120]})") from error

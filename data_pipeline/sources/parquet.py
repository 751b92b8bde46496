"""Parquet as a source: image bytes, Hugging Face's {bytes, path}, local paths or URLs, with a caption beside them."""

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.formats.schema import fingerprint
from data_pipeline.sources.captions import choose_caption_column, is_text
from data_pipeline.sources.source import (
    FoundField,
    RawRow,
    SourceOptions,
    SourceUnit,
    fetch_rows,
    find_examples,
    list_etags,
    list_existing,
    parse_split,
    read_row,
    split_from_path,
    stamp_file,
)
from infra import storage
from infra.errors import MissingError, UserError, nearest

URLS_AT_ONCE, IMAGES_AT_ONCE = 1000, 64
_URL_NAMES = ("url", "URL", "Url", "image_url", "img_url")
IMAGE_COLUMNS = ("image", "jpg", "png", "image_bytes", "bytes", "path", "image_path", "file")


class DamagedTable(UserError):
    """A file that is no whole table."""


@dataclass(frozen=True)
class ParquetSource:
    """Parquet rows with image bytes (or Hugging Face's {bytes, path}, or a local path) and a caption."""

    uri: str
    options: SourceOptions = SourceOptions()  # noqa: RUF009 - frozen

    def list_units(self) -> list[SourceUnit]:
        units, etags = [], list_etags(self.uri)
        for file in list_existing(self.uri, (".parquet",), "parquet files"):
            for where in self._list_groups(file):
                relative = file.removeprefix(self.uri.rstrip("/") + "/")
                stem = posixpath.basename(file).rsplit(".", 1)[0]
                split = split_from_path(relative) or (parse_split(stem.split("-")[0]) if "-" in stem else "")
                mark = fingerprint([relative, where, stamp_file(file, etags)])[:10]
                label = f"{split or 'all'}-{stem[-40:]}-{where['group']:04d}-{mark}"
                units.append(SourceUnit(label.replace(".", "_"), split, where))
        return units

    def _list_groups(self, file: str) -> list[dict[str, Any]]:
        """The row groups of a file, or what is wrong with it: one file that is damaged must not hold up the others."""
        try:
            stream = storage.open_read(file)
        except MissingError as error:  # a link to nothing
            return [{"file": file, "group": 0, "damage": str(error)}]
        with stream:
            try:
                parquet = _open_parquet(stream, file)
            except DamagedTable as error:
                return [{"file": file, "group": 0, "damage": str(error), "bytes": storage.get_size(file)}]
            image, caption = self._columns(parquet.schema_arrow, file)
            groups = range(parquet.num_row_groups)
            return [{"file": file, "group": group, "image": image, "caption": caption} for group in groups]

    def list_fields(self) -> list[FoundField]:
        """Columns of the first whole file, with the first value of each that is no picture."""
        for file in list_existing(self.uri, (".parquet",), "parquet files"):
            try:
                return self._list_fields(file)
            except (DamagedTable, MissingError):
                continue
        return []

    @staticmethod
    def _list_fields(file: str) -> list[FoundField]:
        with storage.open_read(file) as stream:
            parquet = _open_parquet(stream, file)
            shown = [column.name for column in parquet.schema_arrow if not _may_hold_bytes(column.type)]
            first = next(parquet.iter_batches(IMAGES_AT_ONCE, columns=shown, use_threads=False), None)
            examples = find_examples(first.to_pylist() if first is not None else [])
            return [FoundField(one.name, str(one.type), examples.get(one.name, "")) for one in parquet.schema_arrow]

    def _columns(self, schema: pa.Schema, file: str) -> tuple[str, str]:
        """Names of the image and the caption column."""
        types = {field.name: field.type for field in schema}
        image = self.options.image_column or next((name for name in IMAGE_COLUMNS if name in types), "")
        urls = [name for name in types if name in _URL_NAMES]
        if not image and urls:
            if not self.options.fetch_urls:
                raise UserError(
                    f"{file}: holds urls, not images: fetch them with img2dataset, then use wds:FOLDER; "
                    "or, for not too many, add --fetch-urls"
                )
            image = urls[0]
        if image not in types:
            raise UserError(
                f"{file}: no image column {image or 'named ' + ' or '.join(IMAGE_COLUMNS[:4])}; "
                f"it has {', '.join(types)}: name it with --image-column{nearest(image, types) if image else ''}"
            )
        if not (_may_hold_images(types[image]) or pa.types.is_null(types[image])):
            raise UserError(
                f"{file}: column {image} is of type {types[image]}: expected bytes, paths, {{bytes, path}} or a list "
                "of these: name another with --image-column"
            )
        return image, choose_caption_column(types, self.options.caption_column, file)

    def read_rows(self, unit: SourceUnit) -> Iterator[RawRow]:
        """A row group may be larger than memory, and so may the images behind its URLs: some rows at a time."""
        where, number = unit.where, 0
        if "damage" in where:
            unit.seen.update({"unreadable ranges": 1, "unreadable bytes": where.get("bytes", 0)})
            yield RawRow(posixpath.basename(where["file"]), None, None, "unreadable", where["damage"])
            return
        urls = self.options.fetch_urls and where["image"] in _URL_NAMES
        with storage.open_read(where["file"]) as stream:
            parquet = _open_parquet(stream, where["file"])
            has_key = "key" in parquet.schema_arrow.names
            wanted = [where["image"], where["caption"], *(["key"] if has_key else [])]
            batches = parquet.iter_batches(
                URLS_AT_ONCE if urls else IMAGES_AT_ONCE, row_groups=[where["group"]], columns=wanted,
                use_threads=False,  # as in parquet_io.py
            )  # fmt: skip
            total, reason = parquet.metadata.row_group(where["group"]).num_rows, "fewer rows than its footer says"
            try:
                for batch in batches:
                    rows = batch.to_pylist()
                    unit.seen["record"] += len(rows)
                    own = [f"{where['group']:04d}-{number + n:06d}" for n in range(len(rows))]
                    keys = [_choose_key(row["key"], made) if has_key else made for row, made in zip(rows, own)]
                    number += len(rows)
                    fetch = urls or (self.options.fetch_urls and any(_is_address(row[where["image"]]) for row in rows))
                    yield from self._fetch_rows(keys, rows, where) if fetch else self._read_cells(keys, rows, where)
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, UserError):
                    raise
                reason = str(error).splitlines()[0][:120]
            for row_number in range(number, total):
                unit.seen["record"] += 1
                problem = f"{where['file']}: row group {where['group']} is readable up to row {number}, then: {reason}"
                yield RawRow(f"{where['group']:04d}-{row_number:06d}", None, None, "unreadable", problem)

    def _fetch_rows(self, keys: Sequence[str], rows: Sequence[Mapping], where: Mapping[str, Any]) -> Iterator[RawRow]:
        items = [(key, str(row[where["image"]] or ""), row[where["caption"]]) for key, row in zip(keys, rows)]
        return fetch_rows(items, self.options.fetch, where["file"])

    @staticmethod
    def _read_cells(keys: Sequence[str], rows: Sequence[Mapping], where: Mapping[str, Any]) -> Iterator[RawRow]:
        for key, row in zip(keys, rows):
            yield from read_images(key, row[where["image"]], row[where["caption"]], where["file"])


def read_images(key: str, image: Any, caption: object, file: str) -> Iterator[RawRow]:
    """The rows of an image cell. Each picture of a list is a row; captions of equal number are dealt one by one, others
    go to all."""
    if not isinstance(image, list) or (image and isinstance(image[0], int)):
        yield _read_image(key, image, caption, file)
        return
    if not image:
        yield RawRow(key, None, caption, "no_image", "the list is empty")
    dealt = isinstance(caption, list) and len(caption) == len(image)
    for number, one in enumerate(image):
        text = caption[number] if dealt and isinstance(caption, list) else caption
        yield _read_image(f"{key}-{number}" if len(image) > 1 else key, one, text, file)


def _read_image(key: str, image: Any, caption: object, file: str) -> RawRow:
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if _is_address(image):
        return RawRow(key, None, caption, "no_image", "an address: --fetch-urls fetches some, img2dataset many")
    if isinstance(image, str) and image:
        has_address = storage.is_remote(image) or image.startswith("/")
        return read_row(key, image if has_address else storage.join(posixpath.dirname(file), image), caption)
    if not image:
        return RawRow(key, None, caption, "no_image", "the cell is empty")
    try:
        return RawRow(key, bytes(image), caption)
    except (TypeError, ValueError):
        return RawRow(key, None, caption, "no_image", f"the cell holds a {type(image).__name__}, no image file")


def _choose_key(value: object, made: str) -> str:
    """The key that a row brings, or the one made for it where its cell is null, NaN or empty."""
    given = value is not None and value == value and str(value).strip() != ""
    return str(value) if given else made


def _is_address(image: object) -> bool:
    return isinstance(image, str) and image.startswith(("http://", "https://"))


def _may_hold_bytes(kind: pa.DataType) -> bool:
    return "binary" in str(kind) or "uint8" in str(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _may_hold_images(kind: pa.DataType, *, lists: int = 2) -> bool:
    """Lists of pictures, whose bytes may be a list, too; three lists in each other are the pixels of one picture."""
    if _is_list(kind):
        inner = kind.value_type
        return lists > 0 and (pa.types.is_uint8(inner) or _may_hold_images(inner, lists=lists - 1))
    if pa.types.is_struct(kind):
        return any(field.name in ("bytes", "path") for field in kind)
    if pa.types.is_dictionary(kind):
        return _may_hold_images(kind.value_type)
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return is_text(kind) or any(check(kind) for check in kinds)


def _open_parquet(stream: Any, uri: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(stream)
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).splitlines()[0][:120]
        raise DamagedTable(f"{uri}: not a readable parquet file ({reason})") from error

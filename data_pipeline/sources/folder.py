"""A folder of images, captions in files beside them or in a table of the folder (the imagefolder layout)."""

import csv
import io
import json
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from data_pipeline.formats.parquet_io import decode_table
from data_pipeline.formats.schema import fingerprint
from data_pipeline.sources.captions import Caption, choose_caption_column, decode_text, parse_fields
from data_pipeline.sources.seen import count_file
from data_pipeline.sources.source import (
    IMAGE_SUFFIXES,
    ROWS_PER_UNIT,
    FoundField,
    RawRow,
    SourceOptions,
    SourceUnit,
    count_by_suffix,
    find_examples,
    is_system_file,
    list_etags,
    list_existing,
    split_from_path,
    stamp_files,
)
from infra import storage
from infra.errors import UnavailableError, UserError
from infra.log import get_logger

# In the order in which they are looked for; NAME.jpg.txt comes after NAME.txt.
SIDECARS = ("txt", "caption", "text", "json")
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_COLUMNS = ("file_name", "file", "filename", "image", "path")

log = get_logger("sources")


@dataclass(frozen=True)
class FolderSource:
    """Images with captions in NAME.txt, .caption, .text or .json (any case, also NAME.jpg.txt) or metadata.{jsonl,csv,
    parquet} in their folder or one above it. Links to folders are followed."""

    uri: str
    options: SourceOptions = SourceOptions()  # noqa: RUF009 - frozen

    def list_units(self) -> list[SourceUnit]:
        root, etags = self.uri.rstrip("/") + "/", list_etags(self.uri)
        listed = storage.list_files(self.uri, links=True)
        files = [name for name in listed if not is_system_file(name.removeprefix(root))]
        if len(listed) > len(files):
            log.info("%s: %d files of desktop systems passed over", self.uri, len(listed) - len(files))
        names = [name for name in files if name.lower().endswith(_add_dots(IMAGE_SUFFIXES))]
        names = names or list_existing(self.uri, _add_dots(IMAGE_SUFFIXES), "images")  # which says what is wrong
        sidecars = {name.lower(): name for name in files if name.lower().endswith(_add_dots(SIDECARS))}
        by_uri = {name: _read_table(name, self.options.caption_column) for name in files if _is_table(name)}
        tables = Tables(root, by_uri)
        by_split: dict[str, list[list[object]]] = {}
        for name in names:
            row = self._describe_row(name, root, sidecars, tables, etags)
            by_split.setdefault(split_from_path(name.removeprefix(root)), []).append(row)
        # what a table names and nobody finds is a row that says so
        for name, caption_of_table in tables.find_missing({file.removeprefix(root) for file in files}):
            by_split.setdefault(split_from_path(name), []).append([name, None, None, {"caption": caption_of_table}])
        self._tell_rest(files, names, by_split)
        units = []
        for split, found in by_split.items():
            for first in range(0, len(found), ROWS_PER_UNIT):
                rows = found[first : first + ROWS_PER_UNIT]
                label = f"{split or 'all'}-{first // ROWS_PER_UNIT:05d}-{self._identify(rows)[:10]}"
                units.append(SourceUnit(label, split, {"rows": [_select_parts(row) for row in rows]}))
        return units

    def _identify(self, rows: list[list[object]]) -> str:
        """The fingerprint of a unit's rows. A caption in a JSON file also depends on the field that is asked for."""
        texts = [str(file).lower() for row in rows for file in _select_parts(row)[1:3]]
        field = self.options.caption_column if any(text.endswith(".json") for text in texts) else ""
        return fingerprint([rows, field] if field else rows)

    def list_fields(self) -> list[FoundField]:
        """Columns of the tables, each under the name of its first table."""
        found: dict[str, FoundField] = {}
        for uri in storage.list_files(self.uri, links=True):
            name = posixpath.basename(uri)
            if _is_table(uri):
                rows = _read_lines(uri)
                examples = find_examples(rows)
                for column in dict.fromkeys(column for row in rows for column in row):
                    kind = str(_infer_type([row.get(column) for row in rows]))
                    found.setdefault(column, FoundField(f"{name}: {column}", kind, examples.get(column, ""), len(rows)))
        return list(found.values())

    def _describe_row(
        self, name: str, root: str, sidecars: Mapping[str, str], tables: "Tables", etags: Mapping[str, str]
    ) -> list[object]:
        """Image, text file, their stamps, then a JSON file beside a text file and, last, the caption of a table: what
        names the row's content."""
        stem = name.rsplit(".", 1)[0]
        wanted = (f"{base}.{suffix}".lower() for base in (stem, name) for suffix in SIDECARS)
        texts = [sidecars[low] for low in wanted if low in sidecars]
        text = texts[0] if texts else None
        # where the text file is blank, the JSON file counts
        other = next((uri for uri in texts[1:] if uri.lower().endswith(".json")), None)
        stamps = stamp_files([uri for uri in (name, text, other) if uri], etags)
        # a JSON file may hold no caption: a table's then counts
        caption_of_table = tables.find(name.removeprefix(root)) if not text or text.lower().endswith(".json") else None
        more: list[object] = [] if other is None else [{"json": other.removeprefix(root)}]
        more += [] if caption_of_table is None else [{"caption": caption_of_table}]
        return [name.removeprefix(root), text.removeprefix(root) if text else None, *stamps, *more]

    def _tell_rest(self, files: Sequence[str], names: Sequence[str], by_split: Mapping[str, list]) -> None:
        """One line for files that are passed over, one for captions without an image, one for images without one."""
        read = {*names, *filter(_is_table, files)}
        rest = [name for name in files if name not in read and not name.lower().endswith(_add_dots(SIDECARS))]
        if rest:
            log.info("%s: %d files were not looked at: %s", self.uri, len(rest), count_by_suffix(rest))
        used = {file for rows in by_split.values() for row in rows for file in _select_parts(row)[1:3]}
        root = self.uri.rstrip("/") + "/"
        texts = [name for name in files if name not in read and name.lower().endswith(_add_dots(SIDECARS))]
        alone = [name for name in texts if name.removeprefix(root) not in used]
        if alone:
            log.info("%s: %d caption files belong to no image, e.g. %s", self.uri, len(alone), alone[0])
        silent = sum(row[1] is None and not isinstance(row[-1], dict) for rows in by_split.values() for row in rows)
        if silent:
            log.warning(
                "%s: %d of %d images have no caption. Read are NAME.%s and %s; found beside the images: %s", self.uri,
                silent, len(names), ", NAME.".join(SIDECARS), ", ".join(TABLES),
                count_by_suffix(rest + alone) or "nothing else",
            )  # fmt: skip

    def read_rows(self, unit: SourceUnit) -> Iterator[RawRow]:
        seen = unit.seen
        for name, text, other, *table in unit.where["rows"]:
            for file in filter(None, (name, text, other)):
                count_file(seen, file)
            try:
                field = self.options.caption_column
                info, caption = _read_sidecar(storage.join(self.uri, text), field) if text else ({}, None)
                if other and isinstance(caption, bytes) and not caption.strip():
                    info, caption = _read_sidecar(storage.join(self.uri, other), field)
                caption = table[0] if table and (caption is None or isinstance(caption, Caption)) else caption
                is_absolute = name.startswith("/") or "://" in name
                image = storage.read_bytes(name if is_absolute else storage.join(self.uri, name))
            except UnavailableError:
                raise
            except UserError as error:
                yield RawRow(name, None, None, "unreadable", str(error))
                continue
            yield RawRow(name, image, caption, info=info)


class Tables:
    """Captions of metadata tables. Of several tables about an image the one in the nearest folder counts."""

    def __init__(self, root: str, by_uri: Mapping[str, Mapping[str, object]]) -> None:
        self._captions: dict[str, object] = {}
        for uri, captions in sorted(by_uri.items(), key=lambda item: item[0].count("/")):
            folder = posixpath.dirname(uri.removeprefix(root))
            self._captions.update({_locate(root, folder, name): text for name, text in captions.items()})

    def find(self, relative: str) -> object:
        """The caption of an image by its name below the root; None where no table lists it."""
        return self._captions.get(relative)

    def find_missing(self, files: AbstractSet[str]) -> list[tuple[str, object]]:
        """Names and captions of the images that a table lists and that are not there."""
        return [(name, text) for name, text in self._captions.items() if name not in files]


def _locate(root: str, folder: str, name: str) -> str:
    """Where a table in `folder` says an image lies: its name below the root, or a whole address outside of it."""
    if "://" in name:
        return name.removeprefix(root)
    if name.startswith("/"):
        return name.removeprefix(os.path.abspath(root).rstrip("/") + "/")
    return posixpath.normpath(posixpath.join(folder, name))


def _read_table(uri: str, caption_column: str) -> dict[str, object]:
    """File name to caption. Several lines about one file are several captions."""
    rows = _read_lines(uri)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if not rows:
        return {}
    name_column = next((name for name in FILE_COLUMNS if name in columns), None)
    if name_column is None:
        raise UserError(f"{uri}: no column {FILE_COLUMNS[0]}; it has {', '.join(columns)}")
    types = {name: _infer_type([row.get(name) for row in rows]) for name in columns if name != name_column}
    caption = choose_caption_column(types, caption_column, uri)
    found: dict[str, Any] = {}
    for row in rows:
        name, text = str(row.get(name_column)).replace("\\", "/"), row.get(caption)
        found[name] = text if name not in found else _join(found[name], text)
    return found


def _read_lines(uri: str) -> list[dict[str, Any]]:
    """The rows of a table. Lines of JSON that cannot be read are told; their images then have no caption."""
    data = storage.read_bytes(uri)
    if uri.lower().endswith(".parquet"):
        return decode_table(data, uri).to_pylist()
    try:
        text = decode_text(data)
        if uri.lower().endswith(".csv"):
            csv.field_size_limit(len(text) + 1)  # a caption may be longer than the module's limit
            return [{name: value for name, value in row.items() if name} for row in csv.DictReader(io.StringIO(text))]
    except UnicodeError as error:
        raise UserError(f"{uri}: a table of captions that is not UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{uri}: no table of comma-separated values ({error})") from error
    rows, bad = [], 0
    for line in filter(str.strip, text.split("\n")):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad += 1
    if bad:
        log.warning("%s: %d lines are no JSON objects and were passed over", uri, bad)
    return rows


def _infer_type(values: Sequence[object]) -> pa.DataType:
    """Arrow type of a column. If values have several types and one is a text, the column counts as text; the other
    values are then set aside row by row."""
    try:
        return pa.string() if any(isinstance(value, str) for value in values) else pa.infer_type(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.string() if any(isinstance(value, list) for value in values) else pa.null()


def _join(first: Any, second: Any) -> list[Any]:
    return [*(first if isinstance(first, list) else [first]), *(second if isinstance(second, list) else [second])]


def _read_sidecar(uri: str, field: str) -> tuple[dict[str, Any], object]:
    """(fields of a JSON file, the caption: the field `field` where one is)."""
    data = storage.read_bytes(uri)
    return parse_fields(data, field) if uri.lower().endswith(".json") else ({}, data)


def _is_table(uri: str) -> bool:
    return posixpath.basename(uri).lower() in TABLES


def _select_parts(row: Sequence[Any]) -> tuple[Any, ...]:
    """The part of a listed row that is needed to read it: its image, its text file, a JSON file beside that and, if a
    table has one, its caption."""
    more = {name: value for part in row[2:] if isinstance(part, dict) for name, value in part.items()}
    return (row[0], row[1], more.get("json"), *([more["caption"]] if "caption" in more else []))


def _add_dots(suffixes: Sequence[str]) -> tuple[str, ...]:
    return tuple(f".{suffix}" for suffix in suffixes)

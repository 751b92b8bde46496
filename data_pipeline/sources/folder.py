"""A folder of images, captions in files beside them or in a table of the folder (the imagefolder layout)."""

import csv
import io
import json
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from data_pipeline.formats.parquet_io import decode_table
from data_pipeline.formats.schema import fingerprint
from data_pipeline.sources.captions import choose_caption_column, find_caption
from data_pipeline.sources.seen import count_file
from data_pipeline.sources.source import (
    IMAGE_SUFFIXES,
    ROWS_PER_UNIT,
    FoundField,
    RawRow,
    SourceOptions,
    SourceUnit,
    find_examples,
    is_dropping,
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
        files = [name for name in listed if not is_dropping(name.removeprefix(root))]
        if len(listed) > len(files):
            log.info("%s: %d files of desktop systems passed over", self.uri, len(listed) - len(files))
        names = [name for name in files if name.lower().endswith(_dotted(IMAGE_SUFFIXES))]
        names = names or list_existing(self.uri, _dotted(IMAGE_SUFFIXES), "images")  # which says what is wrong
        sidecars = {name.lower(): name for name in files if name.lower().endswith(_dotted(SIDECARS))}
        tables = self._read_tables([name for name in files if posixpath.basename(name) in TABLES])
        by_split: dict[str, list[list[object]]] = {}
        for name in names:
            row = self._row(name, root, sidecars, tables, etags)
            by_split.setdefault(split_from_path(name.removeprefix(root)), []).append(row)
        # what a table names and nobody finds is a row that says so
        for name, said in tables.find_missing(files):
            row = [name.removeprefix(root), None, None, {"caption": said}]
            by_split.setdefault(split_from_path(name.removeprefix(root)), []).append(row)
        self._tell_rest(files, names, by_split)
        units = []
        for split, found in by_split.items():
            for first in range(0, len(found), ROWS_PER_UNIT):
                rows = found[first : first + ROWS_PER_UNIT]
                label = f"{split or 'all'}-{first // ROWS_PER_UNIT:05d}-{fingerprint(rows)[:10]}"
                units.append(SourceUnit(label, split, {"rows": [_where(row) for row in rows]}))
        return units

    def list_fields(self) -> list[FoundField]:
        """Columns of the tables, each under the name of its first table."""
        found: dict[str, FoundField] = {}
        for uri in storage.list_files(self.uri, links=True):
            name = posixpath.basename(uri)
            if name in TABLES:
                rows = _read_lines(uri)
                examples = find_examples(rows)
                for column in dict.fromkeys(column for row in rows for column in row):
                    kind = str(_infer_type([row.get(column) for row in rows]))
                    found.setdefault(column, FoundField(f"{name}: {column}", kind, examples.get(column, ""), len(rows)))
        return list(found.values())

    def _row(
        self, name: str, root: str, sidecars: Mapping[str, str], tables: "Tables", etags: Mapping[str, str]
    ) -> list[object]:
        """Image, text file, stamps of both and, last, the caption of a table: what names the row's content."""
        stem = name.rsplit(".", 1)[0]
        wanted = (f"{base}.{suffix}".lower() for base in (stem, name) for suffix in SIDECARS)
        text = next((sidecars[low] for low in wanted if low in sidecars), None)
        stamps = stamp_files([uri for uri in (name, text) if uri], etags)
        said = None if text else tables.find(name)
        more = [] if said is None else [{"caption": said}]
        return [name.removeprefix(root), text.removeprefix(root) if text else None, *stamps, *more]

    def _read_tables(self, uris: Sequence[str]) -> "Tables":
        return Tables({uri: _read_table(uri, self.options.caption_column) for uri in uris})

    def _tell_rest(self, files: Sequence[str], names: Sequence[str], by_split: Mapping[str, list]) -> None:
        """One line for files that are passed over, one for captions without an image, one for images without one."""
        read = {*names, *(name for name in files if posixpath.basename(name) in TABLES)}
        rest = [name for name in files if name not in read and not name.lower().endswith(_dotted(SIDECARS))]
        counts = Counter(posixpath.splitext(name)[1].lower() or "no suffix" for name in rest)
        beside = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(8))
        if rest:
            log.info("%s: %d files were not looked at: %s", self.uri, len(rest), beside)
        used = {row[1] for rows in by_split.values() for row in rows}
        root = self.uri.rstrip("/") + "/"
        texts = [name for name in files if name not in read and name.lower().endswith(_dotted(SIDECARS))]
        alone = [name for name in texts if name.removeprefix(root) not in used]
        if alone:
            log.info("%s: %d caption files belong to no image, e.g. %s", self.uri, len(alone), alone[0])
        silent = sum(row[1] is None and not isinstance(row[-1], dict) for rows in by_split.values() for row in rows)
        if silent:
            log.warning(
                "%s: %d of %d images have no caption. Read are NAME.%s and %s; found beside the images: %s", self.uri,
                silent, len(names), ", NAME.".join(SIDECARS), ", ".join(TABLES), beside or "nothing else",
            )  # fmt: skip

    def read_rows(self, unit: SourceUnit) -> Iterator[RawRow]:
        seen = unit.seen
        for name, text, *table in unit.where["rows"]:
            for file in filter(None, (name, text)):
                count_file(seen, file)
            try:
                caption = _read_sidecar(storage.join(self.uri, text)) if text else (table[0] if table else None)
                image = storage.read_bytes(storage.join(self.uri, name))
            except UnavailableError:
                raise
            except UserError as error:
                yield RawRow(name, None, None, "unreadable", str(error))
                continue
            yield RawRow(name, image, caption)


class Tables:
    """Captions of metadata tables: a table is about the images in its folder and below."""

    def __init__(self, by_uri: Mapping[str, Mapping[str, object]]) -> None:
        self._by_folder: dict[str, dict[str, object]] = {}
        for uri, captions in by_uri.items():
            self._by_folder.setdefault(posixpath.dirname(uri), {}).update(captions)

    def find(self, name: str) -> object:
        """The caption of an image's full name, from the nearest table that lists it; None where none does."""
        folder = posixpath.dirname(name)
        while self._by_folder and folder:
            known = self._by_folder.get(folder, {})
            relative = name[len(folder) + 1 :]
            if relative in known:
                return known[relative]
            above = posixpath.dirname(folder)
            folder = above if above != folder else ""
        return None

    def find_missing(self, files: Iterable[str]) -> list[tuple[str, object]]:
        """Names and captions of the images that a table lists and that are not there."""
        there = set(files) if self._by_folder else set()
        listed = {f"{folder}/{name}": said for folder, known in self._by_folder.items() for name, said in known.items()}
        return [(name, said) for name, said in listed.items() if name not in there]


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
        name, said = str(row.get(name_column)).removeprefix("./"), row.get(caption)
        found[name] = said if name not in found else _join(found[name], said)
    return found


def _read_lines(uri: str) -> list[dict[str, Any]]:
    """The rows of a table. Lines of JSON that cannot be read are told; their images then have no caption."""
    data = storage.read_bytes(uri)
    if uri.endswith(".parquet"):
        return decode_table(data, uri).to_pylist()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeError as error:
        raise UserError(f"{uri}: a table of captions that is not UTF-8") from error
    if uri.endswith(".csv"):
        return [{name: value for name, value in row.items() if name} for row in csv.DictReader(io.StringIO(text))]
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
        kind = pa.infer_type(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.string() if any(isinstance(value, str | list) for value in values) else pa.null()
    return kind


def _join(first: Any, second: Any) -> list[Any]:
    return [*(first if isinstance(first, list) else [first]), *(second if isinstance(second, list) else [second])]


def _read_sidecar(uri: str) -> object:
    data = storage.read_bytes(uri)
    if not uri.lower().endswith(".json"):
        return data
    try:
        held = json.loads(data)
    except ValueError:
        return {"a file that is no JSON": None}
    return find_caption(held) if isinstance(held, dict) else held


def _where(row: Sequence[Any]) -> tuple[Any, ...]:
    """The part of a listed row that is needed to read it: its image, its text file and, if a table has one, its
    caption."""
    return (row[0], row[1], *(part["caption"] for part in row[2:] if isinstance(part, dict)))


def _dotted(suffixes: Sequence[str]) -> tuple[str, ...]:
    return tuple(f".{suffix}" for suffix in suffixes)

"""What a source of raw images is, and what all of them need: rows, units of work, splits by folder, file stamps.

A unit's id names what it holds (path, size, time): a changed file is a new unit, an unchanged one is never redone.
"""

import posixpath
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from data_pipeline.sources.fetch import FetchError, FetchLimits, fetch
from data_pipeline.sources.seen import Seen
from infra import storage
from infra.errors import MissingError, UnavailableError, UserError
from infra.log import get_logger

IMAGE_SUFFIXES = (
    "jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "jfif", "jpe", "jp2", "heic", "heif", "jxl",
    "j2k", "j2c", "jpf", "jpx", "apng", "dib", "tga", "ppm", "pgm", "pbm", "pnm",
)  # fmt: skip
TEXT_SUFFIXES = ("txt", "text", "caption")
SPLITS = ("train", "val")
_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "test", "testing"), "val"),
}
_SYSTEM_FOLDERS = ("__macosx", "@eadir", ".spotlight-v100", ".trashes", ".fseventsd")
_SYSTEM_FILES = (".ds_store", "thumbs.db", "desktop.ini", "ehthumbs.db")
ROWS_PER_UNIT = 500  # of sources that list single files
MAX_IMAGE_BYTES = 256 * 2**20
_DEAD_ROWS = 10  # with so many URLs of a file and not one answer, the network is down, not the images gone


log = get_logger("sources")


class RawRow(NamedTuple):
    """One row as found. `status` is ok or says what was wrong with the container's entry."""

    key: str
    image: bytes | None
    caption: object
    """As the source has it: `captions.read_caption` says what of it is a caption."""
    status: str = "ok"
    reason: str = ""
    info: Mapping[str, Any] = {}


@dataclass(frozen=True)
class SourceUnit:
    """The input of one ingest task. Only the source that listed it understands `where`. `split` is "" if pack
    decides."""

    id: str
    split: str
    where: Mapping[str, Any]
    seen: Seen = field(default_factory=Seen, compare=False)
    """What `read_rows` has seen so far."""


@dataclass(frozen=True)
class FoundField:
    """A column of a table, or a field of the JSON beside a picture, as `lint` shows it. A source with tables lists
    its columns by a method `list_fields()`."""

    name: str
    type: str
    example: str = ""
    rows: int = 0
    """Rows that have it, where rows were counted."""


@dataclass(frozen=True)
class SourceOptions:
    """Options for all sources from the command line; each source uses those that concern it."""

    image_column: str = ""
    """Tables: the column with image bytes or a path; "" finds it by name."""
    caption_column: str = ""
    """Tables: the column with the caption; "" finds it by name."""
    fetch_urls: bool = False
    """Parquet: fetch the images that a url column names."""
    fetch: FetchLimits = FetchLimits()  # noqa: RUF009 - frozen


class Source(Protocol):
    """A layout that raw images come in, made as `Class(uri, options)`. It is pickled: it must hold no open file."""

    def list_units(self) -> list[SourceUnit]:
        """The units of work, which the driver gives to workers. A unit's id must change when its content changes, but
        it is made without reading the content."""
        ...

    def read_rows(self, unit: SourceUnit) -> Iterator[RawRow]:
        """The rows of one unit, in a worker. What cannot be read is a row with a status; a dead store raises.

        What it sees below the rows it may count in `unit.seen`: ingest states it.
        """
        ...


def list_etags(uri: str) -> Mapping[str, str]:
    """ETags of all objects below an s3:// prefix, from one listing, for `stamp_file`; empty for local files."""
    return storage.read_etags(uri) if storage.is_remote(uri) else {}


def stamp_file(uri: str, etags: Mapping[str, str] = {}) -> list[object]:
    """A stamp that changes when a file changes, made without reading it: files of equal name and stamp are equal."""
    if storage.is_remote(uri):
        return [etags[uri] if uri in etags else storage.read_etags(uri)[uri]]
    path = storage.local_path(uri)
    if path.is_symlink() and not path.exists():
        return ["a link to nothing"]  # reading it says so
    # not the contents: a terabyte would have to be read to learn that nothing changed. Copying without times (cp
    # without -p) makes other stamps, so other units
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def stamp_files(uris: Sequence[str], etags: Mapping[str, str] = {}) -> list[object]:
    """`stamp_file` of each; None for a file that is not there, whose row will say so."""
    found: list[object] = []
    for uri in uris:
        try:
            found.append(stamp_file(uri, etags))
        except (FileNotFoundError, KeyError):
            found.append(None)
    return found


def parse_split(word: str) -> str:
    """train or val for what data sets call train, val, validation, dev or test: the held-out are not trained on."""
    return _SPLIT_NAMES.get(word.lower(), "")


def split_from_path(relative: str) -> str:
    """train/00000.tar belongs to train, validation/00000.tar to val; what lies in no such folder to no split."""
    first, slash, _ = relative.partition("/")
    return parse_split(first) if slash else ""


def is_system_file(name: str) -> bool:
    """AppleDouble files (._NAME), __MACOSX/, .DS_Store, Thumbs.db and the like."""
    *folders, file = name.lower().split("/")
    return file.startswith("._") or file in _SYSTEM_FILES or any(folder in _SYSTEM_FOLDERS for folder in folders)


def list_existing(uri: str, suffixes: tuple[str, ...], what: str) -> list[str]:
    """Files of a folder with these endings, or the file itself; UserError when there are none."""
    root, listed = uri.rstrip("/") + "/", storage.list_files(uri, links=True)
    named = [name for name in listed if name.lower().endswith(suffixes)]
    found = [name for name in named if not is_system_file(name.removeprefix(root))]
    if len(named) > len(found):
        log.info("%s: %d files of desktop systems passed over", uri, len(named) - len(found))
    if not found:
        if not storage.exists(uri) and (storage.is_remote(uri) or not storage.local_path(uri).is_dir()):
            raise MissingError(f"{uri}: no such file or folder; the source must name existing {what}")
        suffixes_found = count_by_suffix(listed) or "nothing"
        raise UserError(f"{uri}: holds no {what} ({', '.join(suffixes[:4])}): nothing to do; it holds {suffixes_found}")
    return found


def count_by_suffix(names: Sequence[str]) -> str:
    """`2 .xml (a.xml), 1 .tsv (all.tsv)`: the first of each as an example."""
    by_suffix: dict[str, list[str]] = {}
    for name in names:
        by_suffix.setdefault(posixpath.splitext(name)[1].lower() or "no suffix", []).append(posixpath.basename(name))
    ordered = sorted(by_suffix.items(), key=lambda item: -len(item[1]))
    return ", ".join(f"{len(found)} {suffix} ({found[0]})" for suffix, found in ordered[:8])


def read_row(key: str, uri: str, caption: object) -> RawRow:
    """A row whose image is a file. One that cannot be read is a row with that status; a store that is down raises."""
    try:
        return RawRow(key, storage.read_bytes(uri), caption)
    except UnavailableError:
        raise
    except UserError as error:
        return RawRow(key, None, caption, "unreadable", str(error))


def find_examples(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The first value of each column that is there, as text."""
    found: dict[str, str] = {}
    for row in rows:
        for name, value in row.items():
            if value is not None and name not in found:
                found[name] = str(value)[:80]
    return found


def draw_one(seed: str, choices: Sequence[str]) -> str:
    """One of several, the same one every time for the same row."""
    return random.Random(seed).choice(list(choices))


def fetch_rows(items: Sequence[tuple[str, str, str | None]], limits: FetchLimits, where: str) -> Iterator[RawRow]:
    """(key, url, caption) to rows, in order; failed downloads are counted rows."""

    def one(item: tuple[str, str, str | None]) -> tuple[RawRow, bool]:
        key, url, caption = item
        try:
            return RawRow(key, fetch(url, limits), caption, info={"url": url}), False
        except FetchError as error:
            return RawRow(key, None, caption, error.status, error.reason, {"url": url}), error.network

    with ThreadPoolExecutor(limits.threads) as pool:
        done = list(pool.map(one, items))
    if len(done) >= _DEAD_ROWS and all(network for _, network in done):
        raise UnavailableError(f"{where}: not one of {len(done)} URLs answered: is the network up? Run it again then")
    yield from (row for row, _ in done)

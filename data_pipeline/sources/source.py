"""What a source of raw images is, and what all of them need: rows, units of work, splits by folder, file stamps.

A unit's id names what it holds (path, size, time): a changed file is a new unit, an unchanged one is never redone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from infra import storage
from infra.errors import MissingError, UnavailableError, UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif")
TEXT_SUFFIXES = ("txt", "text", "caption")
SPLITS = ("train", "val")
_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "test", "testing"), "val"),
}
FOLDER_ROWS = 500
MAX_IMAGE_BYTES = 256 * 2**20


class RawRow(NamedTuple):
    """One row as found. `status` is ok or says what was wrong with the container's entry."""

    key: str
    image: bytes | None
    caption: bytes | str | None
    status: str = "ok"
    reason: str = ""
    info: Mapping[str, Any] = {}


@dataclass(frozen=True)
class SourceUnit:
    """What one ingest task reads: `where` is for the source that listed it. `split` is "" where pack decides."""

    id: str
    split: str
    where: Mapping[str, Any]


class Source(Protocol):
    """A kind of input."""

    def units(self) -> list[SourceUnit]: ...

    def rows(self, unit: SourceUnit) -> Iterator[RawRow]: ...


def etags_below(uri: str) -> Mapping[str, str]:
    """For `stamp`: what one listing says of all objects there; nothing for local files."""
    return storage.etags(uri) if storage.is_remote(uri) else {}


def stamp(uri: str, etags: Mapping[str, str] = {}) -> list[object]:
    """What changes when a file changes, without reading it: equal names and stamps are equal contents."""
    if storage.is_remote(uri):
        return [etags[uri] if uri in etags else storage.etags(uri)[uri]]
    state = storage.local_path(uri).stat()
    return [state.st_size, state.st_mtime_ns]


def marks(uris: Sequence[str], etags: Mapping[str, str] = {}) -> list[object]:
    """`stamp` of each; None for a file that is not there, whose row will say so."""
    found: list[object] = []
    for uri in uris:
        try:
            found.append(stamp(uri, etags))
        except (FileNotFoundError, KeyError):
            found.append(None)
    return found


def split_name(word: str) -> str:
    """train or val for what data sets call train, val, validation, dev or test: the held-out are not trained on."""
    return _SPLIT_NAMES.get(word.lower(), "")


def split_of(relative: str) -> str:
    """train/00000.tar belongs to train, validation/00000.tar to val; what lies in no such folder to no split."""
    first, slash, _ = relative.partition("/")
    return split_name(first) if slash else ""


def existing(uri: str, suffixes: tuple[str, ...], what: str) -> list[str]:
    """Files of a folder with these endings, or the file itself; UserError when there are none."""
    found = [name for name in storage.list_files(uri) if name.lower().endswith(suffixes)]
    if not found:
        if not storage.exists(uri) and (storage.is_remote(uri) or not storage.local_path(uri).is_dir()):
            raise MissingError(f"{uri}: no such file or folder; the source must name existing {what}")
        raise UserError(f"{uri}: holds no {what} ({', '.join(suffixes[:4])}): nothing to do")
    return found


def read_row(key: str, uri: str, caption: bytes | str | None) -> RawRow:
    """A row whose image is a file. One that cannot be read is a row with that status; a store that is down raises."""
    try:
        return RawRow(key, storage.read_bytes(uri), caption)
    except UnavailableError:
        raise
    except UserError as error:
        return RawRow(key, None, caption, "unreadable", str(error))

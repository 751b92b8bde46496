"""Tars as people really have them: joined, compressed under any name, padded, cut short, with holes.

`tarfile` reads headers and members; what it would pass over without a word is found here. Every byte of a file becomes
a `Member`, a `Gap` that says where and how long it is, or is the padding that the format asks for.
"""

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from data_pipeline.images import count_hole
from infra.errors import UserError

BLOCK = tarfile.BLOCKSIZE
# Two zero blocks end an archive, and writers fill its last record of 20 blocks (the default of GNU tar and Python). A
# longer run of zeros is a hole: a file that was allocated in advance, or a download that never finished.
MAX_PADDING = 2 * BLOCK + tarfile.RECORDSIZE - BLOCK
_CHUNK = 2**20
_MARK_AT = 257  # of "ustar" in a header
_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_FOREIGN = {b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip", b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!": "rar"}


@dataclass(frozen=True)
class Member:
    """A regular file of the archive; `archive` counts the archives that are joined in one file, from 0.

    `data` is None for what is no file or exceeds the caller's limit; `doubtful` says why the data is not to be trusted.
    """

    info: tarfile.TarInfo
    offset: int
    archive: int
    data: bytes | None
    doubtful: str = ""


@dataclass(frozen=True)
class Gap:
    """Bytes that belong to no member. `cut` is true where the file is incomplete rather than mixed with other data."""

    offset: int
    length: int
    reason: str
    cut: bool = False

    def join(self, other: "Gap") -> "Gap":
        """One gap for two neighbours."""
        length = other.offset + other.length - self.offset
        return Gap(self.offset, length, f"{self.reason}; {other.reason}", self.cut or other.cut)


def read_tar(file: BinaryIO, *, max_bytes: int) -> Iterator[Member | Gap]:
    """Members and gaps in the order of their offsets (in the unpacked bytes, where the file is compressed).

    Data of members above `max_bytes` is not read. Errors of the file end in a `Gap`; those of a store are raised.
    """
    gap: Gap | None = None
    for item in _read_parts(_Unpacked(file), max_bytes):
        if isinstance(item, Gap) and gap is not None:
            gap = gap.join(item)
        elif isinstance(item, Gap):
            gap = item
        else:
            if gap is not None:
                yield gap
            gap = None
            yield item
    if gap is not None:
        yield gap


def _read_parts(stream: "_Unpacked", max_bytes: int) -> Iterator[Member | Gap]:
    at, archive = 0, 0
    while True:
        end = yield from _read_archive(stream, at, archive, max_bytes=max_bytes)
        broken = end == at and _is_header(stream.read_at(at, BLOCK))  # else the search would find it again
        following = _find_header(stream, end, skip=BLOCK if broken else 0)
        yield from following.gaps(ended=end > 0)
        if following.header is None:
            if stream.error:
                yield Gap(stream.size_read, 0, stream.error, cut=True)
            return
        at, archive = following.header, archive + 1


def _read_archive(
    stream: "_Unpacked", start: int, number: int, *, max_bytes: int
) -> Generator[Member, None, int]:
    """Members of the archive that begins at `start`; returns the offset behind the last whole one."""
    end = start
    stream.seek(start)
    try:
        archive = tarfile.open(fileobj=cast(BinaryIO, stream), mode="r:")  # noqa: SIM115 - holds nothing of its own
        while (info := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # it would remember every header
            data = None
            if info.isfile() and info.size <= max_bytes:
                content = archive.extractfile(info)
                data = content.read() if content else b""
            stop = info.offset_data + info.size
            if info.isreg() and not info.issparse() and info.size and not stream.read_at(stop - 1, 1):
                break  # its data is not all there
            doubtful = _describe_hole(stream, data, stop)
            end = archive.offset
            yield Member(info, info.offset, number, data, doubtful)
    except UserError:
        raise
    except (tarfile.TarError, EOFError, OSError, ValueError):
        pass  # `end` says how far it could be read
    return end


def _describe_hole(stream: "_Unpacked", data: bytes | None, stop: int) -> str:
    """Why data that ends at `stop` is not to be trusted: its end is zeros, and so is the rest of the file or much of
    it."""
    zeros = count_hole(data or b"")
    if not zeros or any(stream.read_at(stop, MAX_PADDING + BLOCK)):
        return ""
    return f"its last {zeros:,} bytes are zeros, and so is what follows: an unfinished or preallocated file?"


@dataclass(frozen=True)
class _Following:
    """What lies behind an archive: a run of zeros, then bytes that are no header, then perhaps another archive."""

    at: int
    zeros: int
    other: int
    header: int | None
    kind: str = ""

    def gaps(self, *, ended: bool) -> Iterator[Gap]:
        """`ended`: an archive came before, so that a run of zeros may be its end mark and padding."""
        last = self.header is None
        if self.zeros > MAX_PADDING:
            reason = f"{self.zeros:,} bytes of zeros from byte {self.at:,} on: an unfinished or preallocated file?"
            yield Gap(self.at, self.zeros, reason, cut=True)
        elif ended and last and not self.other and self.zeros < 2 * BLOCK:
            yield Gap(self.at, self.zeros, f"no end-of-archive mark at byte {self.at:,}: cut short?", cut=True)
        if self.other:
            what = self.kind or ("no whole member: cut short?" if last else "no part of a tar")
            reason = f"{self.other:,} bytes from byte {self.at + self.zeros:,} on are {what}"
            yield Gap(self.at + self.zeros, self.other, reason, cut=last and not self.kind)


def _find_header(stream: "_Unpacked", at: int, *, skip: int) -> _Following:
    """The next header at or behind `at` + `skip`; a header in the skipped bytes is known to lead nowhere."""
    start, zeros = (at + skip, 0) if skip else _skip_zeros(stream, at)
    if start is None:
        return _Following(at, zeros, 0, None)
    kind = _name_kind(stream.read_at(start, 8)) if not skip else ""
    position = start
    while True:
        chunk = stream.read_at(position, _CHUNK + BLOCK)
        found = _search(chunk, aligned=(at - position) % BLOCK)
        if found is not None:
            header = position + found
            return _Following(at, zeros, header - at - zeros, header, kind)
        if len(chunk) < _CHUNK + BLOCK:
            return _Following(at, zeros, position + len(chunk) - at - zeros, None, kind)
        position += _CHUNK


def _name_kind(beginning: bytes) -> str:
    """What foreign bytes are, by their magic number."""
    for magic, name in _FOREIGN.items():
        if beginning.startswith(magic):
            return f"{name} data: unpack it first"
    return "compressed data behind a tar" if any(beginning.startswith(magic) for magic in _OPENERS) else ""


def _search(chunk: bytes, *, aligned: int) -> int | None:
    """Offset of the first whole header in a chunk: POSIX ones by their mark, older ones in the archive's blocks."""
    found = [
        block for block in range(aligned, len(chunk) - BLOCK + 1, BLOCK)
        if chunk[block] and _is_header(chunk[block : block + BLOCK])
    ][:1]  # fmt: skip
    mark = chunk.find(b"ustar", _MARK_AT)
    while mark >= 0 and not (found and found[0] <= mark - _MARK_AT):
        if _is_header(chunk[mark - _MARK_AT : mark - _MARK_AT + BLOCK]):
            return mark - _MARK_AT
        mark = chunk.find(b"ustar", mark + 1)
    return found[0] if found else None


def _is_header(block: bytes) -> bool:
    """A block whose checksum is right (POSIX.1-1988, ustar)."""
    if len(block) < BLOCK:
        return False
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _skip_zeros(stream: "_Unpacked", at: int) -> tuple[int | None, int]:
    """(offset of the first byte behind `at` that is not zero, or None, and how many zeros come before)."""
    position = at
    while chunk := stream.read_at(position, _CHUNK):
        rest = chunk.lstrip(b"\0")
        if rest:
            position += len(chunk) - len(rest)
            return position, position - at
        position += len(chunk)
    return None, position - at


class _Unpacked:
    """The bytes of a file, unpacked where it is compressed, whatever its name says. An error becomes its end.

    Only what lies within the last `_KEEP` bytes may be sought again, which is what `tarfile` and the search need.
    """

    _KEEP = 4 * _CHUNK

    def __init__(self, file: BinaryIO) -> None:
        beginning = file.read(8)
        file.seek(0)
        opener = next((opener for magic, opener in _OPENERS.items() if beginning.startswith(magic)), None)
        self._raw = file if opener is None else None
        self._source: Any = file if opener is None else opener(file)
        self._window, self._first, self._at = bytearray(), 0, 0
        self.error = ""
        """Why the file could not be read to its end; "" where it could."""

    @property
    def size_read(self) -> int:
        return self._first + len(self._window)

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET, "tarfile seeks from the start"
        self._at = offset
        return offset

    def read_at(self, offset: int, size: int) -> bytes:
        self._at = offset
        return self.read(size)

    def read(self, size: int) -> bytes:
        if self._at < self._first:
            self._rewind()
        while self.size_read < self._at + size and self._fill(self._at + size - self.size_read):
            spare = min(self._at - self._first, len(self._window)) - self._KEEP
            if spare > _CHUNK:
                del self._window[:spare]
                self._first += spare
        start = self._at - self._first
        data = bytes(self._window[start : start + size]) if start >= 0 else b""
        self._at += len(data)
        return data

    def _fill(self, wanted: int) -> bool:
        if self.error:
            return False
        if self._raw is not None and self._at > self.size_read + self._KEEP:  # nobody asks for what lies between
            self._first, self._window = self._at, bytearray()
            self._raw.seek(self._at)
        try:
            # in small pieces: what was unpacked before an error stays
            data = self._source.read(min(max(wanted, 2**16), _CHUNK)) if self._raw else self._source.read1(2**16)
        except UserError:
            raise
        except (EOFError, OSError, ValueError, lzma.LZMAError, zlib.error) as error:
            self.error = f"readable up to byte {self.size_read:,}, then: {str(error) or type(error).__name__}"
            return False
        self._window += data
        return bool(data)

    def _rewind(self) -> None:
        """Rare: a gap longer than the window is read again."""
        self._source.seek(self._at)
        self._window, self._first = bytearray(), self._at

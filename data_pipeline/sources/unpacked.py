"""The bytes of a file, unpacked where it is compressed (gzip, bzip2, xz), whatever its name says.

Compressed parts may be joined, also with padding of zeros between them. What lies behind the last of them and is not
compressed is passed on as it is.
"""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from infra.errors import UserError

_CHUNK = 2**20
# Packed bytes that are unpacked at a time: what the piece with an error would have given is lost, and bzip2 can make
# 20,000 times as much of them.
_PACKED = 2**10
_MAGIC = 6  # bytes
_OPENERS: dict[bytes, Callable[[], Any]] = {
    b"\x1f\x8b\x08": lambda: zlib.decompressobj(wbits=31),
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\x00": lzma.LZMADecompressor,
}


def find_opener(beginning: bytes) -> Callable[[], Any] | None:
    """What unpacks a file that begins so; None where it is not compressed in a known way."""
    return next((opener for magic, opener in _OPENERS.items() if beginning.startswith(magic)), None)


class _Parts:
    """The compressed parts of a file and what lies behind them, as one stream."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._part, self._plain, self._packed = file, None, False, b""
        file.seek(0)

    def read(self) -> bytes:
        """Some bytes; none at the end. EOFError or the decompressor's error where a part is damaged."""
        while True:
            self._packed = self._packed or self._file.read(_CHUNK if self._plain else _PACKED)
            if not self._packed:
                if self._part is not None:
                    raise EOFError("the file ends before its compressed part does")
                return b""
            if self._part is None and not self._plain:
                self._begin()
            elif self._plain:
                data, self._packed = self._packed, b""
                return data
            elif data := self._unpack():
                return data

    def count_lost(self) -> int:
        """Packed bytes from the error on; 0 where the file just ends too early."""
        at = self._file.tell()
        return self._file.seek(0, io.SEEK_END) - at + len(self._packed)

    def _begin(self) -> None:
        self._packed = self._packed.lstrip(b"\0")
        while self._packed and len(self._packed) < _MAGIC and (more := self._file.read(_PACKED)):
            self._packed += more
        if self._packed:
            opener = find_opener(self._packed)
            self._part, self._plain = (opener(), False) if opener else (None, True)

    def _unpack(self) -> bytes:
        part: Any = self._part
        data = part.decompress(self._packed)
        self._packed = part.unused_data if part.eof else b""
        self._part = None if part.eof else part
        return data


class Unpacked:
    """The bytes of a file, unpacked where it is compressed. An error becomes its end.

    Only what lies within the last `_KEEP` bytes may be sought again, which is what `tarfile` and the search need.
    """

    _KEEP = 4 * _CHUNK

    def __init__(self, file: BinaryIO) -> None:
        beginning = file.read(_MAGIC)
        file.seek(0)
        self._file, self._parts = file, _Parts(file) if find_opener(beginning) else None
        self._window, self._first, self._at = bytearray(), 0, 0
        self.error, self.lost = "", 0
        """Why the file could not be read to its end, and how many of its bytes are missed; "" where it could."""

    @property
    def size_read(self) -> int:
        return self._first + len(self._window)

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET, "tarfile seeks from the start"
        self._at = offset
        return offset

    def can_reach(self, offset: int) -> bool:
        """May bytes from this earlier offset on be read without unpacking the file again?"""
        return self._parts is None or offset >= self._first

    def read_at(self, offset: int, size: int) -> bytes:
        """`size` bytes from an offset on, fewer at the end."""
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
        if self._parts is None and self._at > self.size_read + self._KEEP:  # nobody asks for what lies between
            self._first, self._window = self._at, bytearray()
            self._file.seek(self._at)
        try:
            data = self._parts.read() if self._parts else self._file.read(min(max(wanted, 2**16), _CHUNK))
        except UserError:
            raise
        except (EOFError, OSError, ValueError, lzma.LZMAError, zlib.error) as error:
            self.error = f"readable up to byte {self.size_read:,}, then: {str(error) or type(error).__name__}"
            if self._parts:
                self.lost = self._parts.count_lost()
                self.error += f"; {self.lost:,} packed bytes are not read" if self.lost else ""
            return False
        self._window += data
        return bool(data)

    def _rewind(self) -> None:
        """Rare: a gap longer than the window is read again."""
        self._window, self._first = bytearray(), 0 if self._parts else self._at
        if self._parts:
            self._parts = _Parts(self._file)
        else:
            self._file.seek(self._at)

"""Reads and writes files by URI, in the same way for a local path and for s3://bucket/key (through s3.py).

Writes are atomic: a reader sees a whole object or none. Failures of disk or network become a UserError of one line
that names the URI.
"""

import contextlib
import hashlib
import io
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from infra.errors import DISK_FULL, MissingError, UnavailableError, UserError
from infra.s3 import find_error_code, get_endpoint, head_object, list_objects, on_s3

TEMP_SUFFIX = ".beeline-tmp"  # unfinished local writes; listings never show them
READ_AHEAD = 8 * 2**20
UPLOAD_PART = 32 * 2**20  # bytes; S3 allows 10,000 parts in an object, so objects of up to 320 GiB


def is_remote(uri: str) -> bool:
    """True for s3://; any other scheme than s3:// and file:// is refused."""
    scheme, found, _ = uri.partition("://")
    if found and scheme not in ("s3", "file"):
        raise UserError(f"{uri}: scheme {scheme}:// is not supported: use a local path or s3://bucket/prefix")
    return scheme == "s3" and bool(found)


def join(uri: str, *parts: str) -> str:
    """`join("s3://b/x/", "y", "z.tar")` is "s3://b/x/y/z.tar"; empty parts vanish."""
    pieces = [uri.rstrip("/") if uri != "/" else ""]
    pieces += [part.strip("/") for part in parts if part.strip("/")]
    return "/".join(pieces)


def sha256_hex(data: bytes) -> str:
    """SHA-256 in hex: the hash by which content is named everywhere."""
    return hashlib.sha256(data).hexdigest()


def exists(uri: str) -> bool:
    """Is there a file, or a folder holding something?"""
    if is_remote(uri):
        with on_s3(uri) as (fs, bucket, key):
            if key and head_object(fs, bucket, key) is not None:
                return True
            return next(list_objects(fs, bucket, key, page_size=1), None) is not None
    path = local_path(uri)
    with _convert_errors(uri):
        return path.is_file() or (path.is_dir() and any(True for _ in os.scandir(path)))


def get_size(uri: str) -> int:
    """Bytes of a file."""
    if is_remote(uri):
        with on_s3(uri) as (fs, bucket, key):
            head = head_object(fs, bucket, key)
            if head is None:
                raise FileNotFoundError(uri)
            return int(head["ContentLength"])
    with _convert_errors(uri):
        return local_path(uri).stat().st_size


def read_bytes(uri: str, start: int | None = None, length: int | None = None) -> bytes:
    """The content, or `length` bytes from `start`; fewer where the file ends."""
    first = start or 0
    if length == 0:
        return b""
    if is_remote(uri):
        with on_s3(uri) as (fs, bucket, key):
            wanted = {}
            if start is not None or length is not None:
                wanted = {"start": first, "end": None if length is None else first + length}
            try:
                return fs.cat_file(f"{bucket}/{key}", **wanted)
            except OSError as error:
                if find_error_code(error) in ("InvalidRange", "416"):  # start lies behind the end of the object
                    return b""
                raise
    with _convert_errors(uri), local_path(uri).open("rb") as file:
        file.seek(first)
        return file.read(-1 if length is None else length)


def write_bytes(uri: str, data: bytes) -> None:
    """Write the whole object, and replace an earlier one atomically."""
    if is_remote(uri):
        with on_s3(uri) as (fs, bucket, key):
            fs.pipe_file(f"{bucket}/{key}", data)
        return
    with _convert_errors(uri, len(data)), open_new_file(local_path(uri)) as file:
        file.write(data)


def upload(path: str | Path, uri: str) -> None:
    """Copy a local file to an object, read in pieces, and replace an earlier one atomically."""
    if is_remote(uri):
        with on_s3(uri) as (fs, bucket, key):
            fs.put_file(str(path), f"{bucket}/{key}", chunksize=UPLOAD_PART, max_concurrency=4)
        return
    with _convert_errors(uri), open(path, "rb") as source, open_new_file(local_path(uri)) as file:
        shutil.copyfileobj(source, file, READ_AHEAD)


def write_bytes_if_absent(uri: str, data: bytes) -> bool:
    """Write the object if none is there, and return True; else return False. Of several writers exactly one gets
    True."""
    if is_remote(uri):
        with on_s3(uri) as (fs, bucket, key):
            for _ in range(10):
                try:
                    fs.pipe_file(f"{bucket}/{key}", data, mode="create")
                    return True
                except OSError as error:
                    if isinstance(error, FileExistsError) or find_error_code(error) in ("PreconditionFailed", "412"):
                        return False
                    # S3 says 409 when another conditional put is in flight; that one may still fail, so ask again.
                    if find_error_code(error) not in ("ConditionalRequestConflict", "409"):
                        raise
            return False
    with _convert_errors(uri, len(data)), reserve_temp_path(local_path(uri)) as temp:
        with temp.open("wb") as file:
            file.write(data)
            _sync(file)
        try:
            os.link(temp, local_path(uri))
        except FileExistsError:
            return False
        _sync_folder(temp.parent)
        return True


def list_files(prefix: str, *, suffix: str = "", recursive: bool = True, links: bool = False) -> list[str]:
    """Full URIs of the files in a folder, sorted; [] if there is no such folder. For the URI of a file: this URI.

    `links`: follow local symbolic links to folders (but no loops), and list broken links too.
    """
    return sorted(iter_files(prefix, suffix=suffix, recursive=recursive, links=links))


def iter_files(prefix: str, *, suffix: str = "", recursive: bool = True, links: bool = False) -> Iterator[str]:
    """As `list_files`, unsorted and one by one: of a million names only one page is in memory."""
    if not is_remote(prefix):
        with _convert_errors(prefix):
            walked = _walk(local_path(prefix), prefix.rstrip("/") or "/", recursive=recursive, links=links)
            yield from (uri for uri in walked if uri.endswith(suffix))
        return
    with on_s3(prefix) as (fs, bucket, key):
        found_any = False
        for name in (item["Key"] for item in list_objects(fs, bucket, key, recursive=recursive)):
            found_any = found_any or not name.endswith("/")
            if name.endswith(suffix) and not name.endswith("/"):
                yield f"s3://{bucket}/{name}"
        if not found_any and key and key.endswith(suffix) and head_object(fs, bucket, key) is not None:
            yield f"s3://{bucket}/{key}"


def read_etags(uri: str) -> dict[str, str]:
    """ETags (content hashes by S3) of an s3:// object, or of all objects below a prefix, by full URI."""
    with on_s3(uri) as (fs, bucket, key):
        head = head_object(fs, bucket, key) if key else None
        items = [{"Key": key, **head}] if head else list_objects(fs, bucket, key)
        return {f"s3://{bucket}/{i['Key']}": i["ETag"] for i in items if not i["Key"].endswith("/")}


def delete(uri: str) -> None:
    """Remove one file; nothing happens when it is not there."""
    if is_remote(uri):
        with on_s3(uri) as (fs, bucket, key):
            fs.call_s3("delete_object", Bucket=bucket, Key=key)
        return
    with _convert_errors(uri):
        local_path(uri).unlink(missing_ok=True)


def open_read(uri: str) -> BinaryIO:
    """A seekable stream; s3:// objects are read in ranges of some MiB, each with retries."""
    if is_remote(uri):
        return cast(BinaryIO, io.BufferedReader(_Ranges(uri), READ_AHEAD))
    with _convert_errors(uri):
        return local_path(uri).open("rb")


def localize(uri: str, cache_dir: str | Path | None = None) -> Path:
    """Local path of a file or folder; s3:// is downloaded once per content (etags) into BEELINE_CACHE."""
    if not is_remote(uri):
        path = local_path(uri)
        if not path.exists():
            raise MissingError(f"{uri}: no such file or folder")
        return path
    root = Path(cache_dir) if cache_dir else cache_folder()
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    found = {name.removeprefix(f"s3://{bucket}/"): etag for name, etag in read_etags(uri).items()}
    if not found:
        raise MissingError(f"{uri}: no such object or prefix")
    folder = root / sha256_hex(repr((get_endpoint(), uri, sorted(found.items()))).encode())[:32]
    name = key.rstrip("/").rsplit("/", 1)[-1] or bucket
    if not (folder / name).exists():
        _download({n: n.removeprefix(key).strip("/") for n in found}, bucket=bucket, name=name, folder=folder)
    return folder / name


def cache_folder() -> Path:
    """The folder for copies of remote files and for uploads that wait. A rank's share of a checkpoint must fit on its
    disk."""
    return Path(os.environ.get("BEELINE_CACHE") or Path.home() / ".cache" / "beeline")


def _download(names: dict[str, str], *, bucket: str, name: str, folder: Path) -> None:
    """Download objects (`names`: key to path below `name`) to a temporary folder, then rename it to `folder`."""
    with _convert_errors(str(folder)):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temp = Path(tempfile.mkdtemp(suffix=TEMP_SUFFIX, dir=folder.parent))
    try:
        for key, below in names.items():
            target = (temp / name / below) if below else temp / name
            if ".." in Path(below).parts:
                raise UserError(f"s3://{bucket}/{key}: a key with '..' cannot become a local path; rename the object")
            with _convert_errors(str(target)), open_read(f"s3://{bucket}/{key}") as source:
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as out:
                    shutil.copyfileobj(source, out, READ_AHEAD)
        with _convert_errors(str(folder)):
            try:
                temp.rename(folder)
            except OSError:
                if not (folder / name).exists():  # else another process brought the same content first: it serves
                    raise
    finally:
        shutil.rmtree(temp, ignore_errors=True)


# --- local files


def local_path(uri: str) -> Path:
    """The path of a local URI, which may begin with file:// or ~."""
    return Path(uri.removeprefix("file://")).expanduser()


@contextlib.contextmanager
def reserve_temp_path(path: Path) -> Iterator[Path]:
    """A free temporary name in the folder of `path`. The folder is made if it is missing. A file of that name is
    removed at the end of the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.parent / f".{uuid.uuid4().hex}{TEMP_SUFFIX}"
    try:
        yield temp
    finally:
        temp.unlink(missing_ok=True)


@contextlib.contextmanager
def open_new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to. When the block ends it is synced to disk and replaces `path` atomically.

    OSErrors are not converted: `write_bytes` and `upload` make them a UserError."""
    with reserve_temp_path(path) as temp:
        with temp.open("wb") as file:
            yield file
            _sync(file)
        temp.replace(path)
        _sync_folder(path.parent)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Sync a folder to disk: without it a rename may be lost in a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _walk(path: Path, uri: str, *, recursive: bool, links: bool, above: tuple[str, ...] = ()) -> Iterator[str]:
    """URIs of the files below `path`. `links`: follow links to folders, but not back to one of the folders `above`, and
    yield broken links too."""
    if path.is_file():
        yield uri
        return
    above = (*above, os.path.realpath(path)) if links else ()
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(path):
            child = "/" + entry.name if uri == "/" else f"{uri}/{entry.name}"
            leads_nowhere = entry.is_symlink() and not os.path.exists(entry.path)  # also a link to itself
            if (links and leads_nowhere) or (not leads_nowhere and entry.is_file()):
                if not entry.name.endswith(TEMP_SUFFIX):
                    yield child
            elif recursive and entry.is_dir(follow_symlinks=links) and os.path.realpath(entry.path) not in above:
                yield from _walk(Path(entry.path), child, recursive=True, links=links, above=above)


@contextlib.contextmanager
def _convert_errors(uri: str, num_bytes: int | None = None) -> Iterator[None]:
    """Inside the block OSErrors become a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise MissingError(f"{uri}: no such file or folder") from error
    except (IsADirectoryError, NotADirectoryError, FileExistsError) as error:
        raise UserError(f"{uri}: a folder and a file stand in each other's way ({error.strerror})") from error
    except PermissionError as error:
        raise UserError(f"{uri}: permission denied: choose another place or change its owner") from error
    except OSError as error:
        if error.errno in DISK_FULL:
            size = f"{num_bytes:,} bytes" if num_bytes is not None else "the file"
            raise UserError(f"{uri}: disk full: {size} did not fit; free some space or choose another place") from error
        raise UserError(f"{uri}: {error.strerror or error}") from error


class _Ranges(io.RawIOBase):
    """A remote object as a raw stream; BufferedReader around it asks for READ_AHEAD bytes at a time."""

    def __init__(self, uri: str) -> None:
        self._uri, self._size, self._at = uri, get_size(uri), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        wanted = min(len(view), self._size - self._at)
        if wanted <= 0:
            return 0
        data = read_bytes(self._uri, self._at, wanted)
        if not data:
            raise UnavailableError(
                f"{self._uri}: ended at byte {self._at:,} of {self._size:,}: replaced while reading?"
            )
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

"""Files by URI: a local path or s3://bucket/key, behaving alike. The only module that knows fsspec and s3fs.

Writes are atomic (a reader sees a whole object or none). What goes wrong outside becomes one UserError line with the
URI. Longer than most files because nobody else may import s3fs.
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
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import urlsplit

from infra.errors import DISK_FULL, MissingError, UnavailableError, UserError

if TYPE_CHECKING:
    from s3fs import S3FileSystem

TEMP_SUFFIX = ".beeline-tmp"  # unfinished local writes; listings never show them
READ_AHEAD = 8 * 2**20
UPLOAD_PART = 32 * 2**20  # S3 takes 10,000 parts of an object


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
    """The hash that names content everywhere."""
    return hashlib.sha256(data).hexdigest()


def exists(uri: str) -> bool:
    """Is there a file, or a folder holding something?"""
    if is_remote(uri):
        with _s3(uri) as (fs, bucket, key):
            if key and _head(fs, bucket, key) is not None:
                return True
            return next(_list_s3(fs, bucket, key, page_size=1), None) is not None
    path = local_path(uri)
    with _local(uri):
        return path.is_file() or (path.is_dir() and any(True for _ in os.scandir(path)))


def size(uri: str) -> int:
    """Bytes of a file."""
    if is_remote(uri):
        with _s3(uri) as (fs, bucket, key):
            if (head := _head(fs, bucket, key)) is None:
                raise FileNotFoundError(uri)
            return int(head["ContentLength"])
    with _local(uri):
        return local_path(uri).stat().st_size


def read_bytes(uri: str, start: int | None = None, length: int | None = None) -> bytes:
    """The content, or `length` bytes from `start`; fewer where the file ends."""
    first = start or 0
    if length == 0:
        return b""
    if is_remote(uri):
        with _s3(uri) as (fs, bucket, key):
            wanted = {}
            if start is not None or length is not None:
                wanted = {"start": first, "end": None if length is None else first + length}
            try:
                return fs.cat_file(f"{bucket}/{key}", **wanted)
            except OSError as error:
                if _code(error) in ("InvalidRange", "416"):  # start lies behind the end of the object
                    return b""
                raise
    with _local(uri), local_path(uri).open("rb") as file:
        file.seek(first)
        return file.read(-1 if length is None else length)


def write_bytes(uri: str, data: bytes) -> None:
    """Put the whole object; replaces what was there, at once."""
    if is_remote(uri):
        with _s3(uri) as (fs, bucket, key):
            fs.pipe_file(f"{bucket}/{key}", data)
        return
    with _local(uri, len(data)), _temp_beside(local_path(uri), data) as temp:
        temp.replace(local_path(uri))
        _sync_folder(temp.parent)


def upload(path: str | Path, uri: str) -> None:
    """Put a local file as a whole object, reading it in pieces; replaces what was there, at once."""
    if is_remote(uri):
        with _s3(uri) as (fs, bucket, key):
            fs.put_file(str(path), f"{bucket}/{key}", chunksize=UPLOAD_PART, max_concurrency=4)
        return
    with _local(uri), open(path, "rb") as source, _temp_beside(local_path(uri), source) as temp:
        temp.replace(local_path(uri))
        _sync_folder(temp.parent)


def write_bytes_if_absent(uri: str, data: bytes) -> bool:
    """Put the object unless one is there; False when somebody else's stands. Of several writers exactly one wins."""
    if is_remote(uri):
        with _s3(uri) as (fs, bucket, key):
            for _ in range(10):
                try:
                    fs.pipe_file(f"{bucket}/{key}", data, mode="create")
                    return True
                except OSError as error:
                    if isinstance(error, FileExistsError) or _code(error) in ("PreconditionFailed", "412"):
                        return False
                    # S3 says 409 when another conditional put is in flight; that one may still fail, so ask again.
                    if _code(error) not in ("ConditionalRequestConflict", "409"):
                        raise
            return False
    with _local(uri, len(data)), _temp_beside(local_path(uri), data) as temp:
        try:
            os.link(temp, local_path(uri))
        except FileExistsError:
            return False
        _sync_folder(temp.parent)
        return True


def list_files(prefix: str, *, suffix: str = "", recursive: bool = True) -> list[str]:
    """Full URIs of the files in a folder, sorted; [] when there is no such folder. A file's URI gives itself."""
    return sorted(iter_files(prefix, suffix=suffix, recursive=recursive))


def iter_files(prefix: str, *, suffix: str = "", recursive: bool = True) -> Iterator[str]:
    """The same in no order and one by one: of a million names one page is held."""
    if not is_remote(prefix):
        with _local(prefix):
            walked = _walk(local_path(prefix), prefix.rstrip("/") or "/", recursive=recursive)
            yield from (uri for uri in walked if uri.endswith(suffix))
        return
    with _s3(prefix) as (fs, bucket, key):
        there = False
        for name in (item["Key"] for item in _list_s3(fs, bucket, key, recursive=recursive)):
            there = there or not name.endswith("/")
            if name.endswith(suffix) and not name.endswith("/"):
                yield f"s3://{bucket}/{name}"
        if not there and key and key.endswith(suffix) and _head(fs, bucket, key) is not None:
            yield f"s3://{bucket}/{key}"


def etags(uri: str) -> dict[str, str]:
    """What names the content of an s3:// object, or of every object below a prefix, by full URI."""
    with _s3(uri) as (fs, bucket, key):
        head = _head(fs, bucket, key) if key else None
        items = [{"Key": key, **head}] if head else _list_s3(fs, bucket, key)
        return {f"s3://{bucket}/{i['Key']}": i["ETag"] for i in items if not i["Key"].endswith("/")}


def delete(uri: str) -> None:
    """Remove one file; nothing happens when it is not there."""
    if is_remote(uri):
        with _s3(uri) as (fs, bucket, key):
            fs.call_s3("delete_object", Bucket=bucket, Key=key)
        return
    with _local(uri):
        local_path(uri).unlink(missing_ok=True)


def open_read(uri: str) -> BinaryIO:
    """A seekable stream; s3:// objects are read in ranges of some MiB, each with retries."""
    if is_remote(uri):
        return cast(BinaryIO, io.BufferedReader(_Ranges(uri), READ_AHEAD))
    with _local(uri):
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
    found = {name.removeprefix(f"s3://{bucket}/"): etag for name, etag in etags(uri).items()}
    if not found:
        raise MissingError(f"{uri}: no such object or prefix")
    folder = root / sha256_hex(repr((_endpoint(), uri, sorted(found.items()))).encode())[:32]
    name = key.rstrip("/").rsplit("/", 1)[-1] or bucket
    if not (folder / name).exists():
        _download({n: n.removeprefix(key).strip("/") for n in found}, bucket=bucket, name=name, folder=folder)
    return folder / name


def cache_folder() -> Path:
    """Where copies of remote files stay and what travels to S3 waits: on a disk with room for a checkpoint's share."""
    return Path(os.environ.get("BEELINE_CACHE") or Path.home() / ".cache" / "beeline")


def _download(names: dict[str, str], *, bucket: str, name: str, folder: Path) -> None:
    """Objects (key to path below `name`) into a temporary folder that becomes `folder` by one rename."""
    with _local(str(folder)):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temp = Path(tempfile.mkdtemp(suffix=TEMP_SUFFIX, dir=folder.parent))
    try:
        for key, below in names.items():
            target = (temp / name / below) if below else temp / name
            if ".." in Path(below).parts:
                raise UserError(f"s3://{bucket}/{key}: a key with '..' cannot become a local path; rename the object")
            with _local(str(target)), open_read(f"s3://{bucket}/{key}") as source:
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as out:
                    shutil.copyfileobj(source, out, READ_AHEAD)
        with _local(str(folder)):
            try:
                temp.rename(folder)
            except OSError:
                if not (folder / name).exists():  # else another process brought the same content first: it serves
                    raise
    finally:
        shutil.rmtree(temp, ignore_errors=True)


# --- local files


def local_path(uri: str) -> Path:
    """The path a local URI means (file:// and ~ allowed)."""
    return Path(uri.removeprefix("file://")).expanduser()


@contextlib.contextmanager
def _temp_beside(path: Path, data: bytes | BinaryIO) -> Iterator[Path]:
    """The data, synced to disk under a temporary name in the same folder; the name is gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.parent / f".{uuid.uuid4().hex}{TEMP_SUFFIX}"
    try:
        with temp.open("wb") as file:
            if isinstance(data, bytes):
                file.write(data)
            else:
                shutil.copyfileobj(data, file, READ_AHEAD)
            file.flush()
            os.fsync(file.fileno())
        yield temp
    finally:
        temp.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Without it a rename may be lost in a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _walk(path: Path, uri: str, *, recursive: bool) -> Iterator[str]:
    if path.is_file():
        yield uri
        return
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(path):
            child = "/" + entry.name if uri == "/" else f"{uri}/{entry.name}"
            if entry.is_file():
                if not entry.name.endswith(TEMP_SUFFIX):
                    yield child
            elif recursive and entry.is_dir(follow_symlinks=False):
                yield from _walk(Path(entry.path), child, recursive=True)


@contextlib.contextmanager
def _local(uri: str, num_bytes: int | None = None) -> Iterator[None]:
    """Turn what the operating system says into one line."""
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
            what = f"{num_bytes:,} bytes" if num_bytes is not None else "the file"
            raise UserError(f"{uri}: disk full: {what} did not fit; free some space or choose another place") from error
        raise UserError(f"{uri}: {error.strerror or error}") from error


# --- S3

_filesystems: dict[tuple[object, ...], "S3FileSystem"] = {}
_answered: set[tuple[str, str]] = set()  # (endpoint, bucket) pairs seen alive by this process


def _number(name: str, default: float) -> float:
    try:
        return float(os.environ.get(name) or default)
    except ValueError as error:
        raise UserError(f"{name}={os.environ[name]!r} is not a number") from error


def _endpoint() -> str:
    """The server's address; "" is Amazon's own."""
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if url and not (url.startswith(("http://", "https://")) and urlsplit(url).hostname):
        raise UserError("AWS_ENDPOINT_URL is not an address: write http://host:port or https://host")
    return url


def shown_address(url: str) -> str:
    """An address for messages: without a user:password@ part, which must never be printed."""
    scheme, mark, rest = url.partition("://") if "://" in url else ("", "", url)
    return scheme + mark + rest.rpartition("@")[2]


def _filesystem(*, probing: bool = False) -> "S3FileSystem":
    """One client per process (forks get their own) and AWS_* environment; all waits and retries are bounded."""
    import s3fs

    settings = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith(("AWS_", "BEELINE_S3_"))))
    key = (os.getpid(), probing, settings)
    if key not in _filesystems:
        probe, attempts = _number("BEELINE_S3_PROBE_TIMEOUT", 8), _number("BEELINE_S3_ATTEMPTS", 5)
        config = {
            "connect_timeout": probe if probing else _number("BEELINE_S3_CONNECT_TIMEOUT", 10),
            "read_timeout": probe if probing else _number("BEELINE_S3_READ_TIMEOUT", 30),
            "retries": {"mode": "standard", "total_max_attempts": 1 if probing else int(attempts)},
            "max_pool_connections": 32,
        }
        filesystem = s3fs.S3FileSystem(
            endpoint_url=_endpoint() or None, config_kwargs=config, use_listings_cache=False, skip_instance_cache=True
        )
        filesystem.retries = 1 if probing else 3  # these cover a body that breaks off; boto's cover the request
        _filesystems[key] = filesystem
    return _filesystems[key]


@contextlib.contextmanager
def _s3(uri: str) -> Iterator[tuple["S3FileSystem", str, str]]:
    """Filesystem, bucket and key of a URI; the first use of a bucket asks, with short waits, whether it answers."""
    from botocore.exceptions import BotoCoreError

    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise UserError(f"{uri}: no bucket named: write s3://bucket/prefix")
    try:
        if (_endpoint(), bucket) not in _answered:
            _probe(bucket)
            _answered.add((_endpoint(), bucket))
        yield _filesystem(), bucket, key
    except UserError:
        raise
    except (OSError, BotoCoreError) as error:
        raise _explain(uri, bucket, error) from error


def _probe(bucket: str) -> None:
    with contextlib.suppress(PermissionError):  # a key may read objects without being allowed to look at the bucket
        _filesystem(probing=True).call_s3("head_bucket", Bucket=bucket)


def _head(fs: "S3FileSystem", bucket: str, key: str) -> dict[str, Any] | None:
    try:
        return fs.call_s3("head_object", Bucket=bucket, Key=key)
    except FileNotFoundError:
        return None


def make_bucket(uri: str) -> None:
    """Create the bucket of an s3:// URI where it does not exist (a fresh test server has none)."""
    try:
        with _s3(uri):
            return
    except MissingError:
        bucket = uri.removeprefix("s3://").partition("/")[0]
    region = os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION") or "us-east-1"
    # Amazon refuses a LocationConstraint that names its first region, and wants one for every other.
    place = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
    try:
        _filesystem().call_s3("create_bucket", Bucket=bucket, **place)
    except OSError as error:
        raise _explain(uri, bucket, error) from error


def _list_s3(
    fs: "S3FileSystem", bucket: str, key: str, *, recursive: bool = True, page_size: int = 1000
) -> Iterator[dict[str, str]]:
    """Objects below a folder-like prefix, page by page."""
    query: dict[str, object] = {"Bucket": bucket, "Prefix": key.rstrip("/") + "/" if key else "", "MaxKeys": page_size}
    if not recursive:
        query["Delimiter"] = "/"
    while True:
        page = fs.call_s3("list_objects_v2", **query)
        yield from page.get("Contents", [])
        if not page.get("IsTruncated"):
            return
        query["ContinuationToken"] = page["NextContinuationToken"]


def _code(error: BaseException | None) -> str:
    """The S3 error code behind a translated exception, or ""."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return ""


def _refusal_of_a_listing(bucket: str) -> BaseException | None:
    try:
        _filesystem(probing=True).call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
    except Exception as error:
        return error
    return None


# About who asks, not about the object: nothing can be read until that is mended, and no row may be blamed for it.
_NOT_VALID = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId", "SignatureDoesNotMatch")


def _explain(uri: str, bucket: str, error: BaseException) -> UserError:
    """One line of our own words: what libraries say may hold keys or signed headers."""
    from botocore import exceptions as boto

    code, where = _code(error), shown_address(_endpoint()) or "Amazon S3"
    if code == "403":  # an answer without a body; a listing's answer says more
        code = _code(_refusal_of_a_listing(bucket)) or code
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        return UserError(f"{uri}: no S3 credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")
    if isinstance(error, boto.ParamValidationError) or code == "InvalidBucketName":
        return UserError(f"{uri}: not the name of an object: write s3://bucket/key")
    if code in _NOT_VALID:
        return UnavailableError(
            f"{uri}: {where} takes these AWS credentials no longer, or never did ({code}): renew them and run it again"
        )
    if isinstance(error, PermissionError):
        return UserError(
            f"{uri}: {where} refused access ({code or 'denied'}): check the AWS credentials and their rights"
        )
    if code == "NoSuchBucket" or (isinstance(error, FileNotFoundError) and (_endpoint(), bucket) not in _answered):
        return MissingError(f"{uri}: no bucket {bucket!r} at {where}: create it, or check it and AWS_ENDPOINT_URL")
    if isinstance(error, FileNotFoundError):
        return MissingError(f"{uri}: no such object")
    if code in ("NotImplemented", "501"):
        return UserError(f"{uri}: {where} lacks an operation that is needed (conditional writes): use a newer server")
    if isinstance(error, boto.ConnectionError | boto.HTTPClientError | ConnectionError | TimeoutError):
        name = type(error).__name__
        return UnavailableError(f"{uri}: {where} does not answer ({name}): check AWS_ENDPOINT_URL and the network")
    if code:
        return UnavailableError(f"{uri}: {where} answered {code}: try again later")
    return UserError(f"{uri}: S3 request failed ({type(error).__name__}): check the AWS settings")


class _Ranges(io.RawIOBase):
    """A remote object as a raw stream; BufferedReader around it asks for READ_AHEAD bytes at a time."""

    def __init__(self, uri: str) -> None:
        self._uri, self._size, self._at = uri, size(uri), 0

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
            raise UnavailableError(f"{self._uri}: ended at byte {self._at:,} of {self._size:,}: replaced while read?")
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

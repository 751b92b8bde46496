"""How S3 is reached: one client, bounded waits, and errors in our own words. The only module that knows s3fs."""

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from infra.errors import MissingError, UnavailableError, UserError

if TYPE_CHECKING:
    from s3fs import S3FileSystem

_filesystems: dict[tuple[object, ...], "S3FileSystem"] = {}
_answered: set[tuple[str, str]] = set()  # (endpoint, bucket) pairs seen alive by this process


def _read_number(name: str, default: float) -> float:
    try:
        return float(os.environ.get(name) or default)
    except ValueError as error:
        raise UserError(f"{name}={os.environ[name]!r} is not a number") from error


def get_endpoint() -> str:
    """The server's address; "" is Amazon's own."""
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if url and not (url.startswith(("http://", "https://")) and urlsplit(url).hostname):
        raise UserError("AWS_ENDPOINT_URL is not an address: write http://host:port or https://host")
    return url


def hide_password(url: str) -> str:
    """An address for messages: without a user:password@ part, which must never be printed."""
    scheme, mark, rest = url.partition("://") if "://" in url else ("", "", url)
    return scheme + mark + rest.rpartition("@")[2]


def get_filesystem(*, probing: bool = False) -> "S3FileSystem":
    """One client per process (forks get their own) and AWS_* environment; all waits and retries are bounded."""
    import s3fs

    settings = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith(("AWS_", "BEELINE_S3_"))))
    key = (os.getpid(), probing, settings)
    if key not in _filesystems:
        probe, attempts = _read_number("BEELINE_S3_PROBE_TIMEOUT", 8), _read_number("BEELINE_S3_ATTEMPTS", 5)
        config = {
            "connect_timeout": probe if probing else _read_number("BEELINE_S3_CONNECT_TIMEOUT", 10),
            "read_timeout": probe if probing else _read_number("BEELINE_S3_READ_TIMEOUT", 30),
            "retries": {"mode": "standard", "total_max_attempts": 1 if probing else int(attempts)},
            "max_pool_connections": 32,
        }
        made = s3fs.S3FileSystem(
            endpoint_url=get_endpoint() or None,
            config_kwargs=config,
            use_listings_cache=False,
            skip_instance_cache=True,
        )
        made.retries = 1 if probing else 3  # these cover a body that breaks off; boto's cover the request
        _filesystems[key] = made
    return _filesystems[key]


@contextlib.contextmanager
def on_s3(uri: str) -> Iterator[tuple["S3FileSystem", str, str]]:
    """Filesystem, bucket and key of a URI; the first use of a bucket asks, with short waits, whether it answers."""
    from botocore.exceptions import BotoCoreError

    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise UserError(f"{uri}: no bucket named: write s3://bucket/prefix")
    try:
        if (get_endpoint(), bucket) not in _answered:
            _probe(bucket)
            _answered.add((get_endpoint(), bucket))
        yield get_filesystem(), bucket, key
    except UserError:
        raise
    except (OSError, BotoCoreError) as error:
        raise _explain(uri, bucket, error) from error


def _probe(bucket: str) -> None:
    with contextlib.suppress(PermissionError):  # a key may read objects without being allowed to look at the bucket
        get_filesystem(probing=True).call_s3("head_bucket", Bucket=bucket)


def head_object(fs: "S3FileSystem", bucket: str, key: str) -> dict[str, Any] | None:
    """S3's description of an object (HEAD); None if there is none."""
    try:
        return fs.call_s3("head_object", Bucket=bucket, Key=key)
    except FileNotFoundError:
        return None


def make_bucket(uri: str) -> None:
    """Create the bucket of an s3:// URI where it does not exist (a fresh test server has none)."""
    try:
        with on_s3(uri):
            return
    except MissingError:
        bucket = uri.removeprefix("s3://").partition("/")[0]
    region = os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION") or "us-east-1"
    # Amazon refuses a LocationConstraint that names its first region, and wants one for every other.
    place = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
    try:
        get_filesystem().call_s3("create_bucket", Bucket=bucket, **place)
    except OSError as error:
        raise _explain(uri, bucket, error) from error


def list_objects(
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


def find_error_code(error: BaseException | None) -> str:
    """The S3 error code behind a translated exception, or ""."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return ""


def _find_listing_error(bucket: str) -> BaseException | None:
    try:
        get_filesystem(probing=True).call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
    except Exception as error:
        return error
    return None


# About the credentials, not the object: nothing can be read until they are renewed, and no row is to blame for it.
_NOT_VALID = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId", "SignatureDoesNotMatch")


def _explain(uri: str, bucket: str, error: BaseException) -> UserError:
    """One line of our own words: what libraries say may hold keys or signed headers."""
    from botocore import exceptions as boto

    code, where = find_error_code(error), hide_password(get_endpoint()) or "Amazon S3"
    if code == "403":  # an answer without a body; a listing's answer says more
        code = find_error_code(_find_listing_error(bucket)) or code
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
    if code == "NoSuchBucket" or (isinstance(error, FileNotFoundError) and (get_endpoint(), bucket) not in _answered):
        return MissingError(f"{uri}: no bucket {bucket!r} at {where}: create it, or check it and AWS_ENDPOINT_URL")
    if isinstance(error, FileNotFoundError):
        return MissingError(f"{uri}: no such object")
    if code in ("NotImplemented", "501"):
        return UserError(f"{uri}: {where} lacks an operation that is needed (conditional writes): use a newer server")
    if isinstance(error, boto.ConnectionError | boto.HTTPClientError | ConnectionError | TimeoutError):
        return UnavailableError(
            f"{uri}: {where} does not answer ({type(error).__name__}): check AWS_ENDPOINT_URL and the network"
        )
    if code:
        return UnavailableError(f"{uri}: {where} answered {code}: try again later")
    return UserError(f"{uri}: S3 request failed ({type(error).__name__}): check the AWS settings")

"""Results are rows with an origin: append-only immutable JSONL objects, one per call, read together as one table.

Safe for many writers and for kills: an object's name is the hash of its content, and it appears whole or not at all.
"""

import dataclasses
import json
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

from infra import storage
from infra.codec import from_json, to_json
from infra.errors import UserError
from infra.log import get_logger

if TYPE_CHECKING:
    import pyarrow as pa

log = get_logger("results")


def format_now() -> str:
    """The moment as result rows and other records tell it: ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _read_number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


_Float = Annotated[float, BeforeValidator(_read_number)]


@dataclass(frozen=True)
class ResultRow:
    """One number. `metric` is a slash path such as `val_loss/sd3/t0.125`; `details` is JSON text."""

    run: str
    recipe_hash: str
    code_version: str
    images_seen: int
    metric: str
    value: _Float
    higher_is_better: bool
    sample_count: int
    protocol_hash: str
    low: _Float | None = None
    high: _Float | None = None
    details: str = ""
    created: str = field(default_factory=format_now)

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        """Identifies what was measured: when rows are read, a later row replaces an earlier one with the same key."""
        return self.run, self.recipe_hash, self.metric, self.images_seen, self.protocol_hash


def _to_line(row: ResultRow) -> str:
    """One JSON line. JSON has no nan or inf, so those travel as the strings float() reads."""
    record = to_json(row)
    for name in ("value", "low", "high"):
        number = record[name]
        record[name] = number if number is None or math.isfinite(number) else str(float(number))
    return json.dumps(record, ensure_ascii=True, sort_keys=True, allow_nan=False)


def _from_line(line: str, uri: str) -> ResultRow:
    """Fields of a later version are ignored; a missing or wrongly typed one raises."""
    row = from_json(ResultRow, line, where=uri, extra="ignore")
    for count in (row.images_seen, row.sample_count):
        if abs(count) >= 2**63:
            raise UserError(f"{uri}: {count} is no number of images")
    return row


def keep_newest(rows: Iterable[ResultRow]) -> list[ResultRow]:
    """One row per key, the last of them, from rows in order of creation."""
    return list({row.key: row for row in rows}.values())


class ResultStore:
    """The result rows under one URI (a run's store is `RUN/results/`)."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._parsed: dict[str, list[ResultRow]] = {}  # objects never change, so each is read once

    def append(self, rows: Iterable[ResultRow]) -> None:
        """Write the rows as one new object; the same rows again change nothing."""
        lines = [_to_line(self._to_plain(row)) for row in rows]
        if not lines:
            return
        data = ("\n".join(lines) + "\n").encode()
        storage.write_bytes(storage.join(self.uri, f"{storage.sha256_hex(data)[:32]}.jsonl"), data)

    def rows(
        self,
        *,
        metric: str | None = None,
        prefix: str | None = None,
        run: str | None = None,
        recipe_hash: str | None = None,
        latest: bool = True,
    ) -> list[ResultRow]:
        """Rows in order of creation, one per key (the newest) unless `latest` is False.

        `metric` is an exact name, `prefix` a slash path with everything beneath it.
        """
        found = sorted(self._read_all(), key=lambda row: (row.created, row.key))
        if latest:
            found = keep_newest(found)
        return [
            row
            for row in found
            if (metric is None or row.metric == metric)
            and (prefix is None or row.metric == prefix or row.metric.startswith(prefix.rstrip("/") + "/"))
            and (run is None or row.run == run)
            and (recipe_hash is None or row.recipe_hash == recipe_hash)
        ]

    def has(
        self, recipe_hash: str, metric: str, *, images_seen: int | None = None, protocol_hash: str | None = None
    ) -> bool:
        """Is this measured already? What a sweep asks before it runs."""
        return any(
            (images_seen is None or row.images_seen == images_seen)
            and (protocol_hash is None or row.protocol_hash == protocol_hash)
            for row in self.rows(recipe_hash=recipe_hash, metric=metric)
        )

    def table(self) -> "pa.Table":
        """All latest rows as an Arrow table with a fixed schema, empty or not."""
        import pyarrow as pa

        kinds: dict[Any, pa.DataType] = {str: pa.string(), int: pa.int64(), bool: pa.bool_()}
        schema = pa.schema([(f.name, kinds.get(f.type, pa.float64())) for f in dataclasses.fields(ResultRow)])
        return pa.Table.from_pylist([to_json(row) for row in self.rows()], schema=schema)

    def _to_plain(self, row: ResultRow) -> ResultRow:
        """Numpy and torch scalars become plain numbers; anything else of a wrong type is refused."""
        try:
            return dataclasses.replace(
                row,
                value=float(row.value),
                low=None if row.low is None else float(row.low),
                high=None if row.high is None else float(row.high),
                images_seen=int(row.images_seen),
                sample_count=int(row.sample_count),
                higher_is_better=bool(row.higher_is_better),
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"result {row.metric} of run {row.run} is not a number: value={row.value!r}") from error

    def _read_all(self) -> list[ResultRow]:
        names = storage.list_files(self.uri, suffix=".jsonl", recursive=False)
        new = [name for name in names if name not in self._parsed]
        if len(new) > 1 and storage.is_remote(self.uri):
            with ThreadPoolExecutor(16) as pool:
                self._parsed.update(zip(new, pool.map(self._read, new)))
        else:
            self._parsed.update((name, self._read(name)) for name in new)
        return [row for name in names for row in self._parsed[name]]

    def _read(self, uri: str) -> list[ResultRow]:
        data = storage.read_bytes(uri)
        if storage.sha256_hex(data)[:32] != uri.rsplit("/", 1)[-1].removesuffix(".jsonl"):
            log.warning("skipped %s: its content does not match its name (torn or edited); delete it", uri)
            return []
        try:
            return [_from_line(line, uri) for line in data.decode().splitlines()]
        except ValueError as error:
            log.warning("skipped a file that holds no result rows: %s", error)
            return []

"""What the driver must remember of its run, on scratch disk instead of in memory: sorted maps, and units of work.

All of it lies in unnamed files below $TMPDIR (some 40 kB per canonical shard of 1,000 rows): the system frees them with
the process, however it ends. $TMPDIR must be a real disk; a tmpfs would be memory again.
"""

import json
import sqlite3
import tempfile
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from infra.errors import UserError
from infra.scratch import refuse_full_disk

CACHE_MIB = 8
_PAGE = 256  # entries that an iteration holds

Key = tuple[str | int, ...]


class ScratchDatabase:
    """One private SQLite database, with a table per map. Safe for threads."""

    def __init__(self) -> None:
        # an unnamed database would be a temporary file too, but in the folder that SQLite's own variables name
        with tempfile.NamedTemporaryFile(prefix="scratch-") as file:
            self._db = sqlite3.connect(file.name, isolation_level=None, check_same_thread=False)
        self._lock = threading.Lock()
        self._num_maps = 0
        cache = f"cache_size = -{CACHE_MIB * 1024}"
        for pragma in ("journal_mode = OFF", "synchronous = OFF", "temp_store = MEMORY", cache):
            self._db.execute(f"PRAGMA {pragma}")

    def new_map(self, *key: str) -> "DiskMap":
        """A new, empty map; `key` names the fields of its keys, in the order in which they sort."""
        self._num_maps += 1
        return DiskMap(self, f"map_{self._num_maps}", key)

    def query(self, statement: str, values: Key | list[object] = ()) -> list[tuple]:
        """All rows of an answer, which the query must bound."""
        try:
            with self._lock:
                return self._db.execute(statement, values).fetchall()
        except sqlite3.OperationalError as error:
            if "disk" not in str(error):
                raise
            where = tempfile.gettempdir()
            raise UserError(f"{where}: scratch disk full? ({error}): free some space or set TMPDIR") from error


class DiskMap:
    """A map on disk from tuples of texts and numbers to bytes, sorted by key (texts by code points)."""

    def __init__(self, database: ScratchDatabase, name: str, key: tuple[str, ...]) -> None:
        self._query, self._name, self._key = database.query, name, key
        self._fields, self._marks = ", ".join(key), ", ".join("?" * len(key))
        self._query(f"CREATE TABLE {name} ({self._fields}, value, PRIMARY KEY ({self._fields}))")

    def __setitem__(self, key: Key, value: bytes) -> None:
        self._query(f"INSERT OR REPLACE INTO {self._name} VALUES ({self._marks}, ?)", [*key, value])

    def __getitem__(self, key: Key) -> bytes:
        """KeyError where there is none."""
        found = self._query(f"SELECT value FROM {self._name} WHERE ({self._fields}) = ({self._marks})", key)
        if not found:
            raise KeyError(key)
        return found[0][0]

    def __contains__(self, key: Key) -> bool:
        return bool(self._query(f"SELECT 1 FROM {self._name} WHERE ({self._fields}) = ({self._marks})", key))

    def __delitem__(self, key: Key) -> None:
        self._query(f"DELETE FROM {self._name} WHERE ({self._fields}) = ({self._marks})", key)

    def __len__(self) -> int:
        return self._query(f"SELECT COUNT(*) FROM {self._name}")[0][0]

    def __iter__(self) -> Iterator[Key]:
        """Keys in order. What is put or taken behind the place reached is seen, too."""
        return self._pages(self._fields, ())

    def items(self, *prefix: str | int) -> Iterator[tuple[Key, bytes]]:
        """(key, value) of all entries whose keys begin with `prefix`; some hundred are in memory at a time."""
        for *key, value in self._pages(f"{self._fields}, value", prefix):
            yield tuple(key), value

    def list_distinct(self, field: str) -> list[Any]:
        """The distinct values of one field of the keys, in order. All are held in memory: for fields of few values."""
        return [value for (value,) in self._query(f"SELECT DISTINCT {field} FROM {self._name} ORDER BY {field}")]

    def drop(self) -> None:
        """Free its disk space; the map cannot be used afterwards."""
        self._query(f"DROP TABLE {self._name}")

    def _pages(self, wanted: str, prefix: Key) -> Iterator[tuple]:
        fixed = [f"{field} = ?" for field in self._key[: len(prefix)]]
        rest = self._key[len(prefix) :]
        behind = f"({', '.join(rest)}) > ({', '.join('?' * len(rest))})"
        order = f"ORDER BY {self._fields} LIMIT {_PAGE}"
        last: tuple = ()
        while True:
            conditions = " AND ".join([*fixed, *([behind] if last else [])])
            where = f"WHERE {conditions}" if conditions else ""
            page = self._query(f"SELECT {wanted} FROM {self._name} {where} {order}", (*prefix, *last))
            yield from page
            if len(page) < _PAGE:
                return
            last = page[-1][len(prefix) : len(self._key)]


class WorkList:
    """Units of work, in the order they were added; `rows` is what they come to, None if that is not known."""

    def __init__(self, *, rows_known: bool = True) -> None:
        self._file = tempfile.TemporaryFile("w+", encoding="ascii")  # noqa: SIM115 - closed with the object
        self._count = 0
        self.rows: int | None = 0 if rows_known else None

    def add(self, unit: Mapping[str, Any], rows: int = 0) -> None:
        """`unit` comes back as JSON gives it back."""
        with refuse_full_disk():
            self._file.write(json.dumps(unit) + "\n")
        self._count += 1
        if self.rows is not None:
            self.rows += rows

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """One at a time; a second iteration at the same time would move the first."""
        with refuse_full_disk():
            self._file.flush()
        self._file.seek(0)
        return map(json.loads, self._file)

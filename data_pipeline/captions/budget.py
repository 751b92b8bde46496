"""A budget that many workers share: each claims a part of it when it needs one, and no part can be claimed twice.

A claim is an empty object that only one writer can create, so that workers may come, die and be started again.
"""

from infra import storage
from infra.errors import UserError

_PARTS = 200  # of a budget: a worker that ends leaves at most one of them unspent


class Budget:
    """What this worker may still spend of `total` (None: without end). `uri`: where claims lie; "" for one alone."""

    def __init__(self, what: str, total: int | None, uri: str = "") -> None:
        self._what, self._total, self._uri = what, total, uri
        self._part = max(1, -(-(total or 0) // _PARTS)) if uri else total or 0
        self._left = self._next = self.spent = 0

    def check(self) -> None:
        """UserError where nothing is left, in this worker or to be claimed."""
        while self._total is not None and self._left <= 0:
            self._claim(self._total)

    def spend(self, count: int) -> None:
        self.spent += count
        self._left -= count

    def _claim(self, total: int) -> None:
        while self._next * self._part < total:
            number, self._next = self._next, self._next + 1
            uri = storage.join(self._uri, f"{self._what}-{number:03d}") if self._uri else ""
            if not uri or storage.write_bytes_if_absent(uri, b""):
                self._left += min(self._part, total - number * self._part)
                return
        raise UserError(
            f"the caption budget of {total:,} {self._what} is spent: raise --captioner.budget-{self._what}; "
            "captions of finished shards are kept"
        )

"""Which precision an evaluation computes in: decided once for a folder of runs, and kept there."""

import json
import socket
from typing import cast

from infra import storage
from infra.device import Precision, ResolvedPrecision, resolve_precision, warn_if_slow
from infra.errors import UserError

KEPT = "precision.json"


def settle_precision(precision: Precision, device: str, *, results: str) -> ResolvedPrecision:
    """The precision of all evaluations of one folder of runs. `auto` is resolved by the first evaluation, for its
    machine; the answer is stored in `results`. So later evaluations, on any kind of machine, continue the same rows.
    """
    if precision != "auto":
        found = resolve_precision(precision, device)
        warn_if_slow(found, device)
        return found
    uri = storage.join(results, KEPT)
    if not storage.exists(uri):
        found = resolve_precision("auto", device)
        told = {"precision": found, "device": device, "host": socket.gethostname()}
        if storage.write_bytes_if_absent(uri, (json.dumps(told, indent=1) + "\n").encode()):
            return found
    try:
        kept = json.loads(storage.read_bytes(uri))["precision"]
        if kept not in ("fp32", "bf16"):
            raise ValueError(f"precision {kept!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{uri} cannot be read ({error}): give --precision fp32 or bf16, or remove it") from error
    warn_if_slow(kept, device)
    return cast(ResolvedPrecision, kept)

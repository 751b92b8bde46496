"""Which precision an evaluation computes in: decided once for a folder of runs, and kept there."""

import json
import socket
from dataclasses import dataclass

from infra import storage
from infra.codec import from_json, to_json
from infra.device import Precision, ResolvedPrecision, resolve_precision, warn_if_slow

KEPT = "precision.json"


@dataclass(frozen=True)
class KeptPrecision:
    """precision.json: what `auto` means here, and where that was decided."""

    precision: ResolvedPrecision
    device: str = ""
    host: str = ""


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
        record = to_json(KeptPrecision(found, device, socket.gethostname()))
        if storage.write_bytes_if_absent(uri, (json.dumps(record, indent=1) + "\n").encode()):
            return found
    advice = "give --precision fp32 or bf16, or remove it"
    kept = from_json(KeptPrecision, storage.read_bytes(uri), where=uri, advice=advice)
    warn_if_slow(kept.precision, device)
    return kept.precision

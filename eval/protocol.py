"""What a number was measured with, as plain JSON, and its hash: numbers with different hashes are never compared."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from eval.judging.metric import PictureMetric, Prompt
from infra import storage


def describe_protocol(
    metric: PictureMetric, prompts: Sequence[Prompt], *, sampling: Mapping[str, Any], images_per_prompt: int
) -> dict[str, Any]:
    """Prompts, seeds, sampler, steps, guidance, unconditional input, shift, scorers' weights, thresholds."""
    return {
        "metric": metric.name,
        "judged": metric.describe(),
        "prompts": {"count": len(prompts), "sha256": _hash_prompts(prompts)},
        "images_per_prompt": images_per_prompt,
        "sampling": dict(sampling),
    }


def _hash_prompts(prompts: Sequence[Prompt]) -> str:
    lines = [[p.text, p.task, p.seen, p.source, dict(p.metadata)] for p in prompts]
    return hashlib.sha256(json.dumps(lines, sort_keys=True).encode()).hexdigest()[:16]


def hash_protocol(protocol: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]


def keep_protocol(store_uri: str, protocol: Mapping[str, Any]) -> str:
    """Write the protocol beside the results, so that a hash can be read; returns the hash."""
    name = hash_protocol(protocol)
    uri = storage.join(store_uri, "protocols", f"{name}.json")
    if not storage.exists(uri):
        storage.write_bytes(uri, (json.dumps(protocol, indent=1, sort_keys=True) + "\n").encode())
    return name

"""How far the judges can be trusted: what they give to ground-truth scenes, to shuffled ones and to noise.

Only a world can show what a prompt asks for. Rows go to RUNS/results as `calibration/<metric>/<control>[/<path>]`.
"""

from collections.abc import Sequence

import numpy as np

from eval.judging.judges import Judges
from eval.judging.metric import Prompt, Sample
from eval.metrics.registry import METRICS
from eval.protocol import keep_protocol, protocol_of
from infra.log import get_logger
from infra.results import ResultRow, ResultStore
from infra.version import code_version

log = get_logger("calibrate")

CONTROLS = ("ground_truth", "shuffled", "noise")
BATCH = 64
SEED = 7


def calibrate(store_uri: str, judges: Judges, tasks: Sequence[tuple[str, Sequence[Prompt]]]) -> None:
    """Score the controls of each (metric, prompts) that the store lacks."""
    store = ResultStore(store_uri)
    shown = [(name, prompts) for name, prompts in tasks if all("include" in p.metadata for p in prompts)]
    for name, prompts in shown:  # a scene can show what a prompt includes; written words it cannot
        protocol = protocol_of(METRICS[name](judges), prompts, {"images": "controls", "seed": SEED}, 1)
        key = keep_protocol(store_uri, protocol)
        done = {row.metric for row in store.rows(prefix="calibration") if row.protocol_hash == key}
        for control in CONTROLS:
            prefix = f"calibration/{judges.prefix}{name}/{control}"
            if not any(metric == prefix or metric.startswith(f"{prefix}/") for metric in done):
                store.append(control_rows(name, control, prompts, judges, protocol_hash=key, prefix=prefix))


def control_rows(
    name: str, control: str, prompts: Sequence[Prompt], judges: Judges, *, protocol_hash: str, prefix: str
) -> list[ResultRow]:
    metric = METRICS[name](judges)
    for start in range(0, len(prompts), BATCH):
        part = range(start, min(start + BATCH, len(prompts)))
        metric.update([Sample(prompts[i], i, control_image(control, prompts, i, judges)) for i in part])
    scores = metric.compute()
    for score in scores:
        if score.path in ("", "overall/seen"):
            log.info("%s: %.4f", f"{prefix}/{score.path}".rstrip("/"), score.value)
    return [
        ResultRow(
            run="calibration",
            recipe_hash="calibration",
            code_version=code_version(),
            images_seen=0,
            metric=f"{prefix}/{score.path}".rstrip("/"),
            value=score.value,
            higher_is_better=metric.higher_is_better,
            sample_count=score.sample_count,
            protocol_hash=protocol_hash,
            low=score.low,
            high=score.high,
        )
        for score in scores
    ]


def control_image(control: str, prompts: Sequence[Prompt], index: int, judges: Judges) -> np.ndarray:
    """A scene of the prompt, a scene of another prompt of the list, or uniform noise of the same size."""
    assert judges.truth is not None
    if control == "shuffled":
        order = np.random.default_rng(SEED).permutation(len(prompts))
        place = int(np.flatnonzero(order == index)[0])
        return judges.truth(prompts[order[(place + 1) % len(order)]], index)
    scene = judges.truth(prompts[index], index)
    if control == "noise":
        return np.random.default_rng((SEED, index)).integers(0, 256, scene.shape, dtype=np.uint8)
    return scene

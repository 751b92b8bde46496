"""How far the judges can be trusted: what they give to ground-truth scenes, to shuffled ones and to noise.

Only a world can show what a prompt asks for. Rows go to RUNS/results as `calibration/<metric>/<control>[/<path>]`.
"""

from collections.abc import Sequence

import numpy as np

from eval.judging.judges import Judges
from eval.judging.metric import JudgedImage, Prompt
from eval.measure import Measurement, to_rows
from eval.metrics.registry import build_picture_metric
from eval.protocol import describe_protocol, keep_protocol
from infra.log import get_logger
from infra.results import ResultRow, ResultStore

log = get_logger("calibrate")

CONTROLS = ("ground_truth", "shuffled", "noise")
BATCH = 64
SEED = 7


def calibrate(store_uri: str, judges: Judges, measurements: Sequence[Measurement]) -> None:
    """Score the controls of each measurement that the store lacks; nothing where the judges know no true scenes."""
    if judges.truth is None:
        return
    store = ResultStore(store_uri)
    for name, prompts in {m.metric: m.prompts for m in measurements}.items():
        if not all("include" in prompt.metadata for prompt in prompts):
            continue  # a scene can show what a prompt includes; written words it cannot
        metric = build_picture_metric(name, judges)
        protocol = describe_protocol(
            metric, prompts, sampling={"images": "controls", "seed": SEED}, images_per_prompt=1
        )
        key = keep_protocol(store_uri, protocol)
        done = {row.metric for row in store.rows(prefix="calibration") if row.protocol_hash == key}
        for control in CONTROLS:
            prefix = f"calibration/{judges.prefix}{name}/{control}"
            if not any(metric == prefix or metric.startswith(f"{prefix}/") for metric in done):
                store.append(score_control(name, control, prompts=prompts, judges=judges, protocol=key, row=prefix))


def score_control(
    name: str, control: str, *, prompts: Sequence[Prompt], judges: Judges, protocol: str, row: str
) -> list[ResultRow]:
    """The metric's scores of one control (such as true or shuffled scenes), as rows `row/path`."""
    metric = build_picture_metric(name, judges)
    for start in range(0, len(prompts), BATCH):
        part = range(start, min(start + BATCH, len(prompts)))
        metric.update(
            [JudgedImage(prompts[i], i, make_control(control, prompts, index=i, judges=judges)) for i in part]
        )
    scores = metric.compute()
    for score in scores:
        if score.path in ("", "overall/seen"):
            log.info("%s: %.4f", f"{row}/{score.path}".rstrip("/"), score.value)
    origin = {"run": "calibration", "recipe_hash": "calibration", "images_seen": 0}
    return to_rows(row, scores, origin=origin, protocol=protocol, higher_is_better=metric.higher_is_better)


def make_control(control: str, prompts: Sequence[Prompt], *, index: int, judges: Judges) -> np.ndarray:
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

"""What `eval fewstep` measures beside judged pictures: CLIP score lost, how straight a flow is, time per picture."""

import hashlib
import json
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
import torch

from eval.drawing.generate import ImageRequest, Sampling
from eval.judging.metric import RESAMPLES, Clusters, Prompt, Score
from eval.measure import Measurement, Subject, to_rows
from eval.protocol import hash_protocol, keep_protocol
from infra.device import name_device
from infra.errors import UserError
from infra.log import get_logger
from infra.values import PromptValues, keep_values, read_values
from model.diffusion.flow import get_formulation
from model.diffusion.grids import integrates_over_sigma
from model.diffusion.straightness import Straightness, measure_straightness

log = get_logger("fewstep")

INTERVALS, POINTS, TOLERANCE = 8, 4, 1e-4  # of the flow's integrals


def compare_clip_scores(subject: Subject, planned: Sequence[Sequence[Measurement]]) -> None:
    """Row `fewstep/<setting>/clip_loss`: what is lost of the CLIP score of the most steps, in % (SD3, Table 6), paired
    by prompt."""
    clip = [m for of_setting in planned for m in of_setting if m.metric == "clip_score"]
    for fewer in clip[1:]:
        protocol = {"metric": "clip_loss", "version": 1, "of": fewer.hash, "against": clip[0].hash}
        setting = fewer.row.rpartition("/")[0]
        row = f"{setting}/clip_loss"
        if subject.has(row, hash_protocol(protocol)):
            continue
        sums = [_read_sums(subject, m.hash) for m in (clip[0], fewer)]
        rng = np.random.default_rng(0)
        drawn = rng.integers(len(sums[0]), size=(RESAMPLES, len(sums[0])))
        most, few = (values[drawn].sum(1) for values in sums)
        low, high = np.percentile(100 * (1 - few / most), [2.5, 97.5])
        value = 100 * (1 - sums[1].sum() / sums[0].sum())
        keep_scores(subject, row, [Score("", float(value), len(sums[0]), float(low), float(high))], protocol)


def _read_sums(subject: Subject, protocol: str) -> np.ndarray:
    """Each prompt's CLIP score, in the order of the prompts."""
    kept = read_values(subject.store.uri, protocol, subject.recipe_hash, subject.images_seen)
    if kept is None:
        raise UserError(f"{subject.store.uri}: the values of protocol {protocol} are gone: delete its rows, run again")
    mine = kept["stratum"] == "captions"
    return np.asarray(kept["sum"][mine][np.argsort(kept["cluster"][mine])])


def keep_scores(
    subject: Subject, row: str, scores: Sequence[Score], protocol: dict[str, Any], values: PromptValues | None = None
) -> None:
    """Rows `row/path` of scores of which less is better."""
    key = keep_protocol(subject.store.uri, protocol)
    if values:
        keep_values(subject.store.uri, key, subject.recipe_hash, subject.images_seen, values)
    origin = {"run": subject.run, "recipe_hash": subject.recipe_hash, "images_seen": subject.images_seen}
    subject.store.append(to_rows(row, scores, origin=origin, protocol=key, higher_is_better=False))


def make_requests(prompts: Sequence[Prompt]) -> list[ImageRequest]:
    return [ImageRequest(prompt.text, prompt.source) for prompt in prompts]


def hash_texts(prompts: Sequence[Prompt]) -> str:
    return hashlib.sha256(json.dumps([[p.text, p.source] for p in prompts]).encode()).hexdigest()[:16]


def measure_flow(subject: Subject, prompts: Sequence[Prompt], sampling: Sampling) -> None:
    """Rows `fewstep/flow/<guidance>/straightness|length|bend`, and of each by t (`.../t0.9375`).

    The network computes in fp32: an adaptive solver takes the rounding of bf16 for curvature. Nothing where a
    formulation is not integrated over t.
    """
    form, guidance = get_formulation(subject.painter.meta["formulation"]), sampling.guidance
    if integrates_over_sigma(form):
        return
    protocol = {
        "metric": "flow", "version": 1, "prompts": [len(prompts), hash_texts(prompts)], "guidance": guidance,
        "seed": sampling.seed, "unconditional": sampling.unconditional, "intervals": INTERVALS, "points": POINTS,
        "tolerance": TOLERANCE, "precision": "fp32",
    }  # fmt: skip
    row = f"fewstep/flow/{guidance}"
    if subject.has(f"{row}/straightness", hash_protocol(protocol)):
        return
    values = Clusters()
    for start in range(0, len(prompts), sampling.batch):
        inputs = subject.painter.prepare(make_requests(prompts[start : start + sampling.batch]), sampling)
        found = measure_straightness(
            subject.painter.model, *inputs, guidance=guidance, formulation=form, intervals=INTERVALS, points=POINTS,
            tolerance=TOLERANCE,
        )  # fmt: skip
        _add_flow(values, found, start, numbers=inputs.noise_BCHW[0].numel())
    scores = [values.score(name, [name]) for name in values.strata]
    keep_scores(subject, row, scores, protocol, values.values_per_prompt())
    log.info("%s guidance %g: straightness %.4f", subject.run, guidance, values.mean(["straightness"]))


def _add_flow(values: Clusters, found: Straightness, start: int, *, numbers: int) -> None:
    """Straightness for each number of a latent; length and bend in lengths of the straight way."""
    way_B = found.displacement_B.clamp(min=1e-12)  # untrained weights go nowhere
    columns = {
        "straightness": found.straightness_BK / numbers,
        "length": found.length_BK / way_B[:, None],
        "bend": found.bend_BK / way_B[:, None],
    }
    middles = ((found.edges[:-1] + found.edges[1:]) / 2).tolist()
    for name, value_BK in columns.items():
        for n, value_K in enumerate(value_BK.tolist(), start):
            values.add(name, n, sum(value_K))
            for t, value in zip(middles, value_K):
                values.add(f"{name}/t{t:g}", n, value * len(middles))  # the mean of the integrand there


def measure_times(subject: Subject, prompts: Sequence[Prompt], sampling: Sampling, *, repeats: int, batch: int) -> None:
    """Rows `fewstep/<setting>/seconds/latents|pictures` for one picture at a time, `..._batch` for each of a batch.

    Text features are made before. The value is the median, the interval from the least to the most: with 6 repeats it
    holds the true median with 97 %.
    """
    protocol = {
        "metric": "seconds", "version": 1, "device": name_device(sampling.device), "repeats": repeats, "batch": batch,
        "threads": torch.get_num_threads() if sampling.device == "cpu" else 0, "sampling": sampling.protocol(),
    }  # fmt: skip
    row = f"fewstep/{sampling.steps}x{sampling.guidance}/seconds"
    if subject.has(f"{row}/latents", hash_protocol(protocol)):
        return
    scores = []
    for suffix, size in (("", 1), ("_batch", batch)):
        chosen = [prompts[i % len(prompts)] for i in range(size)]
        inputs = subject.painter.prepare(make_requests(chosen), sampling)
        taken: dict[str, list[float]] = {"latents": [], "pictures": []}
        for repeat in range(repeats + 1):
            began = time.perf_counter()
            latent_BCHW = subject.painter.solve(inputs, sampling)  # looks at its numbers, so that a GPU is done
            solved = time.perf_counter()
            subject.painter.decode(latent_BCHW)
            if repeat:  # the first one warms up
                taken["latents"].append((solved - began) / size)
                taken["pictures"].append((time.perf_counter() - began) / size)
        scores += [
            Score(name + suffix, median(seconds), len(seconds), min(seconds), max(seconds))
            for name, seconds in taken.items()
        ]
    keep_scores(subject, row, scores, protocol)

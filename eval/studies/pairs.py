"""Preference pairs for DPO without people: draw pictures of each prompt, let a judge rank them, keep best and worst.

Judge the trained model by other judges than the one that ranked: it learns what its judge likes, faults included.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np

from data_pipeline.checkpoints import find_weights, hash_weights
from data_pipeline.formats.schema import fingerprint
from data_pipeline.packing.pairs import PreferencePair, write_pairs
from eval.drawing.generate import ImageRequest, Painter, Sampling
from eval.judging.judges import Judges, build_judges, describe_judge
from eval.judging.official import OfficialPaths
from eval.judging.prompts import WORLD_SEED, list_world_compbench_prompts, list_world_geneval_prompts, read_lines
from eval.metrics.compbench.evidence import ask_noun_chunks
from eval.metrics.compbench.rules import blip_vqa
from infra.cli import GROUP
from infra.errors import UserError, nearest
from infra.log import Progress

SPLIT = "preferences"  # of the world's scenes: no other part of the house draws from it
EVALUATED_PER_TASK = 200
CHUNK = 32  # prompts drawn and ranked at a time


@dataclass(frozen=True)
class PairOptions:
    """Whose pictures, of which prompts, ranked by whom."""

    weights: str
    """exported weights that draw, and that DPO will start from: RUN/weights/ema.safetensors"""
    out: str
    """root of the data set to write (folder or s3://)"""
    prompts: str | None = None
    """file of prompts (.txt or .jsonl); without it captions of the world's scenes, seen compositions only and none
    that an evaluation asks for"""
    num_prompts: int = 200
    """prompts of the world (without --prompts)"""
    images_per_prompt: int = 4
    ranker: str = "vqa"
    """vqa: P(yes) for each thing that the prompt names; clip: cosine of picture and prompt"""
    least_gap: float = 0.1
    """prompts whose best and worst picture score closer than this give no pair"""
    val_fraction: float = 0.1
    """share of the prompts that is kept for validation"""
    judges: str = "world"
    """world, or official (needs local checkpoints)"""
    sampling: Annotated[Sampling, GROUP] = field(default_factory=lambda: Sampling(seed=1))
    official: OfficialPaths = field(default_factory=OfficialPaths)


Ranker = Callable[[Judges, Sequence[str], Sequence[np.ndarray]], np.ndarray]


def score_by_vqa(judges: Judges, texts: Sequence[str], images: Sequence[np.ndarray]) -> np.ndarray:
    """T2I-CompBench's attribute score of each picture: the product of P(yes) over the noun chunks of its prompt."""
    return np.array([blip_vqa(probabilities) for probabilities in ask_noun_chunks(judges, texts, images)])


def score_by_clip(judges: Judges, texts: Sequence[str], images: Sequence[np.ndarray]) -> np.ndarray:
    """Cosine of each picture with its prompt."""
    return judges.clip().cosines(images, texts)


RANKERS: dict[str, tuple[Ranker, Callable[[Judges], Any]]] = {
    "vqa": (score_by_vqa, lambda judges: judges.vqa()),
    "clip": (score_by_clip, lambda judges: judges.clip()),
}


def make_pairs(options: PairOptions) -> None:
    """Draw, rank and write preference pairs, for `python -m trainer train world-dpo-d4 --data OUT`."""
    if options.ranker not in RANKERS:
        raise UserError(
            f"unknown ranker {options.ranker!r}{nearest(options.ranker, RANKERS)}; known: {', '.join(RANKERS)}"
        )
    if options.images_per_prompt < 2 or not 0 <= options.val_fraction < 1:
        raise UserError("--images-per-prompt must be 2 or more, --val-fraction at least 0 and below 1")
    texts = list(
        dict.fromkeys(read_lines(options.prompts) if options.prompts else draw_world_prompts(options.num_prompts))
    )
    judges = build_judges(options.judges, replace(options.official, device=options.sampling.device))
    painter = Painter(options.weights, device=options.sampling.device)
    options = replace(options, sampling=options.sampling.resolve())
    found = list(rank_pictures(painter, judges, texts, options))
    if len(found) < 2:
        raise UserError(
            f"{len(found)} of {len(texts)} prompts gave a pair: ask for more prompts or pictures, "
            "or a smaller --least-gap"
        )
    num_val = round(len(found) * options.val_fraction)
    splits = {"train": found[num_val:], "val": found[:num_val]}
    info = write_pairs(
        options.out, {name: part for name, part in splits.items() if part}, text_spec=painter.spec,
        vae=painter.latents, resolution=painter.meta["resolution"],
        made_by=_describe_origin(options, judges, texts), device=painter.device,
    )  # fmt: skip
    better, worse = (np.mean([pair.info[name] for pair in found]) for name in ("preferred_score", "rejected_score"))
    print(
        f"{options.out}: {len(found)} pairs from {len(texts)} prompts ({num_val} for validation), {options.ranker} "
        f"gives {better:.3f} to the preferred and {worse:.3f} to the rejected; fingerprint {info.fingerprint}"
    )


def draw_world_prompts(count: int) -> list[str]:
    """Captions of scenes of a split of their own, in the words of training, without those that evaluations draw."""
    from data_pipeline.world.scenes import make_scene

    evaluated = {p.text for p in list_world_geneval_prompts(EVALUATED_PER_TASK)}
    evaluated |= {p.text for p in list_world_compbench_prompts(EVALUATED_PER_TASK)}
    found: dict[str, None] = {}
    for index in range(20 * count):
        text = make_scene(WORLD_SEED, index, split=SPLIT).caption
        if len(found) < count and text not in evaluated:
            found.setdefault(text)
        if len(found) == count:
            break
    return list(found)


def rank_pictures(
    painter: Painter, judges: Judges, texts: Sequence[str], options: PairOptions
) -> Iterator[PreferencePair]:
    """The best and the worst picture of each prompt whose scores lie far enough apart."""
    rank, number = RANKERS[options.ranker][0], options.images_per_prompt
    with Progress(len(texts) * number, "images", desc="draw and rank") as progress:
        for first in range(0, len(texts), CHUNK):
            chosen = texts[first : first + CHUNK]
            jobs = [ImageRequest(text, source="pair", number=n) for text in chosen for n in range(number)]
            images = [image for _, image in painter.paint(jobs, options.sampling)]
            scores_TK = rank(judges, [job.text for job in jobs], images).reshape(len(chosen), number)
            for row, (text, scores_K) in enumerate(zip(chosen, scores_TK)):
                best, worst = int(scores_K.argmax()), int(scores_K.argmin())
                if scores_K[best] - scores_K[worst] >= options.least_gap and best != worst:
                    record = {
                        "preferred_score": float(scores_K[best]), "rejected_score": float(scores_K[worst]),
                        "preferred_number": best, "rejected_number": worst, "ranker": options.ranker,
                    }  # fmt: skip
                    at = row * number
                    yield PreferencePair(f"pair-{first + row:07d}", text, images[at + best], images[at + worst], record)
            progress.update(len(jobs))


def _describe_origin(options: PairOptions, judges: Judges, texts: Sequence[str]) -> Mapping[str, Any]:
    """All that decides which picture is preferred."""
    return {
        "weights": hash_weights(find_weights(options.weights)),
        "judge": describe_judge(RANKERS[options.ranker][1](judges)),
        "sampling": options.sampling.protocol(),
        "images_per_prompt": options.images_per_prompt,
        "least_gap": options.least_gap,
        "prompts": fingerprint(list(texts)),
    }

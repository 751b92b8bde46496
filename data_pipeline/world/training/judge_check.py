"""Do the judges deserve trust? Held-out scenes under their own prompts must pass, under other scenes' prompts fail.

`python -m data_pipeline.world.training.train check`. The rules are those of GenEval (evaluate_images.py) and of
T2I-CompBench's color score in the fewest lines; the judging that counts is done by the eval package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.checkpoints import WORLD
from data_pipeline.world import grammar
from data_pipeline.world.classes import COLORS
from data_pipeline.world.detector import Detection, WorldDetector
from data_pipeline.world.scenes import Scene, SceneObject, make_scene
from data_pipeline.world.training.train_judge_clip import cut_masked, load, read_color_heads, to_pixels
from data_pipeline.world.training.train_vqa import compute_yes_probabilities
from data_pipeline.world.training.train_vqa import load as load_vqa

Colors = Callable[[Detection], str]
MARGIN = 0.1


def find_relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Where box a lies relative to box b; the direction is divided by the norm of the offset before the margin."""
    centre = np.array([[(v[0] + v[2]) / 2, (v[1] + v[3]) / 2] for v in (a, b)])
    size = np.array([[v[2] - v[0], v[3] - v[1]] for v in (a, b)]).sum(0)
    offset = centre[0] - centre[1]
    kept = np.maximum(np.abs(offset) - MARGIN * size, 0) * np.sign(offset)
    if np.all(np.abs(kept) < 1e-3):
        return set()
    dx, dy = kept / np.linalg.norm(offset)
    return {name for name, holds in zip(grammar.RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)) if holds}


def passes(scene: Scene, found: Sequence[Detection], color_of: Colors) -> bool:
    """GenEval's verdict on an image's detections (best first) under the prompt of `scene`."""
    least = 0.9 if scene.tag == "counting" else 0.3
    named: dict[str, list[Detection]] = {}
    for detection in found:
        if detection.score > least:
            named.setdefault(detection.name, []).append(detection)
    groups = []
    for item in scene.include:
        group = named.get(item["class"], [])[: item["count"]]
        if len(group) < item["count"]:
            return False
        if "color" in item and sum(color_of(d) == item["color"] for d in group) < item["count"]:
            return False
        groups.append(group)
        if "position" in item:
            relation, target = item["position"]
            if not all(relation in find_relations(d.box, t.box) for d in group for t in groups[target]):
                return False
    return all(len(named.get(item["class"], [])) < item["count"] for item in scene.exclude)


def score_geneval(detector: WorldDetector, clip_folder: Path, images: list[np.ndarray], claims: list[Scene]) -> Any:
    """Share of images that pass under the claims' prompts, per task and (`overall`) averaged over tasks."""
    model, tokenizer = load(clip_folder)
    heads = read_color_heads(model, tokenizer)
    verdicts: dict[str, list[bool]] = {}
    for image, claim, found in zip(images, claims, detector.detect(np.stack(images))):
        known: dict[int, str] = {}

        def color_of(d: Detection, image: np.ndarray = image, known: dict[int, str] = known) -> str:
            if id(d) not in known:
                x1, y1, x2, y2 = (float(round(v)) for v in d.box)
                crop = cut_masked(image, SceneObject(d.name, None, (x1, y1, x2, y2), d.mask))
                with torch.inference_mode():
                    feature_E = model.encode_image(to_pixels([crop]), normalize=True)[0]
                known[id(d)] = COLORS[int((heads[d.name] @ feature_E).argmax())]
            return known[id(d)]

        verdicts.setdefault(claim.tag, []).append(passes(claim, found, color_of))
    scores = {tag: float(np.mean(row)) for tag, row in sorted(verdicts.items())}
    return scores | {"overall": float(np.mean(list(scores.values())))}


def ask_colors(scene: Scene) -> list[str]:
    """T2I-CompBench's noun chunks of a color prompt, asked one by one."""
    return [f"{grammar.article(item['color'] + ' ' + item['class'])}?" for item in scene.include]


def score_compbench_color(vqa_folder: Path, images: list[np.ndarray], claims: list[Scene]) -> float:
    """Mean over images of the product of P(yes) over the claims' chunks."""
    vqa, tokenizer = load_vqa(vqa_folder)
    questions = [(i, text) for i, claim in enumerate(claims) for text in ask_colors(claim)]
    p = compute_yes_probabilities(vqa, tokenizer, [images[i] for i, _ in questions], [text for _, text in questions])
    products = np.ones(len(images))
    for (i, _), value in zip(questions, p):
        products[i] *= value
    return float(products.mean())


def check(checkpoints: Path, *, per_task: int, seed: int = 90) -> dict[str, float]:
    """Truth and shuffled figures of both scores; scenes of `judge_val` that no card was computed on."""
    detector = WorldDetector.from_pretrained(checkpoints / "detector")
    figures: dict[str, float] = {}
    rows = [
        [make_scene(seed, i, split="judge_val", seen=None, tag=tag) for i in range(per_task)] for tag in grammar.TAGS
    ]
    scenes = [scene for row in rows for scene in row]
    wrong_scenes = [scene for row in rows for scene in (*row[1:], row[0])]  # the prompts of the same task, moved by one
    colored = [i for i, scene in enumerate(scenes) if "color" in scene.include[0]]
    for kind, claims in (("truth", scenes), ("shuffled", wrong_scenes)):
        scores = score_geneval(detector, checkpoints / "judge_clip", [s.image for s in scenes], claims)
        figures |= {f"{kind}/geneval/{name}": value for name, value in scores.items()}
        shown, colored_scenes = [scenes[i].image for i in colored], [claims[i] for i in colored]
        figures[f"{kind}/compbench/color"] = score_compbench_color(checkpoints / "vqa", shown, colored_scenes)
    return figures


def print_check(per_task: int = 100) -> None:
    """Scores of held-out scenes under their own prompts and under others' prompts, one line each."""
    for name, value in check(WORLD, per_task=per_task).items():
        print(f"{name:32s} {value:.4f}")

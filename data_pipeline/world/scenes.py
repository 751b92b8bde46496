"""Scenes of the world: `make_scene(seed, index, split=...)` is a pure function that draws image, captions and truth.

Every split is a stream of its own (the key hashes the split's name), so no two purposes ever share a scene.
Shapes: H height, W width.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.world import grammar
from data_pipeline.world.classes import BACKGROUNDS, CLASSES, COLORS, DRAWINGS
from data_pipeline.world.grammar import is_seen, pick, world_prompts
from data_pipeline.world.sprites import fit, sprite

__all__ = [
    "CLASSES",
    "COLORS",
    "SIZE",
    "Scene",
    "SceneObject",
    "detailed_caption",
    "is_seen",
    "make_scene",
    "make_scene_for",
    "world_prompts",
]

SIZE = 64
_NOMINAL = {1: (34, 46), 2: (26, 30), 3: (22, 26), 4: (21, 25)}
_QUARTERS = ((0, 0), (32, 0), (0, 32), (32, 32))


@dataclass(frozen=True)
class SceneObject:
    """One object: `color` is None when it keeps the drawing's own colors; box is x1, y1, x2, y2 in pixels."""

    name: str
    color: str | None
    box: tuple[float, float, float, float]
    mask: np.ndarray

    @property
    def shown_color(self) -> str:
        """The color word a viewer would use; `gray` for some natural drawings."""
        return self.color or DRAWINGS[self.name].natural


@dataclass(frozen=True)
class Scene:
    """An image with everything that is true of it; alt_captions[0] is GenEval's own wording."""

    caption: str
    tag: str
    include: list[dict[str, Any]]
    exclude: list[dict[str, Any]]
    seen: bool
    image: np.ndarray
    objects: tuple[SceneObject, ...]
    alt_captions: tuple[str, ...]


def _seed_rng(seed: int, split: str, index: int) -> random.Random:
    digest = hashlib.sha256(f"beeline scene/{split}/{seed}/{index}".encode()).digest()
    return random.Random(int.from_bytes(digest[:16], "big"))


def _draw_tag(rng: grammar.RandomSource, seen: bool | None) -> str:
    first = 1 if seen is False else 0
    u = rng.random() * sum(grammar.TAG_SHARES[first:])
    for tag, share in zip(grammar.TAGS[first:], grammar.TAG_SHARES[first:]):
        u -= share
        if u < 0:
            return tag
    return grammar.TAGS[-1]


def make_scene(seed: int, index: int, *, split: str, seen: bool | None = True, tag: str | None = None) -> Scene:
    """Scene number `index` of a split; `seen` True, False or None (either) says which compositions may occur.

    Raises ValueError for an unseen single object, which does not exist.
    """
    if tag == "single_object" and seen is False:
        raise ValueError("a single uncolored object is always a seen composition: ask for another task")
    rng = _seed_rng(seed, split, index)
    task = tag or _draw_tag(rng, seen)
    include = grammar.draw_include(rng, task)
    while seen is not None and is_seen(include) is not seen:
        include = grammar.draw_include(rng, task)
    return _compose(rng, task, include)


def make_scene_for(metadata: dict[str, Any], seed: int, index: int, *, split: str) -> Scene:
    """A scene that shows the given GenEval metadata row (ground truth for a prompt)."""
    return _compose(_seed_rng(seed, split, index), metadata["tag"], metadata["include"])


def _compose(rng: random.Random, tag: str, include: list[dict[str, Any]]) -> Scene:
    wanted = [(str(item["class"]), item.get("color")) for item in include for _ in range(item["count"])]
    image_HW3 = np.empty((SIZE, SIZE, 3), np.uint16)
    image_HW3[:] = pick(rng, BACKGROUNDS)
    objects = []
    for (name, color), cell in zip(wanted, _place_cells(rng, tag, include, len(wanted))):
        objects.append(_paste(rng, image_HW3, name=name, color=color, cell=cell, count=len(wanted)))
    official = grammar.official_prompt(tag, include)
    caption, *others = (grammar.paraphrase(rng, tag, include) for _ in range(3))
    return Scene(
        caption=caption,
        tag=tag,
        include=include,
        exclude=grammar.exclusions(tag, include),
        seen=is_seen(include),
        image=image_HW3.astype(np.uint8),
        objects=tuple(objects),
        alt_captions=(official, *others),
    )


def _place_cells(
    rng: random.Random, tag: str, include: Sequence[dict[str, Any]], count: int
) -> list[tuple[int, int, int, int]]:
    """One cell (x, y, width, height) per object, in the order of the objects."""
    if count == 1:
        return [(0, 0, SIZE, SIZE)]
    if count == 2:
        relation = include[1]["position"][0] if tag == "position" else pick(rng, grammar.RELATIONS)
        # 16 pixels of play across: the other axis never comes near GenEval's threshold of one half.
        play = 16
        across = int(rng.random() * play)
        shift = int(rng.random() * play)
        if relation in ("left of", "right of"):
            cells = [(0, across, 32, 64 - play), (32, shift, 32, 64 - play)]
        else:
            cells = [(across, 0, 64 - play, 32), (shift, 32, 64 - play, 32)]
        # the second object stands in `relation` to the first
        return cells[::-1] if relation in ("left of", "above") else cells
    quarters = list(_QUARTERS)
    if count == 3:
        quarters.pop(int(rng.random() * 4))
    return [(x, y, 32, 32) for x, y in quarters]


def _paste(
    rng: random.Random,
    image_HW3: np.ndarray,
    *,
    name: str,
    color: str | None,
    cell: tuple[int, int, int, int],
    count: int,
) -> SceneObject:
    left, top, width, height = cell
    low, high = _NOMINAL[count]
    drawn = sprite(name, color, fit(name, low + int(rng.random() * (high - low + 1)), (height - 1, width - 1)))
    h, w = drawn.shape
    # in a half of the picture the object keeps to the middle of its cell; elsewhere it may stand anywhere
    slack_x, slack_y = width - w, height - h
    x = left + (slack_x // 2 if count == 2 and width > 32 else int(rng.random() * (slack_x + 1)))
    y = top + (slack_y // 2 if count == 2 and height > 32 else int(rng.random() * (slack_y + 1)))
    region = image_HW3[y : y + h, x : x + w]
    region[:] = (drawn.premultiplied_HW3 + region * drawn.through_HW1 + 127) // 255
    mask = np.zeros((SIZE, SIZE), bool)
    mask[y : y + h, x : x + w] = drawn.mask_HW
    return SceneObject(name, color, (float(x), float(y), float(x + w), float(y + h)), mask)


def _place(obj: SceneObject) -> str:
    x1, y1, x2, y2 = obj.box
    x, y = (x1 + x2) / 2 - SIZE / 2, (y1 + y2) / 2 - SIZE / 2
    vertical = "top" if y < -4 else "bottom" if y > 4 else ""
    horizontal = "left" if x < -4 else "right" if x > 4 else ""
    if vertical:
        return f"at the {vertical} {horizontal}".strip()
    return f"on the {horizontal}" if horizontal else "in the center"


def detailed_caption(scene: Scene) -> str:
    """What the captioner learns to say: every object with count, color and place, in at most 14 words."""
    objects = scene.objects
    if len(objects) == 1:
        thing = f"{objects[0].shown_color} {objects[0].name}"
        return f"{grammar.article(thing)} {_place(objects[0])}, on a plain background"
    centers = [((o.box[0] + o.box[2]) / 2, (o.box[1] + o.box[3]) / 2) for o in objects]
    if len(objects) > 2:
        top = sum(y < SIZE / 2 for _, y in centers)
        things = f"{grammar.NUMBERS[len(objects)]} {objects[0].shown_color} {grammar.plural(objects[0].name)}"
        bottom = grammar.NUMBERS[len(objects) - top]
        return f"{things}, {grammar.NUMBERS[top]} at the top and {bottom} at the bottom"
    (x1, y1), (x2, y2) = centers
    beside = abs(x1 - x2) > abs(y1 - y2)
    first, second = ("on the left", "on the right") if beside else ("at the top", "at the bottom")
    if objects[0].name == objects[1].name:
        things = f"two {objects[0].shown_color} {grammar.plural(objects[0].name)}"
        return f"{things}, one {first} and one {second}"
    a, b = objects if ((x1 < x2) if beside else (y1 < y2)) else objects[::-1]
    return f"{a.shown_color} {a.name} {first} and {b.shown_color} {b.name} {second}"

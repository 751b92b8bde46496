"""Text for training the judges: their tokenizer, captions with one mistake, yes/no questions about a scene.

The vocabulary has the world's words only. Other words are spelled letter by letter (BERT's WordPiece).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data_pipeline.world import grammar
from data_pipeline.world.classes import CLASSES, COLORS, DRAWINGS
from data_pipeline.world.grammar import RandomSource, article, pick, plural
from data_pipeline.world.scenes import Scene, SceneObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OTHER_WORDS = (
    "a an the and with of next to on in at is are there photo picture image drawing object colored side left right top "
    "bottom above below over under center plain background zero one two three four five yes no gray what color how many"
)
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
_NEAR = {
    "red": ("orange", "pink"),
    "orange": ("yellow", "brown", "red"),
    "yellow": ("orange",),
    "brown": ("orange", "red"),
    "pink": ("red", "purple"),
    "purple": ("pink", "blue"),
}
"""Other colors that people might name for a drawing of this natural color. They have no certain answer, so no question
asks about them."""


class Question(NamedTuple):
    text: str
    answer: bool
    kind: str


def list_vocabulary() -> list[str]:
    """The tokens: special ones, punctuation, letters and digits (also as `##` continuations), then the world's
    words."""
    signs = [*string.punctuation, *string.ascii_lowercase, *string.digits]
    names = [*CLASSES, *map(plural, CLASSES)]
    words = re.findall(r"\w+", " ".join([_OTHER_WORDS, *COLORS, *names]))
    return list(dict.fromkeys([*SPECIALS, *signs, *[f"##{s}" for s in signs if s.isalnum()], *words]))


def save_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Write a BERT tokenizer with this vocabulary, and read it back with AutoTokenizer, as its users will."""
    from transformers import AutoTokenizer, BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    made: Any = BertTokenizer
    made(vocab={word: i for i, word in enumerate(list_vocabulary())}).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def describe_claims(include: Sequence[dict[str, Any]]) -> tuple[Any, ...]:
    """A key for what a caption says: equal for captions that mean the same, in whatever order of words."""
    things = sorted((item["class"], item["count"], item.get("color", "")) for item in include)
    relation = next((item["position"][0] for item in include if "position" in item), None)
    if relation is None:
        return tuple(things)
    first, second = include[1]["class"], include[0]["class"]
    if relation in ("right of", "below"):
        relation, first, second = {"right of": "left of", "below": "above"}[relation], second, first
    return (*things, first, relation, second)


def count_classes(include: Sequence[dict[str, Any]]) -> tuple[Any, ...]:
    """A key made of class names and counts alone. A caption may be true of another scene with equal contents."""
    return tuple(sorted(Counter({item["class"]: item["count"] for item in include}).items()))


def make_nearly_true(rng: RandomSource, tag: str, include: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The composition with one mistake: another class, count, color or relation, or two colors swapped."""
    wrong = [dict(item) for item in include]
    names = [item["class"] for item in wrong]
    if rng.random() < 0.3 or tag in ("single_object", "two_object"):
        item = pick(rng, wrong)
        item["class"] = pick(rng, [name for name in CLASSES if name not in names])
    elif tag == "counting":
        wrong[0]["count"] = pick(rng, [n for n in (2, 3, 4) if n != wrong[0]["count"]])
    elif tag == "position":
        relation = wrong[1]["position"][0]
        wrong[1]["position"] = [pick(rng, [r for r in grammar.RELATIONS if r != relation]), 0]
    elif tag == "color_attr" and rng.random() < 0.5:
        wrong[0]["color"], wrong[1]["color"] = wrong[1]["color"], wrong[0]["color"]
    else:
        item = pick(rng, wrong)
        item["color"] = pick(rng, [color for color in COLORS if color not in [i.get("color") for i in wrong]])
    return wrong


def write_crop_prompt(rng: RandomSource, name: str, color: str) -> tuple[str, bool]:
    """(one of GenEval's color prompts, sometimes without "a photo of"; whether it names the class)."""
    thing = pick(rng, (f"{color} {name}", f"{color}-colored {name}", f"{color} object"))
    opening = "a photo of " if rng.random() < 0.8 else ""
    return opening + (article(thing) if rng.random() < 0.3 else f"a {thing}"), name in thing


def _add_article(rng: RandomSource, thing: str) -> str:
    u = rng.random()
    return article(thing) if u < 0.8 else f"a {thing}" if u < 0.87 else f"the {thing}" if u < 0.95 else f"one {thing}"


def _ask_class(rng: RandomSource, objects: Sequence[SceneObject], wanted: bool) -> Question:
    present = {o.name for o in objects}
    name = pick(rng, sorted(present)) if wanted else pick(rng, [c for c in CLASSES if c not in present])
    counted = sum(o.name == name for o in objects)
    noun = article(name) if counted > 1 else _add_article(rng, name)
    return Question(f"{noun}?", wanted, "class")


def _ask_count(rng: RandomSource, objects: Sequence[SceneObject], wanted: bool) -> Question:
    counts = Counter(o.name for o in objects)
    name = pick(rng, sorted(counts))
    count = counts[name]
    if not wanted and rng.random() < 0.25:
        name = pick(rng, [c for c in CLASSES if c not in counts])
        count = max(2, count)
    elif not wanted:
        count = pick(rng, [n for n in (1, 2, 3, 4) if n != count and not (n == 1 and count > 1)])
    text = f"one {name}?" if count == 1 else f"{grammar.NUMBERS[count]} {plural(name)}?"
    return Question(text, wanted, "count")


def _ask_color(rng: RandomSource, objects: Sequence[SceneObject], wanted: bool) -> Question | None:
    """A question about a color. Wrong ones use the other object's color, another color, or the right color with a class
    that is not in the scene. None if there is no certain answer."""
    obj = pick(rng, objects)
    if wanted:
        return Question(f"{_add_article(rng, f'{obj.color} {obj.name}')}?", True, "color") if obj.color else None
    natural = DRAWINGS[obj.name].natural
    own_colors = (obj.color,) if obj.color else (natural, *_NEAR.get(natural, ()))
    other_objects = [o for o in objects if o.name != obj.name and o.color and o.color not in own_colors]
    u = rng.random()
    if other_objects and u < 0.6:
        return Question(f"{_add_article(rng, f'{other_objects[0].color} {obj.name}')}?", False, "swapped color")
    if obj.color is None or u < 0.8:
        color = pick(rng, [c for c in COLORS if c not in own_colors])
        return Question(f"{_add_article(rng, f'{color} {obj.name}')}?", False, "wrong color")
    name = pick(rng, [c for c in CLASSES if all(c != o.name for o in objects)])
    return Question(f"{_add_article(rng, f'{obj.color} {name}')}?", False, "wrong class in that color")


def ask_questions(rng: RandomSource, scene: Scene, num: int) -> list[Question]:
    """`num` questions about a scene, yes and no in equal shares, hard wrong ones included."""
    questions: list[Question] = []
    colored = any(o.color for o in scene.objects)
    while len(questions) < num:
        wanted, u = rng.random() < 0.5, rng.random()
        if u < 0.02:
            questions.append(Question(pick(rng, ("a photo?", "a picture?", "an image?", "a drawing?")), True, "photo"))
        elif u < 0.30:
            questions.append(_ask_class(rng, scene.objects, wanted))
        elif u < (0.50 if colored else 0.80):
            questions.append(_ask_count(rng, scene.objects, wanted))
        elif colored or not wanted:
            question = _ask_color(rng, scene.objects, wanted)
            questions += [question] if question else []
    return questions


def ask_absent(rng: RandomSource, num: int) -> list[Question]:
    """Questions about an image that shows nothing: all answers are no."""
    questions = []
    for _ in range(num):
        name, u = pick(rng, CLASSES), rng.random()
        color = pick(rng, COLORS)
        thing = _add_article(rng, name) if u < 0.3 else _add_article(rng, f"{color} {name}")
        text = thing if u < 0.8 else f"{pick(rng, grammar.NUMBERS[2:])} {plural(name)}"
        questions.append(Question(f"{text}?", False, "nothing"))
    return questions

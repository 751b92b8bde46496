"""The world's vocabulary: which COCO classes it draws, from which OpenMoji drawing, and how each is re-filled.

Names are GenEval's own spellings, so that its prompts, its plurals and its judges apply unchanged.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Drawing:
    """One OpenMoji drawing. `light` and `dark` are the fills that carry the object's color; `drop` removes elements
    that would blur its silhouette or its color (a boat's water, a cup's red band)."""

    code: str
    light: tuple[str, ...]
    dark: tuple[str, ...]
    natural: str
    """Color word of the untouched drawing, as a person would name it (may lie outside COLORS)."""
    drop: tuple[str, ...] = ()
    replace: tuple[tuple[str, str], ...] = ()


DRAWINGS: dict[str, Drawing] = {
    "airplane": Drawing("2708", ("#d0cfce",), ("#9b9b9a",), "gray"),
    "apple": Drawing("1F34E", ("#ea5a47", "#f4aa41"), ("#d22f27",), "red"),
    "backpack": Drawing("1F392", ("#ea5a47",), ("#d22f27",), "red"),
    "banana": Drawing("1F34C", ("#fcea2b",), ("#f1b31c",), "yellow"),
    "boat": Drawing("26F5", ("#d0cfce",), ("#a57939",), "gray", drop=("#92d3f5", "m8.1621,44.7846", "7.2688 45.8881")),
    "broccoli": Drawing("1F966", ("#5c9e31",), ("#b1cc33",), "green"),
    "bus": Drawing("1F68D", ("#fcea2b",), ("#f4aa41",), "yellow"),
    "cake": Drawing("1F382", ("#fcea2b",), (), "yellow"),
    "car": Drawing("1F697", ("#ea5a47",), (), "red"),
    "carrot": Drawing("1F955", ("#f4aa41",), ("#e27022", "#d22f27"), "orange"),
    "cat": Drawing("1F431", ("#f4aa41",), (), "orange"),
    "chair": Drawing("1FA91", ("#fcea2b",), ("#f1b31c", "#a57939"), "yellow"),
    "cup": Drawing("1F964", ("#fff",), ("#d22f27",), "white"),
    "dog": Drawing("1F415", ("#f4aa41",), ("#e27022",), "orange"),
    "donut": Drawing("1F369", ("#f1b31c",), ("#fcea2b",), "orange"),
    "elephant": Drawing("1F418", ("#9b9b9a",), (), "gray"),
    "kite": Drawing("1FA81", ("#ffa7c0",), ("#e67a94",), "pink"),
    "teddy bear": Drawing("1F9F8", ("#a57939",), ("#6a462f",), "brown"),
    "umbrella": Drawing("2602", ("#b399c8",), ("#8967aa",), "purple"),
    "vase": Drawing("1F3FA", ("#f4aa41",), ("#e27022", "#3f3f3f"), "orange"),
}

CLASSES: tuple[str, ...] = tuple(DRAWINGS)
"""The 20 class names, alphabetical."""

COLORS: tuple[str, ...] = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
"""GenEval's ten colors, in its order."""

FILLS: dict[str, tuple[str, str]] = {
    "red": ("#e0281e", "#a81c14"),
    "orange": ("#ff9414", "#d06c00"),
    "yellow": ("#ffe52e", "#d9b400"),
    "green": ("#3fae45", "#287a2d"),
    "blue": ("#2f74e6", "#1c4da8"),
    "purple": ("#9147c7", "#642b91"),
    "pink": ("#ff94c4", "#e0609c"),
    "brown": ("#8f5730", "#63391c"),
    "black": ("#404040", "#262626"),
    "white": ("#ffffff", "#dcdcdc"),
}
"""Light and dark fill of each color; black leaves the outlines just visible."""

BACKGROUNDS: tuple[tuple[int, int, int], ...] = (
    (250, 250, 246),
    (232, 240, 250),
    (250, 232, 236),
    (234, 246, 232),
    (250, 245, 222),
    (238, 232, 248),
    (228, 246, 246),
    (240, 236, 228),
)
"""Plain pale backgrounds; none is pure white, so a white object stays an object."""

ATTRIBUTION = "Drawings: OpenMoji 17.0.0 (https://openmoji.org), CC BY-SA 4.0"

"""Draws the two pictures of the README from committed results: `python infra/runs/front_page.py` (seconds).

drawn.png: the first of the four pictures of each class in infra/docs/runs/world_d4/classes.png.
predicted.png: the law fitted to depths 1 to 4, what it said of depth 5, and what depth 5 then reached.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from PIL import Image

DOCS = Path(__file__).parent.parent / "docs"
FRONT = DOCS / "front"
TILE, GAP, ROW, HALF = 128, 2, 148, 522  # pixels of classes.png: a picture, the gap, a row with its caption, half a row
COLUMNS, CLASSES = 5, 20
INK, BLUE, RED, PAPER = "#1c2a3a", "#2a5d9f", "#b5451b", "#fcfcfb"


def draw_classes() -> None:
    source = Image.open(DOCS / "runs/world_d4/classes.png").convert("RGB")
    rows, step = CLASSES // COLUMNS, TILE + GAP
    sheet = Image.new("RGB", (COLUMNS * step - GAP, rows * step - GAP), "white")
    for number in range(CLASSES):
        left, top = 4 + (number % 2) * HALF, 4 + (number // 2) * ROW
        tile = source.crop((left, top, left + TILE, top + TILE))
        sheet.paste(tile, ((number % COLUMNS) * step, (number // COLUMNS) * step))
    sheet.quantize(256, dither=Image.Dither.NONE).save(FRONT / "drawn.png", optimize=True)


def read_prediction() -> tuple[dict[str, Any], dict[int, tuple[int, float]]]:
    """The committed prediction, and (parameters, validation loss) of each depth at its number of images."""
    folder = DOCS / "runs/world_prediction"
    prediction = json.loads((folder / "prediction.json").read_text())
    report = json.loads((folder / "report.json").read_text())
    last = {name: points[-1]["value"] for name, points in report["losses"].items()}
    return prediction, {run["depth"]: (run["parameters"], last[run["run"]]) for run in report["runs"]}


def draw_prediction() -> None:
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    prediction, losses = read_prediction()
    details = json.loads(prediction["details"])
    size, predicted, floor = details["parameters"], prediction["value"], details["floor"]
    sizes = np.geomspace(1.2e5, 2.4e7, 200)
    law = floor + (predicted - floor) * (sizes / size) ** -details["exponents"][0]
    plt.rcParams.update({"font.size": 16, "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(figsize=(9.6, 4.7), facecolor=PAPER)
    axes.set_facecolor(PAPER)
    axes.plot(sizes, law, "--", color=RED, label="law fitted to depths 1 to 4")
    low, high = predicted - prediction["low"], prediction["high"] - predicted
    axes.errorbar([size], [predicted], [[low], [high]], fmt="o", ms=17, mfc=PAPER, color=RED, capsize=6,
                  label=f"predicted for depth 5 before training: {predicted:.3f}")  # fmt: skip
    for depth, (size, loss) in losses.items():
        if depth < 5:
            axes.plot([size], [loss], "o", color=BLUE, ms=10)
            axes.annotate(f"depth {depth}", (size, loss), (8, 8), textcoords="offset points", color=INK)
    parameters, loss = losses[5]
    axes.plot([parameters], [loss], "*", color=BLUE, ms=13, zorder=5, label=f"depth 5, trained: {loss:.3f}")
    axes.set(xscale="log", xlabel="parameters", ylabel="validation loss", ylim=(0.2, 0.75), xlim=(1.2e5, 3e7))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(FRONT / "predicted.png", dpi=110)


if __name__ == "__main__":
    draw_classes()
    draw_prediction()

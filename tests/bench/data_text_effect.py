"""What trimming and int8 do to the world's validation loss when a model is trained on them: a cell per layout and seed.

python tests/bench/data_text_effect.py OUT [images] [recipe] [seeds]     e.g. OUT 100000 world-d2 3

Columns are shared: each data set is a copy of the first whose text alone is made anew. Cells that are done are skipped,
so the command can be given again. Differences are between cells of one seed: same pictures, order, noise and levels.
"""

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from infra.results import ResultStore

SCENES = 4000
VARIANTS = {
    "trimmed fp16": [],
    "padded fp16": ["--text-layout", "padded"],
    "trimmed t5-int8": ["--text-storage", "t5-int8"],
    "trimmed int8": ["--text-storage", "int8"],
}


def make_data(out: Path, name: str) -> Path:
    root, first = out / "data" / name.replace(" ", "-"), out / "data" / "trimmed-fp16"
    if root != first and not root.exists():
        made_of_text = ("raw", "train", "val", "index", "pack", "dataset.json")
        shutil.copytree(first, root, ignore=shutil.ignore_patterns(*made_of_text))
    raw = first / "raw" / "world"
    if not raw.exists():
        run("data_pipeline", "world", "--out", raw, "--images", SCENES)
    if not (root / "dataset.json").exists():
        run("data_pipeline", "run", "world", "--out", root, "--source", f"wds:{raw}", *VARIANTS[name])
    return root


def run(*words: object) -> None:
    subprocess.run([sys.executable, "-m", *map(str, words)], check=True)


def val_loss(run_folder: Path) -> float | None:
    """The last validation's mean."""
    rows = ResultStore(str(run_folder / "results")).rows(prefix="val_loss")
    final = [row for row in rows if row.metric.count("/") == 1]
    return final[-1].value if final and (run_folder / "weights").exists() else None


def main() -> None:
    if len(sys.argv) < 2:
        print(__doc__)
        return
    out, images = Path(sys.argv[1]).absolute(), int(sys.argv[2]) if len(sys.argv) > 2 else 100_000
    recipe = sys.argv[3] if len(sys.argv) > 3 else "world-d2"
    seeds = range(int(sys.argv[4]) if len(sys.argv) > 4 else 3)
    losses: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for seed in seeds:
        for name in VARIANTS:
            data, cell = make_data(out, name), out / f"{recipe}-{images}-{name.replace(' ', '-')}-{seed}"
            if val_loss(cell) is None:
                run("trainer", "train", recipe, "--data", data, "--out", cell, "--images", images, "--seed", seed)
            found = val_loss(cell)
            assert found is not None, cell
            losses[name].append(found)
            print(json.dumps({"cell": cell.name, "val_loss": round(found, 6)}), flush=True)
    for name, found_S in losses.items():
        change = [100 * (a / b - 1) for a, b in zip(found_S, losses["trimmed fp16"])]
        spread = statistics.stdev(change) if len(change) > 1 else 0.0
        print(json.dumps({name: round(statistics.mean(found_S), 6), "change_percent": round(statistics.mean(change), 3),
                          "deviation_over_seeds": round(spread, 3)}))  # fmt: skip


if __name__ == "__main__":
    main()

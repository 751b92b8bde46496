"""Run folders from a known scaling law, written through the real result store, to test reports on."""

import hashlib
import io
import json
from collections.abc import Sequence

import numpy as np

from infra import storage
from infra.results import ResultRow, ResultStore

LAW = {"E": 0.25, "A": 3.0, "alpha": 0.30, "B": 20.0, "beta": 0.45}
TASKS = ("overall", "single_object", "two_object", "counting", "colors", "position", "color_attr")
EASE = {
    "overall": 0.0,
    "single_object": 0.25,
    "two_object": 0.02,
    "counting": -0.05,
    "colors": 0.1,
    "position": -0.12,
    "color_attr": -0.2,
}
PROMPTS = [
    "a photo of a red apple",
    "a photo of two dogs",
    "a photo of a carrot left of a banana",
    "a photo of a blue car",
]


def parameters(depth: int) -> int:
    width = 64 * depth
    return 36 * depth * width * width + 1_200_000 // 4 * depth


def true_loss(depth: int, images: float) -> float:
    return LAW["E"] + LAW["A"] / parameters(depth) ** LAW["alpha"] + LAW["B"] / images ** LAW["beta"]


def write_run(
    root: str, depth: int, *, images: int = 12_000, seed: int = 0, name: str | None = None, scored: bool = True,
    samples: bool = True, protocol: str = "p1", noise: float = 0.002, checkpoints: int = 3,
) -> str:  # fmt: skip
    """One run of the law above with scores that follow its loss. Returns its URI."""
    name = name or f"world-d{depth}"
    uri = storage.join(root, name)
    rng = np.random.default_rng([depth, seed])
    recipe = {
        "name": name,
        "model": {"depth": depth, "patch": 2, "in_channels": 8, "context_width": 384, "pooled_width": 512},
        "images": images, "global_batch": 64, "seed": seed, "formulation": "rf/lognorm(0.00,1.00)",
        "optimizer": {"lr": 1e-3 if depth < 4 else 8e-4, "betas": [0.9, 0.99]},
        "data": {"resolution": 64, "fingerprint": "f00dfeed"},
    }  # fmt: skip
    speed = 4e11 / (parameters(depth) * 250)
    plan = {
        "parameters": parameters(depth), "train_flops_per_image": parameters(depth) * 250.0,
        "predicted": {"seconds": images / speed * 0.9, "images_per_second": speed / 0.9},
        "peak_flops_per_second": 1e12,
    }  # fmt: skip
    for file, content in (("recipe.json", recipe), ("plan.json", plan)):
        storage.write_bytes(storage.join(uri, file), json.dumps(content, indent=1).encode())
    told = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    offset = noise * rng.standard_normal()

    def row(
        at: int, metric: str, value: float, *, up: bool, count: int, low: float | None = None, high: float | None = None
    ) -> ResultRow:
        head = metric.split("/")[0]
        hashed = hashlib.sha256(f"{head}{protocol if head != 'val_loss' else 'p1'}".encode()).hexdigest()[:16]
        return ResultRow(name, told, "v0.1-3-gabc", at, metric, value, up, count, hashed, low, high)

    rows = []
    for at in np.linspace(images / 12, images, 12).astype(int).tolist():
        loss = true_loss(depth, at) * np.exp(offset + noise / 3 * rng.standard_normal())
        rows.append(row(at, "val_loss/sd3", loss, up=False, count=2048))
        for k in range(1, 9):
            rows.append(
                row(at, f"val_loss/sd3/t{k / 8:g}", loss * (0.5 + 0.9 * (k / 8 - 0.55) ** 2 * 4), up=False, count=2048)
            )
        rows.append(row(at, "train_loss", loss * 1.03 + 0.01 * rng.standard_normal(), up=False, count=1024))
        rows.append(row(at, "cost/seconds", at / speed, up=False, count=1))
        rows.append(row(at, "cost/images_per_second", speed * (1 + 0.02 * rng.standard_normal()), up=True, count=1))
    if scored:
        for at in np.linspace(images / checkpoints, images, checkpoints).astype(int).tolist():
            rows += _scores(row, true_loss(depth, at) * np.exp(offset), rng)(at)
    ResultStore(storage.join(uri, "results")).append(rows)
    if samples:
        for step in (images // 3, 2 * images // 3, images):
            file = storage.join(uri, "samples", f"images_{step:08d}")
            storage.write_bytes(file + ".png", grid(depth, step / images))
            storage.write_bytes(file + ".json", json.dumps({"prompts": PROMPTS, "seed": 0}).encode())
    return uri


def _scores(row, loss: float, rng: np.random.Generator):
    def at_images(at: int) -> list[ResultRow]:
        made = []
        for split, lower in (("seen", 0.0), ("unseen", 0.18)):
            for family, count in (("world_geneval", 96), ("world_compbench", 80)):
                tasks = TASKS if family == "world_geneval" else ("overall", "color", "spatial", "numeracy")
                for task in tasks:
                    value = float(
                        np.clip(
                            1.45 - 1.5 * loss + EASE.get(task, 0) - lower + 0.03 * rng.standard_normal(), 0.01, 0.99
                        )
                    )
                    half = 1.96 * (value * (1 - value) / count) ** 0.5
                    made.append(
                        row(
                            at,
                            f"{family}/{task}/{split}",
                            value,
                            up=True,
                            count=count,
                            low=max(value - half, 0),
                            high=min(value + half, 1),
                        )
                    )
        made.append(
            row(
                at,
                "world_clip_score",
                0.32 - 0.1 * loss,
                up=True,
                count=96,
                low=0.31 - 0.1 * loss,
                high=0.33 - 0.1 * loss,
            )
        )
        made.append(row(at, "world_fid", 60 * loss, up=False, count=512))
        return made

    return at_images


def write_calibration(root: str, *, truth: float = 0.972, shuffled: float = 0.041, noise: float = 0.002) -> None:
    rows = []
    for metric, count in (
        ("world_geneval/overall/seen", 96),
        ("world_geneval/overall/unseen", 96),
        ("world_compbench/overall/seen", 80),
    ):
        for control, value in (("ground_truth", truth), ("shuffled", shuffled), ("noise", noise)):
            family, *rest = metric.split("/")
            name = "/".join(["calibration", family, control, *rest])
            rows.append(
                ResultRow(
                    "judges",
                    "calibration",
                    "v0.1",
                    0,
                    name,
                    value,
                    True,
                    count,
                    "cal0",
                    max(value - 0.02, 0),
                    min(value + 0.02, 1),
                )
            )
    ResultStore(storage.join(root, "results")).append(rows)


def write_ladder(root: str, depths: Sequence[int] = (2, 3, 4), **options) -> None:
    for depth in depths:
        write_run(root, depth, **options)
    write_calibration(root)


def grid(depth: int, progress: float) -> bytes:
    """A 4 x 2 grid of 64-pixel scenes that gain contrast with depth and progress."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (4 * 66, 2 * 66), "white")
    pen = ImageDraw.Draw(image)
    for i in range(8):
        x, y = i % 4 * 66, i // 4 * 66
        shade = [
            int(235 - 180 * progress * min(depth / 4, 1) * f)
            for f in ((i * 3) % 5 / 4, (i * 5) % 7 / 6, (i * 2) % 3 / 2)
        ]
        pen.rectangle((x, y, x + 63, y + 63), fill=(238, 240, 236))
        pen.ellipse((x + 12 + i, y + 14, x + 44 + i, y + 50), fill=tuple(shade))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()

"""Pages of the eval service on 200 runs x 100 checkpoints x 30 metrics: `python tests/bench/eval_service.py`.

Prints how long the first look at the store takes, a look that finds nothing or one changed run, every API answer with
all runs, and every page in a headless Chromium (from the request to the last chart drawn; a law follows when it is
fitted). Bound: 1 s a page.
"""

# ruff: noqa: E402 - the tests' helpers are found from the path below

import contextlib
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from eval_browser import chromium
from eval_runs import TASKS
from eval_service_runs import serving
from fastapi.testclient import TestClient

from eval.service.access import choose_access
from eval.service.app import build_app
from eval.service.index import Index
from eval.service.watcher import Watcher

RUNS, CHECKPOINTS = 200, 100
METRICS = [
    "val_loss/sd3", *(f"val_loss/sd3/t{k / 8:.3f}" for k in range(1, 9)), "train_loss", "cost/seconds",
    "cost/images_per_second", *(f"world_geneval/{task}/seen" for task in TASKS),
    *(f"world_geneval/{task}/unseen" for task in TASKS if task != "single_object"),
    *(f"world_compbench/{task}/seen" for task in ("overall", "color", "spatial")), "world_clip_score", "world_fid",
]  # fmt: skip
APIS = {
    "runs": {}, "recipes": {}, "plans": {}, "failures": {}, "metrics": {}, "levels": {}, "sheets": {},
    "scaling": {}, "series": {"metric": "val_loss/sd3"},
    "scores": {"family": "world_geneval"}, "run": {"name": "run-007"},
}  # fmt: skip
PAGES = (
    "",
    "losses?all=1",
    "losses",
    "scores?all=1",
    "scores",
    "samples",
    "plans?all=1",
    "compare",
    "failures",
    "run?name=run-007",
    "scaling",  # last: it starts a fit, which would slow the pages after it
)


def write_store(root: Path) -> int:
    """Rows as the trainer and the service leave them: one object per checkpoint, named by its content."""
    assert len(METRICS) == 30
    rows = 0
    for r in range(RUNS):
        name, depth = f"run-{r:03d}", 2 + r % 8
        folder = root / name / "results"
        folder.mkdir(parents=True)
        recipe = {"name": name, "model": {"depth": depth}, "images": 640_000, "global_batch": 64, "seed": r,
                  "optimizer": {"lr": 1e-3 / depth}}  # fmt: skip
        (root / name / "recipe.json").write_text(json.dumps(recipe))
        plan = {"parameters": 36 * 4096 * depth**3, "train_flops_per_image": 2.5e7 * depth**3, "images": 640_000}
        (root / name / "plan.json").write_text(json.dumps(plan))
        for c in range(1, CHECKPOINTS + 1):
            lines = [
                json.dumps(
                    {"run": name, "recipe_hash": f"hash{r}", "code_version": "v1", "images_seen": c * 6400,
                     "metric": metric, "value": 0.4 + 1 / (c + 3 * depth + 7 * m % 5), "higher_is_better": m > 11,
                     "sample_count": 256, "protocol_hash": f"p{metric.split('/')[0]}", "details": "",
                     "low": 0.3 if m > 11 else None, "high": 0.6 if m > 11 else None,
                     "created": f"2026-11-22T05:{c % 60:02d}:{r % 60:02d}.000+00:00"}, sort_keys=True
                )
                for m, metric in enumerate(METRICS)
            ]  # fmt: skip
            data = ("\n".join(lines) + "\n").encode()
            (folder / f"{hashlib.sha256(data).hexdigest()[:32]}.jsonl").write_bytes(data)
            rows += len(lines)
    return rows


@contextlib.contextmanager
def timed(what: str):
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{what:<44} {wall:8.3f} s   ({cpu:.3f} s of this process' CPU)", flush=True)


def main() -> None:
    print(f"load of this machine before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "runs"
        print(f"{write_store(root):,} rows in {RUNS * CHECKPOINTS:,} objects")
        index = Index(str(root))
        with timed("first look"):
            index.refresh()
        with timed("a look that finds nothing"):
            index.refresh()
        (root / "run-003" / "results" / "torn.jsonl").write_text("{")
        with timed("a look that finds one run changed"):
            index.refresh()
        app = build_app(index, Watcher(index, None), choose_access("127.0.0.1", None))
        client = TestClient(app, base_url="http://localhost")
        for path, parameters in APIS.items():
            with timed(f"/api/{path} (first)"):
                size = len(client.get(f"/api/{path}", params=parameters).content)
            with timed(f"/api/{path} again, {size / 1e3:,.0f} kB"):
                client.get(f"/api/{path}", params=parameters)
        with serving(app) as address, chromium() as browser:
            for page in PAGES:
                taken = []
                for _ in range(3):
                    browser.open(f"{address}/{page}")
                    browser.wait("Number(document.body.dataset.drawn || 0) > 0")
                    taken.append(browser.js("Number(document.body.dataset.drawnAt) / 1000"))
                print(f"page /{page:<38} {statistics.median(taken):8.3f} s   (of {min(taken):.3f} to {max(taken):.3f})")


if __name__ == "__main__":
    main()

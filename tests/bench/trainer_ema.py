"""The sharded EMA's share of a training step at true shapes: 256 image and 154 text tokens, bf16, two CPU ranks.

python tests/bench/trainer_ema.py [--depth 6] [--batch 4] [--steps 5] [--profiles power:0.10]

The loop's own figure (`ema_share` in train.jsonl). The EMA's cost does not depend on the batch and a step's does: with
the paper's 64 images a rank its share is far below what a batch of 4 shows. Depth 15 wants 13 GB of memory.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
DATA = """
import sys
from data_pipeline.plans import SD3_TEXT
from data_pipeline.synthetic import write_synthetic
write_synthetic(sys.argv[1], num_samples=64, val_samples=8, latent_shape=(16, 32, 32), text_spec=SD3_TEXT,
                buckets=("256x256",))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("depth", 6), ("batch", 4), ("steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--profiles", nargs="+", default=["power:0.10"])
    args = parser.parse_args()
    from trainer_launch import run_ranks

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", DATA, f"{folder}/data"], cwd=ROOT, check=True)
        words = [
            "train", "d15", "--model.depth", args.depth, "--data", f"{folder}/data", "--out", f"{folder}/run",
            "--images", args.batch * args.steps, "--global-batch", args.batch, "--parallel.micro-batch", 1,
            "--parallel.zero-stage", 3, "--parallel.persistence-threshold", 0, "--parallel.max-live", 0,
            "--ema.profiles", *args.profiles,
            "--validation.every", "None", "--logging.log-every", args.batch,
        ]  # fmt: skip
        run_ranks(["-m", "trainer", *map(str, words)], 2)
        lines = [json.loads(line) for line in Path(folder, "run", "logs", "train.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"][1:]
    seconds = statistics.median(args.batch / line["images_per_second"] for line in steps)
    share = statistics.median(line["ema_share"] for line in steps)
    print(
        f"depth {args.depth}, {len(args.profiles)} profile(s), batch {args.batch}: EMA {share:.2%} of a step of "
        f"{seconds:.2f} s ({seconds * share * 1000:.1f} ms)"
    )


if __name__ == "__main__":
    main()

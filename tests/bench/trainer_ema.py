"""The sharded EMA's share of a training step at true shapes: 256 image and 154 text tokens, bf16, two CPU ranks.

python tests/bench/trainer_ema.py [--depth 6] [--batch 4] [--steps 5] [--profiles power:0.10]
python tests/bench/trainer_ema.py --alone [--depth 15]

The first is the loop's own figure (`ema_share` in train.jsonl). The EMA's cost does not depend on the batch and a
step's does: with the paper's 64 images a rank its share is far below what a batch of 4 shows. The second times the
update alone on a rank's true number of parameters (16 bytes each), in CPU seconds of interleaved rounds against the
steps of infra/docs/runs/true_size: one power profile, the recipe's own (two of them and the paper's 0.99 every 100
steps), and three that are all due at every step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
DATA = """
import sys
from data_pipeline.plans import SD3_TEXT
from data_pipeline.packing.synthetic import write_synthetic
write_synthetic(sys.argv[1], num_samples=64, val_samples=8, latent_shape=(16, 32, 32), text_spec=SD3_TEXT,
                buckets=("256x256",))
"""
ROUNDS = 5
THREE = ("power:0.10", "power:0.05", "power:0.20")


def alone(depth: int) -> None:
    """A rank's half of the parameters; of an update that is due once in 100 steps a hundredth counts."""
    import torch

    from trainer.recipes import get_recipe
    from trainer.zero.ema import ShardedEMA

    torch.set_num_threads(1)
    report = json.loads((ROOT / "infra" / "docs" / "runs" / "true_size" / "report.json").read_text())
    step = {run["depth"]: run["rows"]["step_cpu_seconds"][1] for run in report}.get(depth)
    recipe = get_recipe(f"d{depth}")
    count, batch = recipe.model.count_parameters(), recipe.global_batch
    powers = [name for name in recipe.ema.profiles if name.startswith("power")]
    assert powers == list(THREE[:2])
    assert recipe.ema.profiles[2:] == (f"decay:0.99@{100 * batch}",)
    masters, taken = [torch.zeros(-(-count // 2))], {}
    ema = ShardedEMA(THREE, masters)
    kept = ema.profiles
    print(f"depth {depth}: {count:,} parameters, {masters[0].numel():,} on each of two ranks")
    for number in range(ROUNDS):
        for some in (1, 2, 3):
            ema.profiles, start = kept[:some], time.process_time()
            ema.update(masters, batch * (number + 200), batch)
            taken.setdefault(some, []).append(time.process_time() - start)
    one, two, three = (statistics.median(taken[n]) for n in (1, 2, 3))
    own = f"the recipe's own, {', '.join(recipe.ema.profiles)}"
    for words, seconds in (("1 profile", one), (own, two + one / 100), ("3 at every step", three)):
        share = f", {seconds / step:.2%} of a step of {step:.1f} CPU s at two images a rank" if step else ""
        print(f"{words}: {seconds:.3f} CPU s{share}; {seconds / one:.2f} times one profile")


def in_the_loop(depth: int, batch: int, steps: int, profiles: list[str]) -> None:
    from trainer_launch import run_ranks

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", DATA, f"{folder}/data"], cwd=ROOT, check=True)
        words = [
            "train", "d15", "--model.depth", depth, "--data", f"{folder}/data", "--out", f"{folder}/run",
            "--images", batch * steps, "--global-batch", batch, "--parallel.micro-batch", 1,
            "--parallel.zero-stage", 3, "--parallel.persistence-threshold", 0, "--parallel.max-live", 0,
            "--ema.profiles", *profiles,
            "--validation.every", "None", "--logging.log-every", batch,
        ]  # fmt: skip
        run_ranks(["-m", "trainer", *map(str, words)], 2)
        lines = [json.loads(line) for line in Path(folder, "run", "logs", "train.jsonl").read_text().splitlines()]
    told = [line for line in lines if line["kind"] == "train"][1:]
    seconds = statistics.median(batch / line["images_per_second"] for line in told)
    share = statistics.median(line["ema_share"] for line in told)
    print(
        f"depth {depth}, {len(profiles)} profile(s), batch {batch}: EMA {share:.2%} of a step of "
        f"{seconds:.2f} s ({seconds * share * 1000:.1f} ms)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alone", action="store_true")
    for name, default in (("depth", None), ("batch", 4), ("steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--profiles", nargs="+", default=["power:0.10"])
    args = parser.parse_args()
    if args.alone:
        alone(args.depth or 15)
    else:
        in_the_loop(args.depth or 6, args.batch, args.steps, args.profiles)


if __name__ == "__main__":
    main()

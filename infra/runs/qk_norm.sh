#!/usr/bin/env bash
# What QK-RMSNorm is for (SD3 section 5.3.2): the same world recipe at a raised learning rate, with it and without.
#
#   infra/runs/qk_norm.sh DATA OUT [FOLDER]
#
# DATA: a dataset of the world (`python -m data_pipeline run world --out DATA --images 2400`). OUT: where the runs go.
# FOLDER: where curves.png and the numbers go (default infra/docs/runs/qk_norm).
# DEPTH, RATES, IMAGES and PYTHON may be set. Runs that are there are not trained again; one that diverges is kept.
set -euo pipefail
data=$1 out=$2 folder=${3:-$(dirname "$0")/../docs/runs/qk_norm}
depth=${DEPTH:-2} rates=${RATES:-0.03} images=${IMAGES:-9600} python=${PYTHON:-python}
cd "$(dirname "$0")/../.."
mkdir -p "$out" "$folder"

for rate in $rates; do
  for qk_norm in qk-norm no-qk-norm; do
    run=$out/rate_${rate}_$qk_norm
    # decay:0.5 forgets within a few steps: what is exported at every save is the raw network, short of the last jitter.
    "$python" -m trainer train "world-d$depth" --data "$data" --out "$run" "--model.$qk_norm" \
      --optimizer.lr "$rate" --images "$images" --schedule.cooldown 0 --ema.profiles decay:0.5 \
      --logging.log-every 160 --logging.save-every $((images / 10)) --logging.keep 1 --logging.samples 0 \
      --validation.samples 64 --validation.every $((images / 5)) \
      || echo "$run ended early (exit $?): the trainer stops at a loss or gradient that is not finite"
  done
done

"$python" - "$data" "$folder" "$out"/rate_* <<'EOF'
"""Measure attention logits of every exported network on val samples; write logits.json, loss.json and curves.png."""
import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import torch
from matplotlib import pyplot as plt

from data_pipeline.loading.loader import open_dataset
from model.diffusion.flow import get_formulation
from model.probe import AttentionProbe
from model.seeding import keyed_normal
from model.files.weights import load_model

data, folder, runs = sys.argv[1], Path(sys.argv[2]), [Path(p) for p in sys.argv[3:]]
torch.set_num_threads(1)
batch = open_dataset(data, split="val").read(range(32))
noise = keyed_normal(0, batch.positions, "probe", batch.latent_BCHW.shape[1:])
form = get_formulation("rf")


@torch.no_grad()
def measure(path: Path) -> dict:
    model, meta = load_model(path)
    seen = []
    for t in (0.25, 0.5, 0.75):
        drawn = form.sample(batch.latent_BCHW, noise, torch.full((32,), t))
        with AttentionProbe() as probe:
            model(drawn.model_input, drawn.network_time_B, batch.text)
        seen.append(probe.seen)
    blocks = list(zip(*seen, strict=True))
    return {
        "images": meta["images_seen"],
        "max_logit": [max(s.max_logit for s in block) for block in blocks],
        "entropy_share": [sum(s.entropy_share for s in block) / 3 for block in blocks],
        "min_entropy": [min(s.min_entropy for s in block) for block in blocks],
    }


logits, losses = {}, {}
for run in runs:
    logits[run.name] = [measure(path) for path in sorted(run.glob("weights/step_*/ema.safetensors"))]
    lines = [json.loads(line) for line in (run / "logs" / "train.jsonl").read_text().splitlines()]
    losses[run.name] = [[x["images_seen"], x["loss"], x["grad_norm"]] for x in lines if x["kind"] == "train"]
for name, rows in (("logits", logits), ("loss", losses)):
    body = ",\n".join(f'"{run}": [\n' + ",\n".join(json.dumps(r) for r in found) + "\n]" for run, found in rows.items())
    (folder / f"{name}.json").write_text("{\n" + body + "\n}\n")

figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
colors = dict(zip(sorted({r.name.split("_")[1] for r in runs}, key=float), ("tab:blue", "tab:red", "tab:green")))
for run in runs:
    rate, normed = run.name.split("_")[1], not run.name.endswith("no-qk-norm")
    style = {"color": colors[rate], "linestyle": "-" if normed else "--"}
    label = f"rate {rate}, {'with' if normed else 'without'} QK-norm"
    x = [row["images"] for row in logits[run.name]]
    axes[0].semilogy([row[0] for row in losses[run.name]], [row[1] for row in losses[run.name]], **style, label=label)
    axes[1].semilogy(x, [max(row["max_logit"]) for row in logits[run.name]], **style)
    axes[2].plot(x, [min(row["entropy_share"]) for row in logits[run.name]], **style)
for ax, title in zip(axes, ("training loss", "largest attention logit of any block", "attention entropy, lowest block")):
    ax.set(title=title, xlabel="images seen")
    ax.grid(alpha=0.3)
axes[2].set_ylabel("share of uniform attention")
axes[0].legend(fontsize=8)
figure.savefig(folder / "curves.png", dpi=100)
EOF

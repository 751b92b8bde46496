#!/usr/bin/env bash
# The demo at five times its size: four depths, every rung sees the same 57,600 images; about 95 minutes on two cores.
# usage: bash infra/runs/world_long.sh [FOLDER]     Its report and pictures go to infra/docs/runs/world_long/.
set -euo pipefail
cd "$(dirname "$0")/../.."

out=${1:-work-long}
IMAGES=20000 TRAIN_IMAGES=57600 DEPTHS="1 2 3 4" PROMPTS=16 CAPTIONS=128 CHECKPOINTS=1 bash infra/demo.sh "$out"

kept=infra/docs/runs/world_long
mkdir -p "$kept/figures"
cp "$out"/report/report.json "$out"/report/report.md "$out"/grid.png "$kept"
cp "$out"/report/figures/*.png "$kept/figures"
rm -f "$kept"/figures/*-dark.png

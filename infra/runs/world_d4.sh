#!/usr/bin/env bash
# What one model of the world can draw, and the weights world:d4: depth 4 in batches of 32, blocks compiled.
# usage: bash infra/runs/world_d4.sh [FOLDER]     about two hours on two cores with AMX; stopped anywhere, it goes on.
# Its report, a grid with every class and the scores go to infra/docs/runs/world_d4/, the weights to
# data_pipeline/world/checkpoints/d4/.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
out=${1:-work-d4}

python -m data_pipeline run world --out "$out/data" --images 24000 --workers 0
deepspeed --num_gpus 2 --module trainer train world-d4 --data "$out/data" --out "$out/runs/world-d4" --images 340000 \
  --global-batch 32 --parallel.compile --optimizer.lr 2.5e-3
python -m trainer export "$out/runs/world-d4" --data "$out/data" --dtype bf16 \
  --out data_pipeline/world/checkpoints/d4/model.safetensors

python -c "
from data_pipeline.world.classes import CLASSES
from data_pipeline.world.grammar import article
print(*(f'a photo of {article(name)}' for name in CLASSES), sep=chr(10))" > "$out/prompts.txt"
python -m eval sample --weights "$out/runs/world-d4/weights/ema.safetensors" --out "$out/classes.png" \
  --prompts "$out/prompts.txt"
python -m eval sample --weights "$out/runs/world-d4/weights/ema.safetensors" --out "$out/grid.png" --prompts \
  "a photo of a red apple" "a photo of two dogs" "a photo of a carrot left of a banana" "a photo of a blue car" \
  "a photo of three kites" "a photo of a green chair and a purple cup" \
  "a photo of a boat below an airplane" "a photo of four cakes"
python -m eval run --runs "$out/runs" --metrics val_loss geneval compbench clip_score fid \
  --prompts-per-task 50 --images-per-prompt 1 --captions 256 --checkpoints 4
python -m eval report --runs "$out/runs" --out "$out/report"

kept=infra/docs/runs/world_d4
mkdir -p "$kept/figures"
cp "$out"/report/report.json "$out"/report/report.md "$out"/grid.png "$out"/classes.png "$kept"
cp "$out"/report/figures/*.png "$kept/figures"
rm -f "$kept"/figures/*-dark.png

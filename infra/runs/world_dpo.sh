#!/usr/bin/env bash
# Diffusion-DPO in the world: pairs of a run's own pictures, ranked by the VQA judge, scored by the others.
# usage: bash infra/runs/world_dpo.sh WEIGHTS DEPTH FOLDER    WEIGHTS: RUN/weights/step_.../ema.safetensors of world-dDEPTH
# The table of differences with their intervals goes to infra/docs/runs/world_dpo (KEPT). PROMPTS, PAIRS, RANKS,
# PER_TASK and CAPTIONS make it smaller, LORA is the adapters' rank (128 as in the paper).
set -euo pipefail
cd "$(dirname "$0")/../.."

weights=$1 depth=$2 out=$3
prompts=${PROMPTS:-400} pairs=${PAIRS:-6400} ranks=${RANKS:-2} kept=${KEPT:-infra/docs/runs/world_dpo}

[ -e "$out/pairs/dataset.json" ] || python -m eval pairs --weights "$weights" --num-prompts "$prompts" --out "$out/pairs"
python -m data_pipeline verify "$out/pairs"
deepspeed --num_gpus "$ranks" --module trainer train "world-dpo-d$depth" --data "$out/pairs" --init-from "$weights" \
    --out "$out/runs/world-dpo-d$depth" --images "$pairs" --lora.rank "${LORA:-128}"

# What it started from stands beside it as a run, so that both are drawn and scored alike.
mkdir -p "$out/runs/before/weights/step_0000000"
cp "$weights" "$out/runs/before/weights/step_0000000/ema.safetensors"
python -m eval run --runs "$out/runs" --metrics geneval compbench clip_score --checkpoints last --no-calibration \
    --prompts-per-task "${PER_TASK:-16}" --images-per-prompt 2 --captions "${CAPTIONS:-128}"
mkdir -p "$kept"
python -m eval compare "$out/runs/before" "$out/runs/world-dpo-d$depth" --out "$kept/compare.json" | tee "$kept/table.txt"

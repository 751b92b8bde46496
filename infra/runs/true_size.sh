#!/usr/bin/env bash
# SD3's smallest model at its true size on two CPU ranks: real ZeRO-3 steps in bf16, saved, killed, resumed bit by bit;
# the plan, calibrated on the smallest depth, against what every depth took.
#
#   infra/runs/true_size.sh OUT [FOLDER]
#
# OUT: where the runs go (depth 15: 13 GB of memory, 30 GB of disk). FOLDER: where report.md and report.json go (default
# infra/docs/runs/true_size). DEPTHS (the last one is killed and resumed), STEPS (even), BATCH and PYTHON may be set.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=$1 folder=${2:-infra/docs/runs/true_size}
depths=${DEPTHS:-2 4 15} steps=${STEPS:-6} batch=${BATCH:-4} python=${PYTHON:-python}
images=$((steps * batch)) half=$((steps / 2)) largest=${depths##* }
mkdir -p "$out" "$folder"
export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu PYTHONPATH=$PWD

# Latents of 16x32x32 (256 tokens) and 154 text tokens, in the shape and layout of SD3's encoders; the content is made up.
[ -e "$out/data/dataset.json" ] || "$python" - "$out/data" <<'PY'
import sys

from data_pipeline.plans import SD3_TEXT
from data_pipeline.synthetic import write_synthetic

shape = (16, 32, 32)
write_synthetic(sys.argv[1], num_samples=64, val_samples=8, latent_shape=shape, text_spec=SD3_TEXT, buckets=("256x256",))
PY

start() { # DEPTH RUN SAVE_EVERY: two ranks in the background, their ids in $pids
  local port rank
  port=$("$python" -c "from trainer.zero.group import free_port; print(free_port())")
  pids=()
  for rank in 0 1; do
    RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=2 LOCAL_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port \
      "$python" -m trainer train d15 --model.depth "$1" --data "$out/data" --out "$2" --images "$images" \
      --global-batch "$batch" --parallel.micro-batch 1 --parallel.zero-stage 3 --parallel.persistence-threshold 0 --ema.profiles power:0.10 \
      --schedule.warmup-images 0 --validation.every None --logging.log-every "$batch" --logging.save-every "$3" \
      --logging.keep 1 &
    pids+=($!)
  done
}

ended() { # the exit codes of both ranks
  codes=()
  for pid in "${pids[@]}"; do
    local code=0
    wait "$pid" || code=$?
    codes+=("$code")
  done
}

for depth in $depths; do
  run=$out/straight-d$depth
  if [ ! -e "$run/weights/raw.safetensors" ]; then
    load=$(cut -d' ' -f1 /proc/loadavg)
    start "$depth" "$run" "$images"
    ended
    [ "${codes[*]}" = "0 0" ]
    echo "$load $(cut -d' ' -f1 /proc/loadavg)" > "$run/load"
    du -sb "$run/checkpoints" | cut -f1 > "$run/checkpoint_files"
    rm -rf "$run/checkpoints" # of the largest the disk shall hold one run at a time
  fi
done

killed=$out/killed-d$largest
if [ ! -e "$killed/weights/raw.safetensors" ]; then
  rm -rf "$killed"
  start "$largest" "$killed" $((half * batch))
  until [ -e "$killed/checkpoints/latest" ]; do sleep 0.5; kill -0 "${pids[0]}"; done
  sleep 1
  kill -9 "${pids[1]}"
  ended
  echo "SIGKILL after step $half: exit codes ${codes[*]}" | tee "$killed/killed"
  [ "${codes[*]}" = "76 137" ]
  rm -rf "$killed/weights"
  start "$largest" "$killed" "$images"
  ended
  [ "${codes[*]}" = "0 0" ]
fi

"$python" - "$out" "$folder" "$batch" $depths <<'PY'
"""Compare the two runs of the largest depth bit by bit, grade the plan, write report.md and report.json."""
import json
import platform
import statistics
import sys
from pathlib import Path

from trainer.plan import make_plan
from trainer.reality import GRADED, graded, measured, measured_rates
from trainer.recipe import Recipe
from trainer.verify import losses, same

out, folder, batch, depths = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), [int(d) for d in sys.argv[4:]]
straight, killed = out / f"straight-d{depths[-1]}", out / f"killed-d{depths[-1]}"
verdicts = same(straight, killed, "killed and resumed against straight through")
PY

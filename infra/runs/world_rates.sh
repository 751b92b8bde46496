#!/usr/bin/env bash
# Loss against learning rate on two rungs of the world, and the law rate = a * width^b that carries a rate up the ladder.
#
#   infra/runs/world_rates.sh DATA OUT [FOLDER]
#
# DATA: a dataset of the world (`python -m data_pipeline run world --out DATA --images 2400`). OUT: where the runs go; what
# is trained is not trained again. FOLDER: where sweep.json, sweep.png and table.txt go (default
# infra/docs/runs/world_rates). DEPTHS, RATES, IMAGES (per run), RANKS and PYTHON may be set; the committed curves are of
# IMAGES=4800, 20 minutes on two busy cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
data=$1 out=$2 folder=${3:-infra/docs/runs/world_rates}
depths=${DEPTHS:-2 4} rates=${RATES:-1e-3 2e-3 4e-3 8e-3 1.6e-2} images=${IMAGES:-9600} python=${PYTHON:-python}
mkdir -p "$folder"

# shellcheck disable=SC2086  # lists of words
"$python" -m trainer sweep lr world --depths $depths --rates $rates --images "$images" --num-ranks "${RANKS:-1}" \
  --data "$data" --out "$out" --logging.samples 0 --logging.keep 1 --logging.save-every "$images" \
  --validation.every "$images" --validation.samples 512 | tee "$folder/table.txt"
cp "$out/sweep.json" "$out/sweep.png" "$folder"

#!/usr/bin/env bash
# A real isoFLOP ladder on the world: every depth for every budget, one trunk at constant rate per depth, a cooldown per
# budget, and the depth that each budget wants.
#
#   infra/runs/world_isoflop.sh DATA OUT [FOLDER]
#
# DATA: a dataset of the world (`python -m data_pipeline run world --out DATA --images 2400`). OUT: where the runs go; what
# is trained is not trained again. FOLDER: where isoflop.json, .md and .png go (default infra/docs/runs/world_isoflop).
# DEPTHS, BUDGETS, RANKS and PYTHON may be set. The committed output took 13 minutes of one core, over 20,000 images.
set -euo pipefail
cd "$(dirname "$0")/../.."
data=$1 out=$2 folder=${3:-infra/docs/runs/world_isoflop}
depths=${DEPTHS:-1 2 3} budgets=${BUDGETS:-1e12 3e12} python=${PYTHON:-python}
mkdir -p "$folder"

# shellcheck disable=SC2086  # lists of words
"$python" -m trainer ladder world --depths $depths --budgets $budgets --num-ranks "${RANKS:-1}" --data "$data" \
  --out "$out" --logging.samples 0 --logging.save-every 1000000 --validation.every 1000000 --validation.samples 512
cp "$out/isoflop.json" "$out/isoflop.md" "$out/isoflop.png" "$folder"

#!/usr/bin/env bash
# SD3's ablations of backbones (figure 4) and captions (table 4) in the world, each run on equal data and images.
#
#   bash infra/runs/world_ablations.sh DATA OUT [FOLDER]
#
# DATA: `python -m data_pipeline run world --out DATA --images 4000`. OUT/backbones and OUT/captions: the runs. FOLDER:
# a report of each (default infra/docs/runs/world_ablations). Stopped anywhere, it goes on there; finished runs are
# judged and reported as they land. Committed: both at depth 2, 6,400 images.
# DEPTH, IMAGES, SEEDS, BACKBONES, CAPTIONS, PROMPTS and RANKS may be set.
set -euo pipefail
data=$(realpath "$1") out=$2 folder=${3:-infra/docs/runs/world_ablations}
cd "$(dirname "$0")/../.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
source infra/runs/seeds.sh
depth=${DEPTH:-3} images=${IMAGES:-19200} seeds=${SEEDS:-0 1} ranks=${RANKS:-2}
prompts=${PROMPTS:-16} captions=${CAPTIONS:-128}
backbones=${BACKBONES-mmdit mmdit3 dit cross_dit uvit}

train() {  # train GROUP FAMILY SEED
  python -m trainer ladder "$2" --depths "$depth" --data "$data" --out "$out/$1/seed$3" --images "$images" \
    --num-ranks "$ranks" --seed "$3" --logging.keep 1 --logging.samples 0
}

judge() {  # judge GROUP
  python -m eval run --runs "$out/$1" --metrics val_loss geneval compbench clip_score fid --checkpoints last \
    --prompts-per-task "$prompts" --images-per-prompt 1 --captions "$captions"
  python -m eval report --runs "$out/$1" --out "$out/$1-report"
  mkdir -p "$folder/$1"
  cp "$out/$1-report/report.json" "$folder/$1"
  sed '/^!\[/d' "$out/$1-report/report.md" >"$folder/$1/report.md"  # its figures stay in OUT
}

for backbone in $backbones; do
  family=world-$backbone
  each_seed train backbones "${family/%world-mmdit/world}"
  judge backbones
done
for way in original mixed; do
  each_seed train captions "world-captions-$way"
  judge captions
done

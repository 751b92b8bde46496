#!/usr/bin/env bash
# A prediction that can be wrong: depths 1 to 4, what the fitted law says of depth 5, then depth 5, scored at every
# checkpoint so that losses and scores are also correlated within runs.
#
#   bash infra/runs/world_prediction.sh OUT [FOLDER]     about 60 minutes on two idle cores with AMX; it goes on where it was
#
# FOLDER (default infra/docs/runs/world_prediction): prediction.json, written before depth 5 begins, and the report. Both
# are of OUT: what FOLDER held before is written over.
set -euo pipefail
out=$(realpath -m "$1")
cd "$(dirname "$0")/../.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
kept=${2:-infra/docs/runs/world_prediction}
images=${IMAGES:-25600} below=${BELOW:-1 2 3 4} next=${NEXT:-5}
mkdir -p "$kept/figures"

[ -e "$out/data/dataset.json" ] || python -m data_pipeline run world --out "$out/data" --images "${SCENES:-20000}"
climb=(python -m trainer ladder world --data "$out/data" --out "$out/runs" --images "$images")
# shellcheck disable=SC2086
"${climb[@]}" --depths $below
if [ ! -e "$out/runs/world-d$next" ]; then  # asked again, the same curves answer what they did at first
  python -m eval predict --runs "$out/runs" --depth "$next"
  cat "$out"/runs/results/*.jsonl | grep '"prediction/' > "$kept/prediction.json"
fi
"${climb[@]}" --depths "$next"
python -m eval run --runs "$out/runs" --metrics val_loss geneval compbench clip_score fid \
  --prompts-per-task "${PROMPTS:-8}" --images-per-prompt 1 --captions "${CAPTIONS:-64}"
python -m eval report --runs "$out/runs" --out "$out/report"
cp "$out"/report/report.json "$out"/report/report.md "$kept"
cp "$out"/report/figures/*.png "$kept/figures"
rm -f "$kept"/figures/*-dark.png

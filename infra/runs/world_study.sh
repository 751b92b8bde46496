#!/usr/bin/env bash
# SD3's formulation study (section 5.1) in the world: the 16 variants of its Table 1, two seeds each, ranked the same way.
#
#   bash infra/runs/world_study.sh DATA OUT [FOLDER]
#
# DATA: `python -m data_pipeline run world --out DATA --images 4000`. OUT: where the runs go. FOLDER: study.md,
# study.json and cells.jsonl, written anew after each variant (default infra/docs/runs/world_study). Stopped anywhere,
# it goes on there.
# FOLDER's README says what the committed study took. RECIPE, IMAGES, SEEDS, CAPTIONS, VARIANTS, SETTINGS, RANKS and
# WORKERS may be set, e.g. IMAGES=57600 for a study with sharper differences. WORKERS: Ray workers (RAY_ADDRESS, or a
# private Ray) that share the trainings of each seed, each with RANKS ranks, and then the judging; the ranking is then
# written once, at the end.
set -euo pipefail
data=$(realpath "$1") out=$2 folder=${3:-infra/docs/runs/world_study}
cd "$(dirname "$0")/../.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
source infra/runs/seeds.sh
recipe=${RECIPE:-world-d2} images=${IMAGES:-12800} seeds=${SEEDS:-0 1} captions=${CAPTIONS:-128} ranks=${RANKS:-2}
workers=${WORKERS:-0}
settings=${SETTINGS:-50x1.0 50x2.5 50x5.0 5x5.0 10x5.0 25x5.0}
variants=${VARIANTS:-$(python -c "from eval.studies.ranking import TABLE_1; print(*TABLE_1)")}

train() {  # train VARIANTS SEED
  # shellcheck disable=SC2086
  python -m trainer sweep formulations "$recipe" --formulations $1 --data "$data" --out "$out/seed$2" --workers "$workers" \
    --images "$images" --num-ranks "$ranks" --seed "$2" --logging.keep 1 --logging.samples 0
}

judge() {  # a variant whose training was unstable has no weights at its end: the ranking names it and leaves it out
  # shellcheck disable=SC2086
  python -m eval study --runs "$out" --out "$folder" --captions "$captions" --settings $settings --workers "$workers" \
    || echo "not all is ranked yet; the lines above say why"
}

if [ "$workers" -gt 0 ]; then
  for seed in $seeds; do train "$variants" "$seed"; done
  judge
else
  for variant in $variants; do
    each_seed train "$variant"
    judge
  done
fi
cat "$folder/study.md"

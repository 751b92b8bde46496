#!/usr/bin/env bash
# Few steps in the world: one reflow, distillation after it, direct distillation and MeanFlow, all from one teacher's
# couplings, each with several seeds; then teacher and students drawn from the same noise in 1 to 50 steps.
#
#   bash infra/runs/few_step.sh DATA OUT [FOLDER]
#
# DATA: `python -m data_pipeline run world --out DATA --images 20000`. OUT: couplings, runs and report. FOLDER: where
# few_steps.json and few_steps.md go (default infra/docs/runs/few_step). Stopped anywhere, it goes on there.
# `direct` and `meanflow` train on as many images as `reflow` and `distil` together. The couplings take hours: it tells
# how many first. TEACHER is a checkpoint's name or a file, DEPTH its depth; COUNT, SOLVER_STEPS and GUIDANCE are of the
# couplings; IMAGES, SEEDS, RANKS, WORKERS, STEPS, CAPTIONS and PROMPTS may be set. PERCEPTUAL, features:world:clip for
# example, is added to both distillations.
set -euo pipefail
data=$(realpath "$1") out=$(realpath -m "$2") folder=$(realpath -m "${3:-$(dirname "$0")/../docs/runs/few_step}")
cd "$(dirname "$0")/../.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
source infra/runs/seeds.sh
depth=${DEPTH:-4} teacher=${TEACHER:-world:d$depth} count=${COUNT:-20000} images=${IMAGES:-40000} seeds=${SEEDS:-0 1 2}
guidance=${GUIDANCE:-1.5} solver_steps=${SOLVER_STEPS:-25} ranks=${RANKS:-2} workers=${WORKERS:-$ranks}
steps=${STEPS:-1 2 4 8 25 50} captions=${CAPTIONS:-256} prompts=${PROMPTS:-8}

couple=(python -m data_pipeline couple --teacher "$teacher" --prompts "$data" --out "$out/couplings" --count "$count"
  --solver heun --steps "$solver_steps" --guidance "$guidance" --workers "$workers")
"${couple[@]}" --estimate
"${couple[@]}"
python -m data_pipeline verify "$out/couplings"

# The teacher stands beside its students as a run, so that all are drawn and judged alike.
mkdir -p "$out/runs/teacher/weights/step_0000000"
weights=$out/runs/teacher/weights/step_0000000/ema.safetensors
if [ ! -e "$weights" ]; then
  find="import sys; from data_pipeline.checkpoints import find_weights; print(find_weights(sys.argv[1]))"
  file=$(python -c "$find" "$teacher")
  cp "$file" "$weights.part"
  mv "$weights.part" "$weights"
fi

train() {  # train ARM RECIPE START IMAGES SEED; START: a file, or an arm of the same seed
  local start=$3 launch=(python -m trainer)
  [ "$ranks" -gt 1 ] && launch=(deepspeed --num_gpus "$ranks" --module trainer)
  [ -e "$start" ] || start=$out/runs/seed$5/$start/weights/ema.safetensors
  local more=()
  [ "$2" = distil ] && [ -n "${PERCEPTUAL:-}" ] && more=(--student.perceptual "$PERCEPTUAL")
  "${launch[@]}" train "world-$2-d$depth" --data "$out/couplings" --init-from "$start" --out "$out/runs/seed$5/$1" \
    --images "$4" --seed "$5" --logging.keep 1 --logging.samples 0 "${more[@]}"
}

each_seed train reflow reflow "$weights" "$images"
each_seed train distil distil reflow "$images"
each_seed train direct distil "$weights" $((2 * images))
each_seed train meanflow meanflow "$weights" $((2 * images))

# shellcheck disable=SC2086
python -m eval fewstep --runs "$out/runs" --steps $steps --guidance 1 "$guidance" --captions "$captions" \
  --prompts-per-task "$prompts"
python -m eval report --runs "$out/runs" --out "$out/report"
mkdir -p "$folder"
cp "$out/report/few_steps.json" "$folder"
sed '/^!\[/d' "$out/report/few_steps.md" >"$folder/few_steps.md"  # its figures stay in OUT

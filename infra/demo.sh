#!/usr/bin/env bash
# The documentation that runs: raw images -> shards -> ladder of models -> scores -> report, on two CPU cores.
# usage: bash infra/demo.sh [FOLDER]     (the variables below, set in the environment, change its size)
# Every step skips what is already there, so an interrupted demo continues where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-work-demo}
images=${IMAGES:-4000}               # scenes that enter the pipeline
train_images=${TRAIN_IMAGES:-12000}  # images that each rung of the ladder sees
depths=${DEPTHS:-2 3 4}
prompts=${PROMPTS:-8}                # prompts per task and split when judging
captions=${CAPTIONS:-64}             # images for CLIP score and FID
checkpoints=${CHECKPOINTS:-2}        # checkpoints of each rung that are judged

[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
options=${OPTIONS:-}  # fields of the ladder's recipes: OPTIONS="precision=fp32 optimizer.lr=1e-3"
overrides=(); for field in $options; do overrides+=("--$field"); done
bold=""; plain=""
if [ -t 1 ]; then bold=$'\e[1m'; plain=$'\e[0m'; fi

step() {  # step "what happens" command...
  printf '\n%s== %s%s\n$' "$bold" "$1" "$plain"
  local word
  for word in "${@:2}"; do
    if [[ $word =~ ^[A-Za-z0-9_./,:=-]+$ ]]; then printf ' %s' "$word"; else printf ' "%s"' "$word"; fi
  done
  printf '\n'
  "${@:2}"
}

settings="$images scenes, $train_images training images, depths $depths, ${options:-no options}, $prompts prompts, $captions captions, $checkpoints checkpoints"
if [ -f "$out/report/report.html" ] && [ "$(cat "$out/done" 2>/dev/null)" = "$settings" ]; then
  printf 'This demo is finished; remove %s to run it again.\n' "$out"
else
  mkdir -p "$out"; rm -f "$out/done"
  started=$SECONDS
  step "1/6  Raw images through filter, dedup, bucket, caption, encode and pack, on Ray" \
    python -m data_pipeline run world --out "$out/data" --images "$images" \
    --dedup-embedding world:clip --dedup-similarity 0.8 --dedup-verify 15
  step "2/6  Check every hash of what was written, and look at some rows" \
    python -m data_pipeline verify "$out/data"
  step "     ... as a grid" \
    python -m data_pipeline inspect "$out/data" --out "$out/inspect.png"
  # shellcheck disable=SC2086
  step "3/6  Train the ladder with DeepSpeed ZeRO-3 on two ranks" \
    python -m trainer ladder world --depths $depths --data "$out/data" --out "$out/runs" --images "$train_images" \
    ${overrides[@]+"${overrides[@]}"}
  step "4/6  Draw with the deepest rung" \
    python -m eval sample --weights "$out/runs/world-d${depths##* }/weights/ema.safetensors" --out "$out/grid.png" \
    --prompts "a photo of a red apple" "a photo of two dogs" "a photo of a carrot left of a banana" "a photo of a blue car"
  step "5/6  Judge every rung by the world's judges" \
    python -m eval run --runs "$out/runs" --metrics val_loss geneval compbench clip_score fid \
    --prompts-per-task "$prompts" --images-per-prompt 1 --captions "$captions" --checkpoints "$checkpoints"
  step "6/6  Write the report" \
    python -m eval report --runs "$out/runs" --out "$out/report"
  echo "$settings" > "$out/done"
  printf '\nDone in %d minutes.\n' $(((SECONDS - started) / 60))
fi

printf "\n"; sed -n "1,40p" "$out/report/report.md"
printf '\nReport:  %s\nGrid:    %s\nData:    %s\nCurves:  tensorboard --logdir %s\nPages:   python -m eval serve --runs %s --no-evaluate\n' \
  "$out/report/report.html" "$out/grid.png" "$out/inspect.png" "$out/runs" "$out/runs"

#!/usr/bin/env bash
# SD3's Table 3 in the world: autoencoders of 4, 8 and 16 channels, trained alike, and what each of them loses.
#
#   bash infra/runs/world_autoencoders.sh OUT [FOLDER]
#
# OUT/vae4, vae8, vae16: the autoencoders; a finished one is not trained again. FOLDER: the table and its numbers
# (default infra/docs/runs/world_autoencoders). MINUTES of one idle core each: a busy core makes fewer steps in them, so
# the cards in OUT say how many there were. What is committed took MINUTES=24.
# The 8 channels of the pipeline's own world:vae stand beside them. LPIPS: AlexNet's weights for it (torchvision's file, or
# what infra/runs/lpips_backbone.py makes).
set -euo pipefail
out=$1 folder=${2:-infra/docs/runs/world_autoencoders}
mkdir -p "$out" && out=$(realpath "$out")
cd "$(dirname "$0")/../.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
minutes=${MINUTES:-24} count=${COUNT:-1000} channels=${CHANNELS:-4 8 16}

folders=()
for number in $channels; do
  [ -e "$out/vae$number/README.md" ] || python -m data_pipeline.world.training.train vae --channels "$number" \
    --minutes "$minutes" --out "$out/vae$number"
  folders+=("$out/vae$number")
done
python -m eval autoencoder --vae "${folders[@]}" world:vae --count "$count" --out "$folder" ${LPIPS:+--lpips "$LPIPS"}

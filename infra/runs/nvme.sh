#!/usr/bin/env bash
# Parameters on a local disk (ZeRO-3's NVMe offload) on two CPU ranks: a run that is pre-empted half way and resumed,
# against the same run with its parameters in memory. Needs libaio-dev; DeepSpeed compiles its reader once (a minute).
#
#   infra/runs/nvme.sh OUT [FOLDER]
#
# OUT: where the runs and the swapped parameters go. FOLDER: where report.md goes (default infra/docs/runs/nvme). DEPTH
# may be set: below 9 DeepSpeed swaps little, as it keeps tensors of less than 1 MB in memory.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=$1 folder=${2:-infra/docs/runs/nvme} depth=${DEPTH:-9} python=${PYTHON:-python} batch=4 steps=8
mkdir -p "$out/swap" "$folder"
pids=()
export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu PYTHONPATH=$PWD
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}

[ -e "$out/data/dataset.json" ] || "$python" - "$out/data" <<'PY'
import sys

from data_pipeline.plans import SD3_TEXT
from data_pipeline.synthetic import write_synthetic

shape = (16, 32, 32)
write_synthetic(sys.argv[1], num_samples=64, val_samples=8, latent_shape=shape, text_spec=SD3_TEXT, buckets=("256x256",))
PY

start() { # RUN OPTIONS...: two ranks in the background, their ids in $pids
  local run=$1 port rank
  shift
  port=$("$python" -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])")
  pids=()
  for rank in 0 1; do
    RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=2 LOCAL_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port \
      "$python" -m trainer train d15 --model.depth "$depth" --data "$out/data" --out "$run" --images $((steps * batch)) \
      --global-batch "$batch" --parallel.micro-batch 1 --parallel.zero-stage 3 --parallel.persistence-threshold 0 \
      --parallel.max-live 0 --parallel.offload-optimizer --ema.profiles power:0.10 --schedule.warmup-images 0 \
      --validation.every None --logging.log-every "$batch" --logging.save-every $((steps * batch / 2)) "$@" &
    pids+=($!)
  done
}

trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT

ended() { # the exit codes of both ranks
  codes=()
  for pid in "${pids[@]}"; do
    local code=0
    wait "$pid" || code=$?
    codes+=("$code")
  done
}

rm -rf "$out/memory" "$out/swapped"
start "$out/memory"
ended
[ "${codes[*]}" = "0 0" ]

swapping=(--parallel.offload-parameters nvme --parallel.nvme-path "$out/swap")
start "$out/swapped" "${swapping[@]}"
until [ -e "$out/swapped/checkpoints/latest" ]; do sleep 0.2; kill -0 "${pids[0]}"; done
files=$(find "$out/swap" -type f | wc -l) bytes=$(du -sb "$out/swap" | cut -f1)
kill -TERM "${pids[@]}"
ended
stopped="${codes[*]}"
[ "$stopped" = "75 75" ]
start "$out/swapped" "${swapping[@]}"
ended
[ "${codes[*]}" = "0 0" ]

"$python" - "$out" "$folder" "$depth" "$files" "$bytes" "$stopped" <<'PY'
"""Compare the two runs bit by bit, write report.md."""
import json
import sys
from pathlib import Path

from trainer.ladders.verify import same

out, folder, depth, files, size, stopped = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
verdicts = same(out / "memory", out / "swapped", "in memory, and swapped, pre-empted and resumed")


parameters = json.loads((out / "memory" / "plan.json").read_text())["parameters"]
text = [
    f"# Parameters on a local disk: depth {depth}, two CPU ranks", "",
    f"{parameters:,} parameters in bf16, ZeRO-3, optimizer on the host. Written by `infra/runs/nvme.sh`. While the swapped "
    f"run trained, {files} files of {int(size):,} bytes lay below `--parallel.nvme-path`: two bytes a parameter are "
    f"{2 * parameters:,}; tensors of less than 1 MB stay in memory. SIGTERM half way: exit codes {stopped}; the same "
    "command went on.", "",
    *[f"- {'kept' if v.kept else 'BROKEN'}: {v.promise} ({v.found})" for v in verdicts],
]  # fmt: skip
(folder / "report.md").write_text("\n".join(text) + "\n")
print("\n".join(text))
if not all(v.kept for v in verdicts):
    sys.exit(1)
PY

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
source infra/runs/ranks.sh
write_data "$out/data"

start() { # RUN OPTIONS...
  start_ranks d15 --model.depth "$depth" --data "$out/data" --out "$1" --images $((steps * batch)) --global-batch "$batch" \
    --parallel.micro-batch 1 --parallel.offload-optimizer --ema.profiles power:0.10 --schedule.warmup-images 0 \
    --validation.every None --logging.log-every "$batch" --logging.save-every $((steps * batch / 2)) "${@:2}"
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

from infra.markdown import wrap_prose
from trainer.ladders.verify import compare_bits

out, folder, depth, files, size, stopped = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
verdicts = compare_bits(out / "memory", out / "swapped", "in memory, and swapped, pre-empted and resumed")


parameters = json.loads((out / "memory" / "plan.json").read_text())["parameters"]
text = [
    f"# Parameters on a local disk: depth {depth}, two CPU ranks", "",
    f"{parameters:,} parameters in bf16, ZeRO-3, optimizer on the host. Written by `infra/runs/nvme.sh`. While the swapped "
    f"run trained, {files} files of {int(size):,} bytes lay below `--parallel.nvme-path`: two bytes a parameter are "
    f"{2 * parameters:,}; tensors of less than 1 MB stay in memory. SIGTERM half way: exit codes {stopped}; the same "
    "command went on.", "",
    *[f"- {'kept' if v.kept else 'BROKEN'}: {v.promise} ({v.found})" for v in verdicts],
]  # fmt: skip
(folder / "report.md").write_text(wrap_prose("\n".join(text) + "\n"))
print("\n".join(text))
if not all(v.kept for v in verdicts):
    sys.exit(1)
PY

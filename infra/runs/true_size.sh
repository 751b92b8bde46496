#!/usr/bin/env bash
# SD3's smallest model at its true size on two CPU ranks: real ZeRO-3 steps in bf16, saved, killed, resumed bit by bit;
# the plan, calibrated on the smallest depth, against what every depth took (`plan RUN --calibrate SMALL_RUN`).
#
#   infra/runs/true_size.sh OUT [FOLDER]
#
# OUT: where the runs go (depth 15: 13 GB of memory, 30 GB of disk). FOLDER: where report.md and report.json go (default
# infra/docs/runs/true_size). DEPTHS (the last one is killed and resumed), STEPS (even; SMALL_STEPS of the other depths,
# whose steps of half a second need more of them), BATCH and PYTHON may be set.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=$1 folder=${2:-infra/docs/runs/true_size}
depths=${DEPTHS:-2 4 15} steps=${STEPS:-6} small_steps=${SMALL_STEPS:-24} batch=${BATCH:-4} python=${PYTHON:-python}
half=$((steps / 2)) largest=${depths##* }
mkdir -p "$out" "$folder"
source infra/runs/ranks.sh
write_data "$out/data"

images_of() { # DEPTH
  echo $((($1 == largest ? steps : small_steps) * batch))
}

start() { # DEPTH RUN SAVE_EVERY
  start_ranks d15 --model.depth "$1" --data "$out/data" --out "$2" --images "$(images_of "$1")" --global-batch "$batch" \
    --parallel.micro-batch 1 --ema.profiles power:0.10 --schedule.warmup-images 0 --validation.every None \
    --logging.log-every "$batch" --logging.save-every "$3" --logging.keep 1
}

# A shared machine's speed moves by a third within minutes, so a depth is planned before its run and after it, and the
# mean of both is graded; the first depth calibrates. What a host takes from a virtual machine's cores is told beside.
cat > "$out/plan.py" <<'PY'
"""plan.py DEPTH OUT before: the steps as planned now. plan.py DEPTH OUT after LOAD LOAD: graded."""
import dataclasses
import json
import sys
from pathlib import Path

from trainer.machines import Machine
from trainer.planning.estimates import Cost
from trainer.planning.reality import Calibration, calibrate, find_missed, grade_run, read_recipe

depth, out, when, *load = sys.argv[1:]
run, before, path = (Path(out, name) for name in (f"straight-d{depth}", f"before-d{depth}.json", "calibration.json"))
if when == "before" and not path.exists():
    sys.exit()  # nothing teaches yet: the first depth will
if not path.exists():
    path.write_text(json.dumps(dataclasses.asdict(calibrate(str(run)))))
kept = json.loads(path.read_text())
calibration = Calibration(**kept | {"machine": Machine(**kept["machine"]), "extra": Cost(**kept["extra"])})
if when == "before":
    small = read_recipe(calibration.run)
    recipe = dataclasses.replace(small, model=dataclasses.replace(small.model, depth=int(depth)))
    before.write_text(json.dumps(calibration.plan(recipe, world_size=2).predicted))
    sys.exit()

rows, planned = grade_run(str(run), calibration), {}
if before.exists():
    first = json.loads(before.read_text())
    for name in [name for name in rows if name.startswith("step_")]:
        now, found = rows[name]
        planned[name] = (first[f"cost/{name}"], now)
        rows[name] = (sum(planned[name]) / 2, found)
told = {"rows": rows, "missed": find_missed(rows), "planned": planned, "calibration": calibration.describe(), "load": load}
(run / "graded.json").write_text(json.dumps(told))
PY

for depth in $depths; do
  run=$out/straight-d$depth
  if [ ! -e "$run/weights/raw.safetensors" ]; then
    "$python" "$out/plan.py" "$depth" "$out" before
    load=$(cut -d' ' -f1 /proc/loadavg)
    start "$depth" "$run" "$(images_of "$depth")"
    ended
    [ "${codes[*]}" = "0 0" ]
    "$python" "$out/plan.py" "$depth" "$out" after "$load" "$(cut -d' ' -f1 /proc/loadavg)"
    rm -rf "$run/checkpoints" # the disk shall hold one run at a time
  fi
done

killed=$out/killed-d$largest
if [ ! -e "$killed/weights/raw.safetensors" ]; then
  rm -rf "$killed"
  start "$largest" "$killed" $((half * batch))
  until [ -e "$killed/checkpoints/latest" ]; do sleep 0.5; kill -0 "${pids[0]}"; done
  sleep 1
  kill -9 "${pids[1]}"
  ended
  echo "SIGKILL after step $half: exit codes ${codes[*]}" | tee "$killed/killed"
  [ "${codes[*]}" = "76 137" ]
  rm -rf "$killed/weights"
  start "$largest" "$killed" "$(images_of "$largest")"
  ended
  [ "${codes[*]}" = "0 0" ]
fi

"$python" - "$out" "$folder" $depths <<'PY'
"""Compare the two runs of the largest depth bit by bit, grade the plan, write report.md and report.json."""
import json
import os
import platform
import statistics
import sys
from pathlib import Path

import torch

from infra.markdown import wrap_prose
from trainer.ladders.verify import compare_bits
from trainer.planning.reality import find_goal

out, folder, depths = Path(sys.argv[1]), Path(sys.argv[2]), [int(d) for d in sys.argv[3:]]


def look(depth: int) -> dict:
    """A run as it was: memory and EMA of its steps after the first; its plan against what it took."""
    run = out / f"straight-d{depth}"
    lines = [json.loads(line) for line in (run / "logs" / "train.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    batch = json.loads((run / "recipe.json").read_text())["global_batch"]
    told = json.loads((run / "graded.json").read_text())
    median = lambda values: statistics.median(values[1:])  # the first step makes Adam's moments
    return {
        "depth": depth, "steps": len(steps), "losses": [line["loss"] for line in steps],
        "ema_share": median([line["ema_share"] for line in steps]),
        "stolen_cores": median([line["stolen_cores"] for line in steps]),
        "clock_seconds": median([batch / line["images_per_second"] for line in steps]),
        "memory_gib": max(line["memory_gib"] for line in steps), **told,
    }  # fmt: skip


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def head(*cells: str) -> list[str]:
    return [row(*cells), row(*["---"] * len(cells))]


runs = [look(depth) for depth in depths]
first, largest = runs[0], runs[-1]
verdicts = compare_bits(out / f"straight-d{depths[-1]}", out / f"killed-d{depths[-1]}", "killed, resumed and straight through")

text = [
    f"# Depth {depths[-1]} on SD3's true token counts, two CPU ranks", "",
    f"{largest['rows']['parameters'][1]:,.0f} parameters, 256 image tokens and 154 text tokens, bf16 with fp32 masters, "
    "reductions, moments and one EMA profile, ZeRO-3 with every parameter sharded, one image at once, "
    f"{largest['steps']} steps. Written by `infra/runs/true_size.sh`; {platform.machine()}, "
    f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}.", "",
    f"Load average while depth {depths[-1]} ran: {' to '.join(largest['load'])} on {os.cpu_count()} cores. CPU seconds (of "
    "the busier rank, with its helper threads) say what the work costs. Stolen cores are those that the host of this virtual "
    "machine gave to others meanwhile; seconds a step are by the clock without them, and the clock is told beside.",
    "", "## Killed and resumed", "", f"{(out / f'killed-d{depths[-1]}' / 'killed').read_text().strip()}.", "",
    *[f"- {'kept' if v.kept else 'BROKEN'}: {v.promise} ({v.found})" for v in verdicts], "",
    "losses: " + ", ".join(f"{loss:.6f}" for loss in largest["losses"]), "", "## Steps", "",
    *head("depth", "seconds a step", "by the clock", "CPU seconds", "EMA's share", "largest process GiB", "load", "stolen cores"),
    *[row(r["depth"], f"{r['rows']['step_seconds'][1]:.2f}", f"{r['clock_seconds']:.2f}",
          f"{r['rows']['step_cpu_seconds'][1]:.2f}", f"{r['ema_share']:.2%}",
          f"{r['memory_gib']:.2f}", " to ".join(r["load"]), f"{r['stolen_cores']:.2f}") for r in runs],
    "", "## The plan against what was measured", "",
    "Bytes are of the fuller rank; activations are those that autograd kept of the first forward pass. Steps are planned "
    "by trials right before and right after each run, and the mean is graded: this machine's own speed moves meanwhile.",
    "",
]  # fmt: skip
for r in runs:
    text += [*head(f"depth {r['depth']}", "planned", "measured", "error", "goal")]
    for name, (planned, found) in r["rows"].items():
        if name == "images_per_second":
            continue
        step = name.startswith("step_")
        error = "calibrated on it" if step and r is first else f"{planned / found - 1:+.2%}"
        goal = f"{find_goal(name):.0%}" + (", missed" if name in r["missed"] else "")
        text.append(row(name, *(f"{value:,.{3 if step else 0}f}" for value in (planned, found)), error, goal))
    text += [""]
for r in runs:
    for name, (before, after) in r["planned"].items():
        text.append(f"- depth {r['depth']}, {name}: planned {before:.3f} before the run, {after:.3f} after it")
text += ["", *[f"Depth {r['depth']}: {r['calibration']}." for r in runs[-1:]]]
(folder / "report.md").write_text(wrap_prose("\n".join(text) + "\n"))
(folder / "report.json").write_text(json.dumps(runs, indent=1) + "\n")
print("\n".join(text))
if not all(v.kept for v in verdicts):
    sys.exit(1)
PY

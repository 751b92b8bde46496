"""How long a training needs from SIGTERM to its end. The planner knows: it is asked as a person would ask it."""

import json
import math
import subprocess
import sys
from collections.abc import Sequence

from infra.launch.job import GRACE_S, Job

LEAST_S = 120
# Of a recipe, the fields that are no group of fields.
PLAIN_FIELDS = ("images", "global-batch", "formulation", "shift", "seed", "precision", "objective")
# The planner would ask for a decoder, which a training finds in its data. Its networks are not saved.
UNPLANNED = ("student.perceptual",)
SPARE_S = 60  # for what was going on (validation, a picture), and for processes to end


def choose_grace(job: Job) -> int:
    """Seconds: twice the planned save and step, and a minute. GRACE_S for a job that is no training; also where the
    planner refuses the recipe, which is then told."""
    words = list_plan_words(job)
    if words is None:
        return GRACE_S
    done = subprocess.run([sys.executable, "-m", "trainer", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("error: ")
        print(f"note: no plan of a save, so {GRACE_S} s from SIGTERM to SIGKILL: {why}", file=sys.stderr)
        return GRACE_S
    plan = json.loads(done.stdout)
    seconds = SPARE_S + 2 * (plan["save_seconds"] + plan["time"]["step_seconds"])
    return max(LEAST_S, 10 * math.ceil(seconds / 10))


def list_plan_words(job: Job) -> list[str] | None:
    """The words after `python -m trainer` that plan what the command trains; None where it does not train.

    Fields of the recipe (`--model.depth 4`, `--global-batch 64`) say how large it is; all other options (`--data`) are
    left out.
    """
    pairs = list(zip(job.command, job.command[1:]))
    if ("trainer", "train") not in pairs or len(job.command) < pairs.index(("trainer", "train")) + 3:
        return None
    recipe, *rest = job.command[pairs.index(("trainer", "train")) + 2 :]
    device = ["--gpu", "h100-80"] if job.gpus_per_node else []
    return ["plan", recipe, *_keep_fields(rest), "--gpus", str(job.num_ranks * job.nodes), *device, "--json"]


def _keep_fields(words: Sequence[str]) -> list[str]:
    kept, keep = [], False
    for word in words:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("_", "-")
            keep = ("." in name or name in PLAIN_FIELDS) and name not in UNPLANNED
        if keep:
            kept.append(word)
    return kept

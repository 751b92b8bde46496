"""The command line: `python -m trainer ...`, or `deepspeed --num_gpus 2 --module trainer train RECIPE ...`."""

import os
import sys
import time

from infra.cli import HELP, Command, CommandGroup, Commands, UsageError, run_commands
from infra.errors import run_cli
from infra.outcome import report_outcome

DOC = """Train SD3-class text-to-image models with DeepSpeed ZeRO.

  deepspeed --num_gpus 2 --module trainer train world-d4 --data URI --out RUN    two ranks (GPUs, or CPU cores)
  python -m trainer train world-d4 --data URI --out RUN                          one process
  python -m trainer ladder world --depths 2 3 4 --data URI --out RUNS            the rungs that are missing
  python -m trainer sweep lr world --depths 2 3 --data URI --out RUNS            loss against learning rate
  python -m trainer plan d24 --gpus 64 --gpu h100-80                             memory, time, dollars
  python -m trainer train --help                                                 the recipes

Run the same command again to continue an interrupted run. Exit codes: 0 done, 2 a user's mistake (one line says
which), 69 no answer from the storage or a rank (try again), 75 stopped by SIGTERM or Ctrl-C after saving, 76 another
rank was lost."""
SWEEPS = {
    "lr": Command("trainer.commands:sweep_rates", "learning rates on rungs of a ladder", takes_words=True),
    "formulations": Command("trainer.commands:sweep_formulations", "any of the 61 formulations", takes_words=True),
}
COMMANDS: Commands = {
    "train": Command("trainer.commands:train", "train a recipe", takes_words=True),
    "ladder": Command("trainer.commands:ladder", "train the rungs of a ladder that are missing", takes_words=True),
    "sweep": CommandGroup(SWEEPS, "train a recipe's variants that are missing: lr or formulations"),
    "plan": Command("trainer.commands:plan", "what a recipe needs: memory, time, dollars", takes_words=True),
    "grade": Command("trainer.commands:grade", "the plan of a finished run against what it took", takes_words=True),
    "export": Command("trainer.commands:export", "write weights from a checkpoint", takes_words=True),
    "posthoc": Command("trainer.commands:posthoc", "an EMA of any width out of the stored ones", takes_words=True),
    "verify-resume": Command(
        "trainer.commands:verify_resume", "prove that resuming continues the same run", takes_words=True
    ),
}


def main() -> None:
    """Rank 0 alone reports a mistake of the command line; the others wait until it has: the first to exit ends all."""
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]  # the deepspeed launcher adds it
    if os.environ.get("RANK", "0") == "0":
        run_commands("python -m trainer", COMMANDS, DOC, words=words)
        return
    if not words or set(words) & set(HELP):
        return
    try:
        run_commands("python -m trainer", COMMANDS, DOC, words=words)
    except UsageError:
        time.sleep(3.0)
        raise SystemExit(2) from None


if __name__ == "__main__":
    with report_outcome():
        run_cli(main)

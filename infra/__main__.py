"""`python -m infra`: examine this machine, launch jobs, make buckets."""

from infra.cli import Command, run_commands
from infra.errors import run_cli

COMMANDS = {
    "doctor": Command(
        "infra.commands:doctor", "check Python, libraries, GPUs, precision, memory, disk, S3, checkpoints"
    ),
    "launch": Command("infra.commands:launch", "run a command as a job of a scheduler", takes_words=True),
    "make-bucket": Command("infra.commands:make_bucket", "create the bucket of an s3:// URI where it does not exist"),
    "supervise": Command("infra.commands:supervise", "start ranks, pass SIGTERM on, wait for all", takes_words=True),
}


def main() -> None:
    run_commands("python -m infra", COMMANDS, "Examine this machine, launch jobs, make buckets.")


if __name__ == "__main__":
    run_cli(main)

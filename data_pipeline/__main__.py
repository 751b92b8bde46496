"""The command line: `python -m data_pipeline ...`, raw images to training shards."""

import os

from infra.cli import Command, run_commands
from infra.errors import run_cli

COMMANDS = {
    "run": Command(
        "data_pipeline.commands:run",
        "raw images through filter, dedup, bucket, caption, encode and pack: `run PLAN|FILE.yaml --out URI`",
        takes_words=True,
    ),
    "world": Command(
        "data_pipeline.commands:world",
        "write raw scenes of the embedded world as img2dataset would",
    ),
    "pairs": Command(
        "data_pipeline.commands:pairs",
        "people's preference pairs (JSON lines of caption and two pictures) as training shards: `pairs PLAN FILE`",
    ),
    "lint": Command(
        "data_pipeline.commands:lint",
        "read a foreign source before any work: what it holds, what a run would make of it: `lint KIND:URI`",
    ),
    "couple": Command(
        "data_pipeline.couplings.command:couple",
        "what a teacher's solver makes of noise, for few-step students: `couple --teacher W --prompts URI --count N`",
    ),
    "verify": Command(
        "data_pipeline.commands:verify", "read a dataset back and check every hash and count: `verify URI`"
    ),
    "takedown": Command(
        "data_pipeline.commands:takedown",
        "take images out of every later training and pack, list the runs that saw them: `takedown URI --keys KEY`",
    ),
    "report": Command("data_pipeline.commands:report", "what each threshold would keep of the rows: `report URI`"),
    "estimate": Command(
        "data_pipeline.commands:estimate",
        "objects, bytes, requests, dollars and GPU-hours of a data set to come: `estimate --images 1e9`",
    ),
    "inspect": Command(
        "data_pipeline.commands:inspect",
        "what a dataset holds, and a grid of samples with captions: `inspect URI --out grid.png`",
    ),
}


def main() -> None:
    # several threads in each of several workers would only get in each other's way
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_commands("python -m data_pipeline", COMMANDS, "Raw images to training shards.")


if __name__ == "__main__":
    run_cli(main)

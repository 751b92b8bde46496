"""Draw images, evaluate runs, write the scaling report, use GenEval by itself: `python -m eval COMMAND --help`."""

import sys
from collections.abc import Callable
from typing import Any

from infra.cli import parse, parse_command
from infra.errors import UserError, nearest, run_cli
from model.errors import ModelError


def run_command() -> None:
    from eval.run import RunOptions, run

    run(parse(RunOptions, sys.argv[2:], prog="python -m eval run", description=run.__doc__))


def sample_command() -> None:
    from eval.studies.sample import sample

    parse(sample, sys.argv[2:], prog="python -m eval sample")


def report_command() -> None:
    from eval.report.build import main

    main(sys.argv[2:])


def predict_command() -> None:
    from eval.report.predict import main

    main(sys.argv[2:])


def serve_command() -> None:
    from eval.service.serve import main

    main(sys.argv[2:])


def geneval_command() -> None:
    from eval.metrics.geneval.tool import judge, prompts, score

    commands: dict[str, Callable[..., Any]] = {"prompts": prompts, "judge": judge, "score": score}
    parse_command(commands, sys.argv[2:], prog="python -m eval geneval")


def compbench_command() -> None:
    from eval.metrics.compbench.tool import judge, merge, score

    commands: dict[str, Callable[..., Any]] = {"judge": judge, "score": score, "merge": merge}
    parse_command(commands, sys.argv[2:], prog="python -m eval compbench")


def compare_command() -> None:
    from eval.studies.compare import compare

    parse(compare, sys.argv[2:], prog="python -m eval compare")


def autoencoder_command() -> None:
    from eval.studies.autoencoder import main

    main(sys.argv[2:])


def pairs_command() -> None:
    from eval.studies.pairs import PairOptions, pairs

    pairs(parse(PairOptions, sys.argv[2:], prog="python -m eval pairs", description=pairs.__doc__))


def study_command() -> None:
    from eval.studies.formulations import main

    main(sys.argv[2:])


COMMANDS = {
    "sample": (sample_command, "draw prompts with exported weights into a labelled grid"),
    "run": (run_command, "evaluate every checkpoint of every run, once"),
    "report": (report_command, "write report.html, figures and report.json from run folders"),
    "predict": (predict_command, "commit what the scaling law says about the next depth, before it is trained"),
    "serve": (serve_command, "watch runs, evaluate each new checkpoint once, show everything in a browser"),
    "compare": (compare_command, "is checkpoint B better than A? differences with intervals, paired by prompt"),
    "autoencoder": (autoencoder_command, "what autoencoders lose: rFID, LPIPS, SSIM, PSNR (SD3's Table 3)"),
    "pairs": (pairs_command, "preference pairs for DPO: draw each prompt several times, let a judge rank the pictures"),
    "study": (study_command, "rank formulations as SD3's section 5.1 does"),
    "compbench": (compbench_command, "T2I-CompBench by itself: judge (stored evidence), score (samples), merge"),
    "geneval": (geneval_command, "GenEval by itself: prompts, judge (stored detections), score (a folder of images)"),
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        lines = "\n".join(f"  {command:<11} {text}" for command, (_, text) in COMMANDS.items())
        print(f"usage: python -m eval COMMAND [options]\n\n{__doc__}\n\ncommands:\n{lines}")
        return
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; known: {', '.join(COMMANDS)}{nearest(name, COMMANDS)}")
    COMMANDS[name][0]()


if __name__ == "__main__":
    run_cli(main, also=(ModelError,))

"""Draw images, evaluate runs, write the scaling report, use GenEval by itself: `python -m eval COMMAND --help`."""

from infra.cli import Command, CommandGroup, Commands, run_commands
from infra.errors import run_cli

GENEVAL = {
    "prompts": Command("eval.metrics.geneval.tool:prompts", "the official prompts as JSON lines"),
    "judge": Command("eval.metrics.geneval.tool:judge", "score stored detections"),
    "score": Command("eval.metrics.geneval.tool:score", "detect and score in a folder of images"),
}
COMPBENCH = {
    "judge": Command("eval.metrics.compbench.tool:judge", "score stored evidence"),
    "score": Command("eval.metrics.compbench.tool:score", "look at a folder of images and score them"),
    "merge": Command(
        "eval.metrics.compbench.tool:merge", "the 3-in-1 answers of complex prompts from the official answer files"
    ),
}
COMMANDS: Commands = {
    "sample": Command("eval.studies.sample:sample", "draw prompts with exported weights into a labelled grid"),
    "run": Command("eval.run:run", "evaluate every checkpoint of every run, once"),
    "report": Command("eval.report.build:report", "write report.html, figures and report.json from run folders"),
    "predict": Command(
        "eval.report.predict:predict_next",
        "commit what the scaling law says about the next depth, before it is trained",
    ),
    "serve": Command(
        "eval.service.serve:serve",
        "watch runs, evaluate each new checkpoint once, show everything in a browser",
    ),
    "compare": Command(
        "eval.studies.compare:compare",
        "is checkpoint B better than A? differences with intervals, paired by prompt",
    ),
    "autoencoder": Command(
        "eval.studies.autoencoder:measure_autoencoders",
        "what autoencoders lose: rFID, LPIPS, SSIM, PSNR (SD3's Table 3)",
    ),
    "pairs": Command(
        "eval.studies.pairs:make_pairs",
        "preference pairs for DPO: draw each prompt several times, let a judge rank the pictures",
    ),
    "study": Command("eval.studies.formulations:study", "rank formulations as SD3's section 5.1 does"),
    "fewstep": Command(
        "eval.studies.fewstep:measure_few_steps",
        "teacher and students by number of steps: quality, straightness, diversity, time",
    ),
    "compbench": CommandGroup(COMPBENCH, "T2I-CompBench by itself: judge (stored evidence), score (samples), merge"),
    "geneval": CommandGroup(
        GENEVAL, "GenEval by itself: prompts, judge (stored detections), score (a folder of images)"
    ),
}


def main() -> None:
    run_commands("python -m eval", COMMANDS, "Draw images, evaluate runs, write the scaling report.")


if __name__ == "__main__":
    run_cli(main)

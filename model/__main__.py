"""The command line: `python -m model ...` describes models and formulations, converts weights, merges LoRA adapters."""

from infra.cli import Command, run_commands
from infra.errors import run_cli

COMMANDS = {
    "info": Command("model.commands:info", "parameters, FLOPs and activation memory of a model"),
    "formulations": Command("model.commands:formulations", "the 61 formulations, and any added since"),
    "plot-densities": Command(
        "model.commands:plot_densities", "draw timestep densities, the resolution shift and the loss weights"
    ),
    "convert": Command(
        "model.commands:convert", "convert weights between our files, SD3/SD3.5 single files and diffusers folders"
    ),
    "merge": Command("model.commands:merge", "merge a LoRA adapter into the weights that it was trained on"),
}


def main() -> None:
    run_commands("python -m model", COMMANDS, "Describe models and formulations, convert weights.")


if __name__ == "__main__":
    run_cli(main)

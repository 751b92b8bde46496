"""What an isoFLOP ladder found: for every budget of training FLOPs the loss at each depth, and the best depth."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from infra import storage
from infra.errors import UserError
from model.flops import estimate_train_flops
from trainer.ladders.picture import draw_loss_curves
from trainer.runfolder import read_last_val_loss, read_recipe


@dataclass(frozen=True)
class IsoFlopRun:
    """One run: the EMA validation loss that a budget bought at a depth, with its 95 % interval where it has one."""

    budget: float
    flops: float
    """What its whole batches cost."""
    depth: int
    parameters: int
    images: int
    loss: float
    low: float | None
    high: float | None


def write_summary(runs: Sequence[str], *, out: str) -> str:
    """Write OUT/isoflop.json, .md and .png from the finished runs OUT/<recipe>-<budget>; the table."""
    cells = sorted((read_isoflop_run(run) for run in runs), key=lambda cell: (cell.budget, cell.depth))
    best = {f"{cell.budget:g}": cell.depth for cell in choose_best(cells)}
    found = {"cells": [asdict(cell) for cell in cells], "best_depth": best}
    text = format_table(cells)
    storage.write_bytes(storage.join(out, "isoflop.json"), json.dumps(found, indent=1).encode())
    storage.write_bytes(storage.join(out, "isoflop.md"), f"# Compute budgets\n\n{text}".encode())
    storage.write_bytes(storage.join(out, "isoflop.png"), draw_picture(cells))
    return text


def read_isoflop_run(run: str) -> IsoFlopRun:
    """One point of the table, read from the run's own files. Its budget is read from its name."""
    recipe = read_recipe(run)
    loss = read_last_val_loss(run, recipe)
    if loss is None:
        raise UserError(f"{run}: no validation loss: omit --validation.every None")
    _, height, width = recipe.data.latent_shape
    flops = estimate_train_flops(recipe.model, height, width, recipe.data.text_tokens)
    return IsoFlopRun(
        float(run.rsplit("-", 1)[-1]), recipe.images * flops, recipe.model.depth, recipe.model.count_parameters(),
        recipe.images, loss.value, loss.low, loss.high,
    )  # fmt: skip


def choose_best(cells: Sequence[IsoFlopRun]) -> list[IsoFlopRun]:
    """The cell of least loss for each budget."""
    budgets = sorted({cell.budget for cell in cells})
    return [min((cell for cell in cells if cell.budget == b), key=lambda cell: cell.loss) for b in budgets]


def format_table(cells: Sequence[IsoFlopRun]) -> str:
    """The table in Markdown. If the best depth is the least or the greatest one, the table says that the optimum may
    lie beyond it."""
    depths, best = sorted({cell.depth for cell in cells}), choose_best(cells)
    lines = ["| budget FLOPs | depth | parameters | images | validation loss (EMA) | |", "|---|---|---|---|---|---|"]
    for cell in cells:
        interval = f" ({cell.low:.5f} to {cell.high:.5f})" if cell.low is not None and cell.high is not None else ""
        mark = ""
        if cell in best:
            mark = "best, at the edge" if len(depths) > 1 and cell.depth in (depths[0], depths[-1]) else "best"
        lines.append(
            f"| {cell.budget:g} | {cell.depth} | {cell.parameters:,} | {cell.images:,} | {cell.loss:.5f}{interval} "
            f"| {mark} |"
        )
    return "\n".join(lines) + "\n"


def draw_picture(cells: Sequence[IsoFlopRun]) -> bytes:
    """Loss against parameters, a curve per budget, as PNG."""
    curves = {
        f"{budget:g} FLOPs": [(cell.parameters, cell.loss) for cell in cells if cell.budget == budget]
        for budget in sorted({cell.budget for cell in cells})
    }
    ticks = {cell.parameters: f"{cell.parameters / 1e6:.3g} M\ndepth {cell.depth}" for cell in cells}
    return draw_loss_curves(curves, xlabel="parameters", ticks=ticks)

"""The picture of a ladder or sweep: validation loss on the vertical axis, a curve for each depth or budget."""

import io
from collections.abc import Mapping, Sequence


def draw_loss_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]], *, xlabel: str, ticks: Mapping[int, str] | None = None
) -> bytes:
    """Curves of (x, EMA validation loss) by their label, x logarithmic, as PNG; `ticks`: labels of x, else matplotlib's
    own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for label, points in curves.items():
        axes.plot([x for x, _ in points], [loss for _, loss in points], marker="o", label=label)
    axes.set(xscale="log", xlabel=xlabel, ylabel="validation loss (EMA)")
    if ticks is not None:
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.minorticks_off()
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    return buffer.getvalue()

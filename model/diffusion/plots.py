"""Plots of timestep densities, of the resolution shift, and of the weight that each family puts on the log-SNR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from model.diffusion.flow import get_formulation
from model.diffusion.paths import Linear
from model.diffusion.timesteps import get_density, shift_timesteps

SHOWN_DENSITIES = ("uniform", "lognorm(0,1)", "lognorm(0.5,0.6)", "lognorm(-0.5,1)", "mode(1.29)", "mode(-1)", "cosmap")
# Name -> label; rf and v/cos have the same weight.
SHOWN_FORMULATIONS = {
    "rf": "rf, v/cos",
    "rf/lognorm(0.00,1.00)": "rf/lognorm(0,1)",
    "rf/mode(1.29)": "rf/mode(1.29)",
    "eps/linear": "eps/linear",
    "eps/cos": "eps/cos",
    "edm(-1.20,1.20)": "edm(-1.2,1.2)",
}


def plot_densities(out: Path) -> list[Path]:
    """densities.png, shift.png and weights.png in the folder `out`."""
    import matplotlib as mpl

    mpl.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    return [_draw_densities(out / "densities.png"), _draw_shift(out / "shift.png"), _draw_weights(out / "weights.png")]


def _make_axes(xlabel: str, ylabel: str, title: str) -> tuple[Any, Any]:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _draw_densities(path: Path) -> Path:
    t = torch.linspace(0.002, 0.998, 499, dtype=torch.float64)
    figure, axes = _make_axes("t (0 data, 1 noise)", "density", "Timestep densities for rectified flow")
    for name in SHOWN_DENSITIES:
        axes.plot(t, get_density(name).pdf(t), label=name)
    axes.set_ylim(0, 4)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return _save(figure, path)


def _draw_shift(path: Path) -> Path:
    t = torch.linspace(0, 1, 201, dtype=torch.float64)
    figure, axes = _make_axes("t at n pixels", "t at m pixels", "Resolution shift, alpha = sqrt(m/n)")
    for alpha in (1.0, 1.5, 2.0, 3.0, 4.0):
        axes.plot(t, shift_timesteps(t, alpha), label=f"alpha = {alpha:g}")
    axes.legend()
    return _save(figure, path)


def _draw_weights(path: Path) -> Path:
    """w(lambda) over its value at 0, on a logarithmic scale; constants do not matter."""
    smooth = torch.sigmoid(torch.linspace(-14, 14, 3000, dtype=torch.float64))
    between_levels = (torch.arange(999, dtype=torch.float64) + 0.5) / 1000
    figure, axes = _make_axes("log-SNR lambda", "w(lambda) / w(0)", "Weight on the noise error under the unified loss")
    for name, label in SHOWN_FORMULATIONS.items():
        form = get_formulation(name)
        u = between_levels if isinstance(form.path, Linear) else smooth
        log_snr, weight = form.log_snr(u), form.weight(u)
        shown = log_snr.abs() < 10
        axes.semilogy(log_snr[shown], weight[shown] / weight[log_snr.abs().argmin()], label=label)
    axes.set_ylim(1e-4, 1e3)
    axes.legend()
    return _save(figure, path)

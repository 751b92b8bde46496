"""What every command that trains many runs is told alike: the data, where the runs go, on what each is started."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from data_pipeline.selection.choice import DataChoice
from infra.cli import FLAT


@dataclass(frozen=True)
class ManyRuns:
    """What `ladder` and `sweep` ask alike."""

    data: Annotated[DataChoice, FLAT]
    out: str
    """Folder of run folders: RUNS/world-d2, RUNS/world-d3 ..."""
    num_ranks: int | None = None
    """Processes per run; default: GPUs, or CPU cores up to 2 where there is none."""
    workers: int = 0
    """Ray workers that share the runs, each with a run's ranks (RAY_ADDRESS, or a private Ray here); 0: one after
    another, in this process."""
    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Fields of the recipe as words, handed to every run's command: --optimizer.lr 1e-3 --logging.keep 1."""

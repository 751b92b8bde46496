"""Options that the studies share: judges, noise and machine."""

from dataclasses import dataclass, field, replace
from typing import Any

from eval.drawing.generate import Sampling
from eval.judging.official import OfficialPaths
from eval.run import RunOptions, settle
from infra.device import Precision


@dataclass(frozen=True)
class DrawingOptions:
    """How a study draws and judges; steps and guidance are its own."""

    judges: str = "world"
    """world, or official (needs local checkpoints and pictures: --official...)"""
    workers: int = 0
    """Ray workers that share the runs; 0 does all in this process"""
    gpus_per_worker: float = 0
    """with --device cuda: the share of a GPU that each worker gets"""
    seed: int = 0
    """of the noise, which is the same for all runs"""
    precision: Precision = "auto"
    """of the network: fp32, bf16, or auto: what this machine does best"""
    batch: int = 64
    """pictures drawn at a time"""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N"""
    official: OfficialPaths = field(default_factory=OfficialPaths)

    def make_run(self, runs: str, **counts: Any) -> RunOptions:
        """What `eval run` would be told; `counts`: its further options."""
        sampling = Sampling(seed=self.seed, precision=self.precision, batch=self.batch, device=self.device)
        return RunOptions(
            runs, judges=self.judges, official=self.official, sampling=sampling, workers=self.workers,
            gpus_per_worker=self.gpus_per_worker, **counts,
        )  # fmt: skip

    def settle(self, run: RunOptions) -> "DrawingOptions":
        """The options with device and precision resolved as for `run`, the same for all workers."""
        settled = settle(run)
        sampling = settled.sampling
        return replace(self, device=sampling.device, precision=sampling.precision, official=settled.official)

"""Measures the training loop: loss (also by time t), attention, time spent waiting for data, efficiency, memory.

Figures are the numbers of a line of the log. Each rank gathers its own until such a line is due; then `take` combines
them over the ranks.
"""
# Shapes: B batch.

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from infra.log import get_logger
from infra.steal import read_stolen_seconds
from model.probe import AttentionProbe, AttentionStatistics
from trainer.machines import Machine
from trainer.network import Losses
from trainer.objective import Passes, count_network_passes, count_train_flops
from trainer.recipe import Recipe
from trainer.watching.stragglers import Stragglers, measure_speed
from trainer.watching.watchdog import Watchdog
from trainer.zero.group import Group

log = get_logger("monitor")
BINS = 8  # of equal width, over t from 0 to 1
LAST = 5  # attentions that count: the SD3 paper averages the last five blocks of its depth-24 model (figure 5)


class BinnedLosses(NamedTuple):
    """A micro-batch: for each sample the bin of its time (0 to BINS - 1), its loss, and the objective's other figures.
    `dataset_B`: of a mix, the number of each sample's dataset."""

    bin_B: Tensor
    loss_B: Tensor
    figures: Mapping[str, Tensor]
    dataset_B: Tensor | None = None


class Monitor:
    """Gathers the figures of the steps since the last `take`. The loop says what it does by `mark_phase`, which serves
    the watchdog too."""

    def __init__(
        self, recipe: Recipe, group: Group, machine: Machine, watchdog: Watchdog | None = None, *,
        datasets: tuple[str, ...] = (), frozen_flops: int = 0,
    ) -> None:  # fmt: skip
        """`datasets`: names of the datasets of a mix, each of which gets a loss of its own in the log. `frozen_flops`:
        of a perceptual loss, for each image."""
        self.group, self._machine, self._watchdog, self._datasets = group, machine, watchdog, datasets
        _, height, width = recipe.data.latent_shape
        # Not the customary "three forward passes": layers that read data need no gradient for their input.
        config, tokens = recipe.model, recipe.data.text_tokens
        exact = config.count_forward_flops(height, width, tokens) + config.count_backward_flops(height, width, tokens)
        one_pass = count_network_passes(recipe) == Passes() and recipe.lora.rank is None
        self._flops = (exact if one_pass else count_train_flops(recipe)) + frozen_flops
        self._stragglers = Stragglers(group) if group.world_size > 1 else None
        self._start()
        self.activations: int | None = None
        """Bytes that the first forward pass kept for its backward pass; None before it, or where blocks are recomputed
        or compiled."""
        self._eager = not recipe.parallel.compile
        if not self._eager and group.rank == 0:
            log.info("no attention/max_logit, attention/entropy: the probe cannot see into compiled blocks")
        self._counts = self._eager and not recipe.parallel.checkpoint_blocks
        self._attention: list[AttentionStatistics] = []

    def _start(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)  # by phase
        self._step_losses: list[float] = []
        self._batches: list[BinnedLosses] = []
        self._since, self._cpu, self._stolen = time.monotonic(), time.process_time(), read_stolen_seconds()

    @contextlib.contextmanager
    def mark_phase(self, name: str, step: int) -> Iterator[None]:
        """Put it around a part of the loop: it tells the watchdog what this rank does, and measures the seconds. On a
        GPU the seconds end when the work is queued, not when it is done."""
        if self._watchdog is not None:
            self._watchdog.begin(name, step)
        start = time.monotonic()
        yield
        self._seconds[name] += time.monotonic() - start

    @contextlib.contextmanager
    def watch_forward(self, model: nn.Module, *, attention: bool) -> Iterator[None]:
        """Put it around a forward pass. With `attention`, the attention of the first sample is recorded."""
        with self._probe_attention(attention), self._count_activations(model):
            yield

    @contextlib.contextmanager
    def _count_activations(self, model: nn.Module) -> Iterator[None]:
        """Count the bytes that the first pass keeps for its backward pass. As in the plan, each storage counts once and
        parameters do not count."""
        if self.activations is not None or not self._counts:
            yield
            return
        bytes_by_storage: dict[int, int] = {}  # keys are addresses
        kept: list[Tensor] = []  # holds each storage, so that no later one gets the same address

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            # Under ZeRO stage 3 the parameters' storages change all the time, so they are looked up at each call.
            if all(storage._cdata != p.untyped_storage()._cdata for p in model.parameters()):
                bytes_by_storage[storage._cdata] = storage.nbytes()
                kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        self.activations = sum(bytes_by_storage.values())

    @contextlib.contextmanager
    def _probe_attention(self, on: bool) -> Iterator[None]:
        if not (on and self._eager):
            yield
            return
        with AttentionProbe(samples=1) as probe:
            yield
        self._attention += probe.seen[-LAST:]

    def add(self, t_B: Tensor, losses: Losses, *, dataset_B: Tensor | None = None) -> None:
        """Add the times t_B (from 0 to 1, on the CPU) and the losses of one micro-batch, and of a mix the datasets of
        its samples. The losses are read in `take` only, so that nothing waits for the GPU here."""
        # The bins are copies: with a GPU the times lie in page-locked memory, which is used again.
        bin_B = (t_B.double() * BINS).long().clamp(0, BINS - 1)
        self._batches.append(BinnedLosses(bin_B, losses.loss_B.detach(), losses.figures, dataset_B))

    def end_step(self, loss: float) -> None:
        """Add a step that was taken; `loss` is the mean over its global batch."""
        self._step_losses.append(loss)

    @property
    def _names(self) -> Iterable[str]:
        """Names of the objective's other figures."""
        return self._batches[0].figures if self._batches else ()

    def _sum(self) -> dict[str, float]:
        """This rank's sums so far: losses and numbers of samples by bin of t and by dataset, and the objective's other
        figures."""
        loss_and_count = torch.zeros(2, BINS, dtype=torch.float64)
        by_dataset = torch.zeros(2, len(self._datasets), dtype=torch.float64)
        for micro in self._batches:
            loss_B = micro.loss_B.double().cpu()
            pair = torch.stack([loss_B, torch.ones_like(loss_B)])
            loss_and_count.index_add_(1, micro.bin_B, pair)
            if micro.dataset_B is not None:
                by_dataset.index_add_(1, micro.dataset_B, pair)
        return {
            **{f"data/{name}": total for name, total in zip(self._datasets, by_dataset[0].tolist())},
            **{f"data/{name}/count": count for name, count in zip(self._datasets, by_dataset[1].tolist())},
            **{f"loss/{i}": total for i, total in enumerate(loss_and_count[0].tolist())},
            **{f"count/{i}": count for i, count in enumerate(loss_and_count[1].tolist())},
            **{name: sum(micro.figures[name].double().sum().item() for micro in self._batches) for name in self._names},
        }

    def take(self) -> dict[str, float]:
        """Figures of all ranks since the last call, by their names in the log. Collective.

        `data_wait` and `ema_share` are shares of the time, `cpu_cores` and `stolen_cores` average numbers of cores,
        `memory_gib` is peak memory in GiB: each of the rank where it is largest. `mfu` is the share of all ranks' peak
        FLOP/s. `ranks/...`: see `Stragglers`.
        """
        seconds = max(time.monotonic() - self._since, 1e-9)
        data_wait = self._seconds["reading data"] / seconds
        sums = {
            **self._sum(),  # the same names on all ranks
            "images": float(sum(len(micro.loss_B) for micro in self._batches)),
            "entropy": sum(record.mean_entropy for record in self._attention) / max(len(self._attention), 1),
        }
        largest = {
            "data_wait": data_wait,
            "ema_share": self._seconds["averaging"] / seconds,
            "cpu_cores": (time.process_time() - self._cpu) / seconds,
            "stolen_cores": (read_stolen_seconds() - self._stolen) / seconds,
            "memory": float(measure_peak_memory(self.group.device)),
            "max_logit": max((record.max_logit for record in self._attention), default=0.0),
        }
        sums = dict(zip(sums, self.group.sum(list(sums.values()))))
        largest = dict(zip(largest, self.group.max(list(largest.values()))))
        figures = {
            f"loss/t{(i + 0.5) / BINS:.4f}": sums[f"loss/{i}"] / sums[f"count/{i}"]
            for i in range(BINS)
            if sums[f"count/{i}"]
        }
        for name in self._datasets:
            count = sums[f"data/{name}/count"]
            figures |= {f"data/{name}/loss": sums[f"data/{name}"] / count} if count else {}
            figures |= {f"data/{name}/share": count / sums["images"]} if sums["images"] else {}
        if self._step_losses:
            figures["loss"] = math.fsum(self._step_losses) / len(self._step_losses)
        figures |= {
            "data_wait": largest["data_wait"],
            "mfu": self._flops * (sums["images"] / seconds) / (self._machine.flops * self.group.world_size),
            "memory_gib": largest["memory"] / 2**30,
        }
        if self.group.device.type == "cpu":
            # On a CPU seconds alone say little: a virtual machine's host gives cores to others (`stolen_cores`).
            # With a GPU the EMA's update is only queued when its phase ends, so `ema_share` would be wrong there.
            figures |= {name: largest[name] for name in ("ema_share", "cpu_cores", "stolen_cores")}
        if self._stragglers is not None:
            figures |= self._stragglers.compare(speed=measure_speed(self.group.device), data_wait=data_wait)
        if self._attention:
            entropy = sums["entropy"] / self.group.world_size
            figures |= {"attention/max_logit": largest["max_logit"], "attention/entropy": entropy}
        figures |= {name: sums[name] / sums["images"] for name in self._names}
        self._attention.clear()
        self._start()
        return figures


def measure_peak_memory(device: torch.device) -> int:
    """The most bytes that this rank has held since it began: of the GPU's memory, or of main memory where it computes
    on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB

"""Run by real ranks (see test_trainer_runs.py): several trainings one after the other, each by the words that a person
would type after `trainer train`. What every rank was given goes to RUN/seen_RANK.json.

A job is {"words": [...]} and may ask for "start" (keep the weights as they are before the first step), "poison" (a
sample that makes its batch's gradient infinite, the loss stays as it is) and "hold" (seconds for which the last rank
stands still in its third step).
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._dynamo.utils import counters

import trainer.train as loop
from infra.errors import run_cli
from model.files.weights import write_safetensors
from trainer.commands import train
from trainer.feed import MicroBatch
from trainer.zero.group import Group, leave, start


class Observed:
    """The loop of one job, with the functions that it calls watched."""

    def __init__(self, job: dict[str, Any], group: Group) -> None:
        self.job, self.group = job, group
        self.run = Path(job["words"][job["words"].index("--out") + 1])
        self.seen: list[dict[str, Any]] = []
        self._bind_objective, self._restore, self._to = loop.bind_objective, loop.restore, MicroBatch.to
        self.keys: list[str] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        loop.bind_objective, loop.restore, MicroBatch.to = self.bind_objective, self.restore, self.to()
        torch.compiler.reset()
        counters.clear()
        try:
            yield
        finally:
            loop.bind_objective, loop.restore, MicroBatch.to = self._bind_objective, self._restore, self._to
        told = {"seen": self.seen, "graphs": counters["stats"]["unique_graphs"]}
        (self.run / f"seen_{self.group.rank}.json").write_text(json.dumps(told))

    def to(self):
        """Micro-batches as they go to the device."""
        plain = self._to

        def to(micro, device):
            self.keys = micro.batch.keys
            self.seen.append({"shape": list(micro.noise_BCHW.shape[1:]), "positions": micro.batch.positions.tolist()})
            return plain(micro, device)

        return to

    def bind_objective(self, recipe, **more):
        plain = self._bind_objective(recipe, **more)

        def compute(engine, batch):
            if "hold" in self.job and len(self.seen) == 3 and self.group.rank == self.group.world_size - 1:
                time.sleep(self.job["hold"])
            found = plain(engine, batch)
            if self.job.get("poison") in self.keys:
                zero_B = found.loss_B - found.loss_B.detach()
                found = found._replace(loss_B=found.loss_B + zero_B.sqrt())  # infinitely steep at zero
            return found

        return compute

    def restore(self, recipe, engine, ema, **more):
        state = self._restore(recipe, engine, ema, **more)
        if self.job.get("start"):
            for kind, tensors in (("raw", engine.masters), ("ema", ema.first)):
                whole = {name: engine.gather_whole(name, tensors) for name in engine.shapes}
                if self.group.rank == 0:
                    write_safetensors(self.run / f"start_{kind}.safetensors", whole, {})
        return state


def main() -> None:
    group = start()
    loop.start, loop.leave = (lambda: group), (lambda: None)  # the ranks meet once for all runs
    for job in json.loads(Path(sys.argv[1]).read_text()):
        with Observed(job, group).watching(), mock.patch.dict(os.environ, job.get("environment", {})):
            train(job["words"])
    leave()


if __name__ == "__main__":
    run_cli(main)

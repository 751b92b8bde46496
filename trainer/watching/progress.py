"""What a run reports while it trains: the progress line, logs/train.jsonl, TensorBoard and result rows. Rank 0 only."""

import json
import os
import shutil
import statistics
import threading
import time

from infra import storage
from infra.errors import UserError
from infra.log import Progress
from infra.results import ResultRow, ResultStore
from infra.steal import subtract_stolen
from infra.values import PromptValues, keep_values, tabulate_samples
from infra.version import code_version
from model.diffusion.validation import compute_half_interval
from trainer.objective import get_objective
from trainer.recipe import Recipe
from trainer.runfolder import name_run
from trainer.validate import ValidationResult
from trainer.watching.curves import CurveWriter
from trainer.watching.trackers import Trackers
from trainer.zero.group import Group
from trainer.zero.uploads import get_staging_folder


class RunLog:
    """Silent on ranks other than 0. Result rows wait for `flush`, so that a resumed run reports each figure once."""

    def __init__(self, recipe: Recipe, group: Group, out: str, *, images_seen: int, seconds: float) -> None:
        self.recipe, self.group, self.out = recipe, group, out
        self.run = name_run(out)
        self.images_seen, self._earlier, self._start = images_seen, seconds, time.monotonic()
        self._rows: list[ResultRow] = []
        self._values: list[tuple[int, str, PromptValues]] = []  # images seen, protocol hash, losses per sample
        self._lines: list[str] = []
        self._last = (images_seen, self._start)
        self._seconds: list[float] = []  # of a step, for each line: by the clock,
        self._own: list[float] = []  # on a CPU also without what a host took,
        self._cpu: list[float] = []  # and of work
        self._lock = threading.Lock()  # on S3 a thread flushes what the loop reports
        self._talks = group.rank == 0
        self._progress = Progress(recipe.images, "images", desc=self.run, initial=min(images_seen, recipe.images))
        self._store = ResultStore(storage.join(out, "results"))
        self._board: CurveWriter | None = None
        self._trackers = Trackers(recipe, self.run, out) if self._talks else None
        if self._talks:
            if storage.is_remote(out):
                self._events = get_staging_folder(out, group.rank).parent / "tensorboard"
                shutil.rmtree(self._events, ignore_errors=True)  # of a session before, which sent them
            else:
                self._events = storage.local_path(out) / "logs" / "tensorboard"
                self._forget_after(images_seen)
            self._board = CurveWriter(self._events, images_seen)

    @property
    def seconds(self) -> float:
        """Time spent training this run, earlier sessions included."""
        return self._earlier + time.monotonic() - self._start

    def advance(self, images_seen: int, loss: float, lr: float) -> None:
        """Move the progress bar to `images_seen`. Call it after each step."""
        self._progress.update(
            min(images_seen, self.recipe.images) - min(self.images_seen, self.recipe.images), loss=loss, lr=lr
        )
        self.images_seen = images_seen

    def rewind(self, images_seen: int) -> None:
        """The run went back: what was reported since then will be reported again."""
        self._progress.update(min(images_seen, self.recipe.images) - min(self.images_seen, self.recipe.images))
        self.images_seen, self._last = images_seen, (images_seen, time.monotonic())
        self._rows = [row for row in self._rows if row.images_seen <= images_seen]
        self._values = [kept for kept in self._values if kept[0] <= images_seen]
        self._lines = [line for line in self._lines if json.loads(line)["images_seen"] <= images_seen]

    def add_training(self, *, loss: float, lr: float, grad_norm: float, step: int, **figures: float) -> None:
        """The mean loss since the last call, with what belongs to it."""
        now, (images, then) = time.monotonic(), self._last
        self._last = (self.images_seen, now)
        rate = (self.images_seen - images) / max(now - then, 1e-9)
        self._seconds.append(self.recipe.global_batch / rate if rate else 0.0)
        if "cpu_cores" in figures:
            seconds, ranks = self._seconds[-1], int(os.environ.get("LOCAL_SIZE", "1"))
            self._cpu.append(seconds * figures["cpu_cores"])
            stolen = seconds * figures["stolen_cores"]
            self._own.append(subtract_stolen(seconds, stolen=stolen, work=self._cpu[-1], ranks=ranks))
        training_figures = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "images_per_second": rate, **figures}
        self._write("train", training_figures, step=step)
        self._row("train_loss", loss, self.images_seen - images)

    def add_validation(self, found: ValidationResult, *, profile: str) -> None:
        """EMA validation loss, mean and per level, with intervals; samples' losses are kept for paired differences."""
        self._add_held_out_pairs(found)
        name = f"val_loss/{found.protocol}"
        per_level = {f"{name}/t{level:.3f}": loss for level, loss in found.per_level.items()}
        figures, details = {name: found.mean, **per_level}, json.dumps({"weights": "ema", "profile": profile})
        for (metric, value), loss_B in zip(figures.items(), found.by_sample.values(), strict=True):
            self._row(
                metric, value, found.sample_count, protocol=found.protocol_hash, details=details,
                half=compute_half_interval(loss_B),
            )  # fmt: skip
        if self._talks:
            kept = tabulate_samples({key: loss_B.numpy() for key, loss_B in found.by_sample.items()})
            with self._lock:
                self._values.append((self.images_seen, found.protocol_hash, kept))
        self._write("val", {metric.removeprefix("val_"): value for metric, value in figures.items()})
        self._progress.fields["val"] = found.mean

    def _add_held_out_pairs(self, found: ValidationResult) -> None:
        """Rows named val_<objective>/..."""
        for name, value in found.held_out_figures.items():
            better = name in get_objective(self.recipe.objective).higher_is_better
            self._row(f"val_{name}", value, found.held_out_count, protocol=found.protocol_hash, higher_is_better=better)
        if found.held_out_figures:
            self._write("val", found.held_out_figures)

    def add_costs(self, **figures: float) -> None:
        """What the run has cost so far: rows named cost/..."""
        details = json.dumps({"ranks": self.group.world_size, "device": self.group.device.type})
        speed = {}
        if self._seconds:
            rate = self.recipe.global_batch / max(_median_after_warm_up(self._seconds), 1e-9)
            speed = {"images_per_second": rate, "step_seconds": _median_after_warm_up(self._own or self._seconds)}
        if self._cpu:
            speed["step_cpu_seconds"] = _median_after_warm_up(self._cpu)
        for name, value in {"seconds": self.seconds, **speed, **figures}.items():
            self._row(f"cost/{name}", value, self.images_seen, details=details)

    def flush(self) -> None:
        """Rows and lines go to disk; call when a checkpoint stands or the run ends."""
        if not self._talks:
            return
        with self._lock:
            rows, self._rows, lines, self._lines = self._rows, [], self._lines, []
            values, self._values = self._values, []
        try:
            for images, protocol, kept in values:  # before the rows: a row that stands can be paired
                keep_values(self._store.uri, protocol, self.recipe.hash, images, kept)
            values = []
            self._store.append(rows)
            rows = []
            self._keep("".join(lines))
            lines = []
        finally:  # what did not get through is written the next time
            with self._lock:
                self._rows, self._lines = rows + self._rows, lines + self._lines
                self._values = values + self._values
        if self._board is not None:
            self._board.flush(self.images_seen)
            if storage.is_remote(self.out):
                for path in self._events.iterdir():
                    storage.upload(path, storage.join(self.out, "logs", "tensorboard", path.name))

    def _keep(self, text: str) -> None:
        """Lines of the log: appended to a file; on S3, where nothing can be appended, an object of their own."""
        if not text:
            return
        if storage.is_remote(self.out):
            last = json.loads(text.splitlines()[-1])["images_seen"]
            storage.write_bytes(storage.join(self.out, "logs", f"train-{last:012d}.jsonl"), text.encode())
            return
        path = storage.local_path(self.out) / "logs" / "train.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """What led to a failure is kept too; a second failure while writing it must not hide the first."""
        self._progress.close()
        if self._trackers is not None:
            self._trackers.close()
        try:
            self.flush()
            if self._board is not None:
                self._board.close()
                if storage.is_remote(self.out):
                    shutil.rmtree(self._events, ignore_errors=True)
        except (UserError, OSError):
            if error is None:
                raise

    def _forget_after(self, images_seen: int) -> None:
        """Drop lines from after the checkpoint that the run continues from: they will be written again."""
        path = storage.local_path(self.out) / "logs" / "train.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["images_seen"] <= images_seen]
            storage.write_bytes(str(path), "".join(kept).encode())

    def _write(self, kind: str, figures: dict[str, float], **more: float) -> None:
        if not self._talks:
            return
        stamp = {"kind": kind, "images_seen": self.images_seen, "seconds": round(self.seconds, 3)}
        with self._lock:
            self._lines.append(json.dumps({**stamp, **more, **figures}) + "\n")
        if self._trackers is not None:
            self._trackers.log(kind, figures, self.images_seen)
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(f"{kind}/{name}", value, self.images_seen)

    def _row(
        self, metric: str, value: float, count: int, *, protocol: str = "", details: str = "",
        higher_is_better: bool = False, half: float | None = None,
    ) -> None:  # fmt: skip
        """`half` of the width of the value's interval, where it has one."""
        row = ResultRow(
            run=self.run, recipe_hash=self.recipe.hash, code_version=code_version(), images_seen=self.images_seen,
            metric=metric, value=value, sample_count=count,
            higher_is_better=higher_is_better or metric == "cost/images_per_second",
            protocol_hash=protocol, details=details,
            low=None if half is None else value - half, high=None if half is None else value + half,
        )  # fmt: skip
        with self._lock:
            self._rows.append(row)


def _median_after_warm_up(values: list[float]) -> float:
    """The median without the first stretch, which warms up; some others hold a validation or a save."""
    return statistics.median(values[1:] or values)

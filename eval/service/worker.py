"""The process that evaluates: judges stay loaded, checkpoints come in, reasons of the failed ones go out.

A process of its own, so that a crash or a shortage of memory there never takes the pages down. It works by itself or
hands the checkpoints to Ray workers, as `--workers` says.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

from eval.measure import Checkpoint
from eval.run import EvaluateTask, RunOptions
from eval.run import prepare as prepare_run
from infra import storage
from infra.errors import MissingError, UserError
from infra.log import get_logger
from infra.runner import run_units

log = get_logger("service")
NOT_IN_HASH = ("runs", "checkpoints", "workers", "gpus_per_worker", "data", "calibration")


@dataclass(frozen=True)
class EvaluationSettings:
    """What is done with every checkpoint. `hash` names it in the store: other settings are evaluated beside these."""

    options: RunOptions
    gallery: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        """A hash of all settings that change the scores. Places of runs, batch sizes and devices are not part of it."""
        settings = {name: value for name, value in asdict(self.options).items() if name not in NOT_IN_HASH}
        del settings["official"]["device"]
        settings["metrics"] = ",".join(self.options.metrics)
        settings |= {"sampling": self.options.sampling.describe(), "gallery": self.gallery}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


class WorkerDied(Exception):
    """The evaluating process ended in the middle of its work; the text says how.

    `stopped`: by a SIGTERM, as service managers and batch systems send it to a service and all that it started.
    """

    def __init__(self, message: str, *, stopped: bool = False) -> None:
        super().__init__(message)
        self.stopped = stopped


class JudgesNotReady(Exception):
    """Nothing can be evaluated (a judge's weights are not there); the text is the reason."""


class EvaluationWorker:
    """Starts the process when it is first needed, and anew after it died."""

    def __init__(self, settings: EvaluationSettings) -> None:
        self.settings = settings
        self._process: Any = None
        self._pipe: Connection | None = None

    def evaluate(
        self, checkpoints: Sequence[Checkpoint], alive: Callable[[], None], *, poll: float = 1.0
    ) -> dict[str, str]:
        """Reasons of those that failed, by name. `alive` is called about every `poll` seconds meanwhile."""
        pipe, process = self._ensure_started()
        try:
            pipe.send(list(checkpoints))
            while not pipe.poll(poll):
                alive()
                if not process.is_alive() and not pipe.poll(0):
                    raise EOFError
            reasons, not_ready = pipe.recv()
        except (EOFError, OSError) as error:
            process.join(5)
            code = process.exitcode
            self.stop()
            killed = " (killed: often a lack of memory)" if code in (-9, 137) else ""
            stopped = code in (-signal.SIGTERM, signal.SIGTERM)  # Ray's driver makes an exit of it
            raise WorkerDied(f"the evaluating process ended with code {code}{killed}", stopped=stopped) from error
        if not_ready:
            raise JudgesNotReady(not_ready)
        return reasons

    def stop(self) -> None:
        """End the process, whatever it does. The thread that waits for it sees its pipe end."""
        process, self._process = self._process, None
        if process is not None and process.is_alive():
            process.terminate()
            process.join(10)
        self._pipe = None

    def _ensure_started(self) -> tuple[Connection, Any]:
        if self._pipe is None or self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self.settings), name="beeline evaluation")
            self._process.daemon = True  # ends with the service
            self._process.start()
            theirs.close()
        return self._pipe, self._process


def name_checkpoint(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.run} step {checkpoint.step}"


def _serve(pipe: Connection, settings: EvaluationSettings) -> None:
    """The process: lists of checkpoints in, (reasons of the failed, why nothing works) out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the service, which then ends this process
    threading.Thread(target=_end_with_the_service, daemon=True).start()
    options, task, prepared = settings.options, EvaluateAndDraw(settings), False
    while True:
        try:
            checkpoints = pipe.recv()
        except EOFError:
            return
        try:
            if not prepared:
                prepare_judges(settings)
                prepared = True
            units = [{"id": name_checkpoint(c), "checkpoint": asdict(c)} for c in checkpoints]
            pipe.send((run_units(task, units, workers=options.workers, gpus=options.gpus_per_worker), ""))
        except UserError as error:
            pipe.send(({}, str(error)))
        except Exception as error:
            traceback.print_exc()
            pipe.send(({}, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"))


def _end_with_the_service() -> None:
    """A service that was killed ends nothing; the next one takes its claims at once and must not work beside us."""
    service = multiprocessing.parent_process()
    if service is not None:
        service.join()
        os._exit(1)


def prepare_judges(settings: EvaluationSettings) -> None:
    """What must hold before any checkpoint: all judges are there, and it is known what they give to truth and noise."""
    if settings.options.metrics:
        prepare_run(settings.options)


@dataclass(frozen=True)
class EvaluateAndDraw:
    """The task of one checkpoint, here or on a Ray worker: all rows that it lacks, and its gallery."""

    settings: EvaluationSettings

    def open(self) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        if self.settings not in _opened:  # judges stay loaded from one call to the next
            options = self.settings.options
            measure = EvaluateTask(options).open() if options.metrics else None
            _opened[self.settings] = functools.partial(_evaluate_and_draw, self.settings, measure)
        return _opened[self.settings]


_opened: dict[EvaluationSettings, Callable[[Mapping[str, Any]], dict[str, Any]]] = {}


def _evaluate_and_draw(
    settings: EvaluationSettings, measure: Callable[[Mapping[str, Any]], dict[str, Any]] | None, unit: Mapping[str, Any]
) -> dict[str, Any]:
    try:
        if measure is not None:
            measure(unit)
        _draw_missing_gallery(Checkpoint(**unit["checkpoint"]), settings)
    except MissingError as error:
        message = f"{error}: it was there when the evaluation began (removed meanwhile, or being replaced)"
        raise UserError(message) from error
    return {}


def _draw_missing_gallery(checkpoint: Checkpoint, settings: EvaluationSettings) -> None:
    """Draw the sheet, unless it is there with these prompts."""
    from eval.drawing.generate import Painter
    from eval.service.gallery import choose_world_prompts, draw_gallery, locate_sheet, read_sheet

    options = settings.options
    uri = locate_sheet(checkpoint.run_uri, checkpoint.step)
    prompts = list(settings.gallery) or (choose_world_prompts(8) if options.judges == "world" else [])
    if not prompts:
        return
    try:
        if storage.exists(uri) and [tile.prompt for tile in read_sheet(uri).tiles] == list(dict.fromkeys(prompts)):
            return
    except UserError:
        log.info("%s: drawn again, its description was not readable", uri)
    painter = Painter(checkpoint.weights, device=options.sampling.device)
    draw_gallery(checkpoint.run_uri, checkpoint.step, painter, prompts, options.sampling)

"""The process that evaluates: loads the judges once, takes one checkpoint after another, answers with a reason or none.

A process of its own, so that a crash or a shortage of memory there never takes the pages down.
"""

import hashlib
import json
import multiprocessing
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

from eval.run import Checkpoint, RunOptions, parse_metrics
from infra import storage
from infra.errors import MissingError, UserError
from infra.log import get_logger
from model.errors import ModelError

log = get_logger("service")


@dataclass(frozen=True)
class Settings:
    """What is done with every checkpoint. `hash` names it in the store: other settings are evaluated beside these."""

    options: RunOptions
    gallery: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        """Of everything that decides the numbers; not of where runs are, nor of batch sizes and devices."""
        options = asdict(self.options)
        told: dict[str, Any] = {
            name: options[name] for name in ("metrics", "prompts_per_task", "images_per_prompt", "captions", "judges")
        }
        told |= {"sampling": self.options.sampling.protocol(), "gallery": self.gallery, "official": options["official"]}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


class Failed(Exception):
    """The evaluation of a checkpoint did not end well; the text is the reason."""


class Worker:
    """Starts the process when it is first needed, and anew after it died."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._process: Any = None
        self._pipe: Connection | None = None

    def evaluate(self, checkpoint: Checkpoint, alive: Callable[[], None], *, poll: float = 1.0) -> None:
        """Returns when it is done; raises Failed. `alive` is called about every `poll` seconds meanwhile."""
        pipe, process = self._ready()
        try:
            pipe.send(checkpoint)
            while not pipe.poll(poll):
                alive()
                if not process.is_alive() and not pipe.poll(0):
                    raise EOFError
            reason = pipe.recv()
        except (EOFError, OSError) as error:
            process.join(5)
            code = process.exitcode
            self.stop()
            killed = " (killed: often a lack of memory)" if code in (-9, 137) else ""
            raise Failed(f"the evaluating process ended with code {code}{killed}") from error
        if reason:
            raise Failed(reason)

    def stop(self) -> None:
        """End the process, whatever it does. The thread that waits for it sees its pipe end."""
        process, self._process = self._process, None
        if process is not None and process.is_alive():
            process.terminate()
            process.join(10)
        self._pipe = None

    def _ready(self) -> tuple[Connection, Any]:
        if self._pipe is None or self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self.settings), name="beeline evaluation")
            self._process.daemon = True  # ends with the service
            self._process.start()
            theirs.close()
        return self._pipe, self._process


def _serve(pipe: Connection, settings: Settings) -> None:
    """The process: checkpoints in, "" or a reason out, until the pipe closes."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the service, which then ends this process
    while True:
        try:
            checkpoint = pipe.recv()
        except EOFError:
            return
        try:
            evaluate(checkpoint, settings)
            reason = ""
        except MissingError as error:
            reason = f"{error}: it was there when the evaluation began (removed meanwhile, or being replaced)"
        except (UserError, ModelError) as error:
            reason = str(error)
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        pipe.send(reason)


def evaluate(checkpoint: Checkpoint, settings: Settings) -> None:
    """All rows that this checkpoint lacks, and its gallery. What is there already is not made again."""
    from eval.generate import Painter
    from eval.run import evaluate as evaluate_checkpoint
    from eval.service.gallery import draw_gallery, read_sheet, sheet_uri, world_gallery

    options = settings.options
    if options.metrics != "none":
        judges, tasks = _plan(options)
        evaluate_checkpoint(checkpoint, judges, tasks, options, loss="val_loss" in parse_metrics(options.metrics))
    uri = sheet_uri(checkpoint.run_uri, checkpoint.step)
    prompts = list(settings.gallery) or (world_gallery(8) if options.judges == "world" else [])
    if prompts:
        try:
            if storage.exists(uri) and [tile.prompt for tile in read_sheet(uri).tiles] == list(dict.fromkeys(prompts)):
                return
        except UserError:
            log.info("%s: drawn again, its description was not readable", uri)
        painter = Painter(checkpoint.weights, device=options.sampling.device)
        draw_gallery(checkpoint.run_uri, checkpoint.step, painter, prompts, options.sampling)


_planned: dict[RunOptions, tuple[Any, list[Any]]] = {}


def _plan(options: RunOptions) -> tuple[Any, list[Any]]:
    """Judges and tasks, once per process; the judges' own calibration is measured then too."""
    from eval.calibrate import calibrate
    from eval.judges import build_judges
    from eval.run import plan

    if options not in _planned:
        judges = build_judges(options.judges, options.official)
        names = [name for name in parse_metrics(options.metrics) if name != "val_loss"]
        tasks = [plan(name, judges, options) for name in names]
        if options.calibration and judges.truth is not None:
            calibrate(storage.join(options.runs, "results"), judges, [(t.metric, t.prompts) for t in tasks])
        _planned[options] = (judges, tasks)
    return _planned[options]

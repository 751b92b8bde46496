"""Weights & Biases and MLflow, where a recipe names them; the x-axis is images. Nothing they do may end a training."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from infra import storage
from infra.errors import UserError
from infra.log import get_logger
from trainer.recipe import Logging, Recipe

log = get_logger("trackers")


class Tracker(Protocol):
    """Where figures go besides the run folder."""

    def log(self, figures: dict[str, float], images_seen: int) -> None: ...

    def close(self) -> None: ...


class Wandb:
    """`logging.wandb` names the project; a resumed run continues its own curves."""

    def __init__(self, recipe: Recipe, run: str, folder: str) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=recipe.logging.wandb, name=run, id=f"{run}-{recipe.hash}", resume="allow", config=recipe.to_json(),
            dir=folder,
        )  # fmt: skip
        self._run.define_metric("images_seen")
        self._run.define_metric("*", step_metric="images_seen")

    def log(self, figures: dict[str, float], images_seen: int) -> None:
        self._run.log({**figures, "images_seen": images_seen})

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """`logging.mlflow` is the tracking URI; the experiment is the recipe's name."""

    def __init__(self, recipe: Recipe, run: str, folder: str) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        mlflow.set_tracking_uri(recipe.logging.mlflow)
        mlflow.set_experiment(recipe.name)
        found = mlflow.search_runs(filter_string=f"tags.beeline_run = '{run}-{recipe.hash}'", output_format="list")
        if found:
            mlflow.start_run(run_id=found[0].info.run_id)
        else:
            mlflow.start_run(run_name=run, tags={"beeline_run": f"{run}-{recipe.hash}"})
            mlflow.log_params({"recipe": recipe.name, "recipe_hash": recipe.hash, "depth": recipe.model.depth})

    def log(self, figures: dict[str, float], images_seen: int) -> None:
        self._mlflow.log_metrics(figures, step=images_seen)

    def close(self) -> None:
        self._mlflow.end_run()


TRACKERS: dict[str, Callable[[Recipe, str, str], Tracker]] = {"wandb": Wandb, "mlflow": Mlflow}


def check_trackers(logging: Logging) -> None:
    """UserError for a tracker that the recipe asks for and that is not installed."""
    for name in TRACKERS:
        if getattr(logging, name) is not None and importlib.util.find_spec(name) is None:
            problem = f"the recipe asks for --logging.{name}, but {name} is not installed"
            raise UserError(f"{problem}: pip install {name}, or leave it out")


class Trackers:
    """All that the recipe names, on rank 0. One that fails is reported once and then dropped."""

    def __init__(self, recipe: Recipe, run: str, out: str) -> None:
        self._open: dict[str, Tracker] = {}
        folder = "." if storage.is_remote(out) else str(storage.local_path(out) / "logs")
        for name in TRACKERS:
            if getattr(recipe.logging, name) is not None:
                self._try(name, partial(self._start, name, recipe, run, folder))

    def log(self, kind: str, figures: dict[str, float], images_seen: int) -> None:
        named = {f"{kind}/{name}": value for name, value in figures.items()}
        for name, tracker in list(self._open.items()):
            self._try(name, partial(tracker.log, named, images_seen))

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.close)

    def _start(self, name: str, recipe: Recipe, run: str, folder: str) -> None:
        self._open[name] = TRACKERS[name](recipe, run, folder)

    def _try(self, name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # whatever a foreign client raises: curves are not worth a training
            self._open.pop(name, None)
            log.warning("%s: %s; the run goes on without it", name, " ".join(str(error).split())[:200])

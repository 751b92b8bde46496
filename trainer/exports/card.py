"""What weights say about themselves: the metadata in their file and the model card beside it."""

from typing import Any

from data_pipeline.formats.schema import DatasetInfo
from infra import storage
from infra.codec import to_json
from infra.results import ResultStore
from infra.version import code_version
from trainer.objective import asks_teacher, get_objective
from trainer.recipe import Recipe

Meta = dict[str, Any]


def describe_weights(recipe: Recipe, info: DatasetInfo, *, kind: str, images_seen: int, run: str) -> dict[str, Any]:
    """What a weights file says about itself: enough to sample from it and to trace it."""
    return {
        "kind": kind,
        "backbone": recipe.model.name,
        "config": recipe.model.to_json(),
        "formulation": recipe.formulation,
        "shift": recipe.shift,
        "text_spec": to_json(info.text_spec),
        "vae": to_json(info.vae),
        "resolution": info.resolution,
        "recipe": recipe.name,
        "recipe_hash": recipe.hash,
        "data_fingerprint": info.fingerprint,
        "images_seen": images_seen,
        "code_version": code_version(),
        "run": run,
        "ema_profile": recipe.ema.profiles[0] if kind == "ema" else None,
        **describe_student(recipe, info),
    }


def describe_student(recipe: Recipe, info: DatasetInfo) -> dict[str, Any]:
    """How a student is sampled: by Euler on the teacher's shifted times, on a grid of its own where it was distilled to
    some steps. A guidance that the teacher used is baked into what the student learnt, and would multiply with another
    one. Without dropped captions the student has not learnt what guidance leads away from: guidance 1 is baked in."""
    found = info.couplings
    if found is not None:
        made_of = {"round": found.round, "teacher": found.teacher, "couplings": info.fingerprint}
        guidance = found.guidance * found.baked_guidance  # one of the two is 1
    elif asks_teacher(recipe) and recipe.student.guidance is not None:
        made_of, guidance = {"teacher": recipe.init_weights}, recipe.student.guidance
    else:
        return {}
    return {
        "few_step": {
            "objective": recipe.objective,
            **made_of,
            "solver": "euler",
            "guidance": guidance,
            "guidance_kind": "kept" if guidance == 1.0 and recipe.data.encoder_dropout else "baked",
            **get_objective(recipe.objective).few_step(recipe),
        }
    }


def format_model_card(run: str, meta: Meta, *, file: str) -> str:
    """What the weights are, where they come from, what they reached."""
    facts = [f"- {key}: {value}" for key, value in meta.items() if key not in ("config", "text_spec", "vae")]
    config = ", ".join(f"{key} {value}" for key, value in meta["config"].items())
    head = ["---", "tags: [text-to-image, rectified-flow]", "---", f"# {meta['run']}: {file}", ""]
    return "\n".join([*head, *facts, f"- model: {config}", "", format_figures(run)])


def format_figures(run: str) -> str:
    """The last value of every figure in the run's results, as a table."""
    rows = {row.metric: row for row in ResultStore(storage.join(run, "results")).rows()}
    kept = [row for name, row in sorted(rows.items()) if not name.startswith("cost/bytes") and "/t" not in name]
    if not kept:
        return "No figures were written for this run yet.\n"
    lines = [f"| {r.metric} | {r.value:.6g} | {r.images_seen:,} | {r.sample_count:,} |" for r in kept]
    return "\n".join(["| figure | value | at images | samples |", "|---|---|---|---|", *lines]) + "\n"

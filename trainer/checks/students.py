"""Does a student fit its teacher? Couplings, the weights it starts from, and who may train on from a student."""

from collections.abc import Iterator, Mapping
from typing import Any

from data_pipeline.checkpoints import find_weights
from data_pipeline.formats.couplings import Couplings
from data_pipeline.loading.loader import Dataset
from infra.errors import UserError, UserErrors
from model.diffusion.few_step import FewStep
from model.diffusion.flow import get_formulation
from model.diffusion.paths import RectifiedFlow
from model.diffusion.validation import COUPLED
from model.encoders.text import TextSpec
from model.files.weights import read_meta
from trainer.objective import OBJECTIVES, asks_teacher, reads_couplings
from trainer.recipe import Recipe


def check_couplings(recipe: Recipe, dataset: Dataset, init_from: str | None) -> None:
    """Refuse data of another kind than the objective reads, and couplings of another teacher or shift."""
    found = dataset.info.couplings
    if recipe.objective not in OBJECTIVES:
        return
    if found is not None and dataset.datasets:
        raise UserError(f"{dataset.uri} holds couplings, which do not mix with other data: train on them alone")
    if not reads_couplings(recipe):
        if found is not None:
            asked = " with --student.guidance" if asks_teacher(recipe) else ""
            raise UserError(
                f"{dataset.uri} holds couplings, which objective {recipe.objective}{asked} does not train on: give "
                "--objective reflow, or the data that the teacher was trained on"
            )
        if asks_teacher(recipe) and (wrong := [*_compare_start(recipe, init_from), *_compare_text(dataset, init_from)]):
            raise UserErrors(wrong)
        if recipe.validation.protocol == COUPLED and recipe.validation.every is not None:
            raise UserError(f"--validation.protocol {COUPLED} needs couplings, which {dataset.uri} does not hold")
        return
    if found is None:
        raise UserError(
            f"{dataset.uri} holds no couplings, which objective {recipe.objective} trains on: make some with "
            "`python -m data_pipeline couple --teacher WEIGHTS --prompts URI --count N --out URI`"
        )
    wrong = [
        *_compare_shift(recipe, dataset.uri, found), *_compare_teacher(recipe, dataset.uri, found, init_from),
        *_compare_text(dataset, init_from),
    ]  # fmt: skip
    if wrong:
        raise UserErrors(wrong)


def _compare_shift(recipe: Recipe, uri: str, found: Couplings) -> list[str]:
    if found.shift == recipe.shift:
        return []
    return [
        f"{uri}: the teacher's times were shifted by {found.shift:g}, those of recipe {recipe.name} are by "
        f"{recipe.shift:g}: give --shift {found.shift:g}"
    ]


def _compare_text(dataset: Dataset, init_from: str | None) -> list[str]:
    """Are the weights that a student starts from made for the text that the data holds?"""
    if init_from is None:
        return []
    learnt, found = TextSpec.from_json(read_meta(find_weights(init_from))["text_spec"]), dataset.text_spec
    if found.reads_as(learnt):
        return []
    return [
        f"{init_from} was trained with text of layout {learnt.layout} from {_name_encoders(learnt)}; {dataset.uri} "
        f"holds layout {found.layout} from {_name_encoders(found)}: give weights and data of one text"
    ]


def _name_encoders(spec: TextSpec) -> str:
    return " and ".join(f"{encoder.seat} ({encoder.tokens} tokens)" for encoder in spec.encoders)


def _compare_start(recipe: Recipe, init_from: str | None) -> list[str]:
    """What is wrong with the weights that a student starts from."""
    if init_from is None:
        return [
            f"recipe {recipe.name}: objective {recipe.objective} starts from the teacher's weights: give --init-from "
            "WEIGHTS" + (", those that made the couplings" if reads_couplings(recipe) else "")
        ]
    meta = read_meta(find_weights(init_from))
    wrong = []
    started = get_formulation(str(meta.get("formulation", "rf")))
    if not (isinstance(started.path, RectifiedFlow) and started.target == "velocity"):
        wrong.append(
            f"{init_from} predicts {started.target} on the path of {started.name}; a student starts from weights that "
            "predict the velocity of a rectified flow: couplings of this teacher may teach another network that does"
        )
    return [*wrong, *_compare_asked(recipe, init_from, meta)] if asks_teacher(recipe) else wrong


def _compare_asked(recipe: Recipe, init_from: str, meta: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a teacher that is asked in training."""
    shift, student = float(meta.get("shift", 1.0)), FewStep.of(meta)
    if shift != recipe.shift:
        yield (
            f"{init_from} was trained with times shifted by {shift:g}, those of recipe {recipe.name} are by "
            f"{recipe.shift:g}: give --shift {shift:g}"
        )
    if student is not None and student.guidance_kind == "baked":
        yield (
            f"{init_from} cannot be guided any more, which its students would not say of themselves: make couplings of "
            "it, which do"
        )
    if student is not None and (student.average or student.steps) and not recipe.student.any_teacher:
        yield (
            f"{init_from} is a student of few steps (objective {student.objective}), whose velocity at a time is not "
            "that of its flow: ask its teacher, or give --student.any-teacher"
        )


def _compare_teacher(recipe: Recipe, uri: str, found: Couplings, init_from: str | None) -> list[str]:
    wrong = _compare_start(recipe, init_from)
    if init_from is None:
        return wrong
    meta = read_meta(find_weights(init_from))
    known = {recipe.init_weights, dict(meta.get("few_step") or {}).get("teacher")}
    if found.teacher not in known and not recipe.student.any_teacher:
        wrong.append(
            f"{uri} was made by the teacher {found.teacher[:12]}, --init-from {init_from} is another network: give the "
            "teacher's weights or those of its student, or --student.any-teacher"
        )
    return wrong


def check_start(recipe: Recipe, init_from: str | None) -> None:
    """Ordinary training from a student of few steps takes its few steps away again (as users of DMD2 found): refused
    unless it is asked for."""
    objective = OBJECTIVES.get(recipe.objective)
    if init_from is None or objective is None or objective.student or recipe.student.any_teacher:
        return
    few_step: dict[str, Any] = dict(read_meta(find_weights(init_from)).get("few_step") or {})
    if few_step:
        raise UserError(
            f"{init_from} is a student of few steps (objective {few_step.get('objective')}), which objective "
            f"{recipe.objective} would undo: start from its teacher, or give --student.any-teacher"
        )

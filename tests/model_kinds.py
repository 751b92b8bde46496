"""One formulation per path and prediction target, read off FORMULATIONS: the others differ in their density only."""

from __future__ import annotations

from model.diffusion.flow import FORMULATIONS, Formulation


def _kind(form: Formulation) -> tuple[type, str, str]:
    return type(form.path), getattr(form.path, "law", ""), form.target


KINDS = list({_kind(form): name for name, form in reversed(FORMULATIONS.items())}.values())[::-1]

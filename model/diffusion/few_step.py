"""How a student of few steps is sampled, as its weights say it (`few_step` in their metadata)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from infra.codec import from_json
from infra.errors import UserError


@dataclass(frozen=True)
class FewStep:
    """The part of `few_step` that decides how latents are drawn; the rest says where the student comes from."""

    objective: str
    guidance: float = 1.0
    guidance_kind: Literal["baked", "kept"] = "kept"
    steps: int | None = None
    """Steps of the grid that it was trained on; None: any number."""
    average: bool = False
    """It predicts average velocities between two times (MeanFlow)."""

    @staticmethod
    def of(meta: Mapping[str, Any]) -> FewStep | None:
        """From the metadata of weights; None for those that are no student."""
        told = meta.get("few_step")
        return from_json(FewStep, told, where="few_step of the weights", extra="ignore") if told else None

    @property
    def step_counts(self) -> list[int]:
        """The numbers of steps whose times all lie on the student's grid; empty: any number."""
        return [n for n in range(1, (self.steps or 0) + 1) if self.steps is not None and self.steps % n == 0]

    def check(self, *, steps: int, guidance: float, solver: str) -> None:
        """UserError where a student of few steps is not to be sampled so."""
        if self.guidance_kind == "baked" and guidance != 1.0:
            raise UserError(
                f"this student has guidance {self.guidance:g} baked in, and guidance {guidance:g} would multiply with "
                "it: give --guidance 1"
            )
        if self.steps is not None and steps not in self.step_counts:
            allowed = ", ".join(map(str, self.step_counts))
            raise UserError(
                f"this student was trained on a grid of {self.steps} steps, and {steps} steps have times beside it: "
                f"give --steps {allowed.replace(', ', ' or ')}"
            )
        if (self.average or self.steps is not None) and solver != "euler":
            raise UserError(f"this student ({self.objective}) takes whole steps, not solver {solver}: give euler")

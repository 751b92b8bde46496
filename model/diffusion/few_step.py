"""How a student of few steps must be sampled: the key `few_step` in the metadata of its weights, and its checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from infra.codec import from_json
from infra.errors import UserError


@dataclass(frozen=True)
class FewStep:
    """The entries of `few_step` that decide how latents are drawn. Its other entries say how the student was made.

    `guidance`: the scale of the teacher's classifier-free guidance in what the student learnt from; 1: none.
    `guidance_kind`: "baked", the weights reproduce that guidance and are sampled with guidance 1; "kept", the teacher
    had no guidance and captions were dropped, so the student may be sampled with any.
    """

    objective: str
    guidance: float = 1.0
    guidance_kind: Literal["baked", "kept"] = "kept"
    steps: int | None = None
    """Steps of the grid that it was trained on; None: any number."""
    average: bool = False
    """It predicts average velocities between two times (MeanFlow)."""

    @staticmethod
    def of(meta: Mapping[str, Any]) -> FewStep | None:
        """Read from the metadata of a weights file; None where the weights are no student of few steps. UserError where
        an entry has a wrong type."""
        entries = meta.get("few_step")
        return from_json(FewStep, entries, where="few_step of the weights", extra="ignore") if entries else None

    @property
    def step_counts(self) -> list[int]:
        """The numbers of steps that may be taken, ascending; empty: any number.

        They are the divisors of `steps`: then each time of the coarser grid is also a time of the student's grid.
        """
        return [n for n in range(1, (self.steps or 0) + 1) if self.steps is not None and self.steps % n == 0]

    @property
    def default_steps(self) -> int | None:
        """Steps to take where nobody asks for a number: those of its grid, one with average velocities; None: as many
        as other models."""
        return self.steps or (1 if self.average else None)

    def check(self, *, steps: int, guidance: float, solver: str) -> None:
        """UserError for a guidance, a number of steps or a solver that this student was not trained for."""
        if self.guidance_kind == "baked" and guidance != 1.0:
            why = f"has guidance {self.guidance:g} baked in, and guidance {guidance:g} would multiply with it"
            untaught = "learnt with no captions dropped, so guidance has nothing to lead away from"
            raise UserError(f"this student {why if self.guidance != 1.0 else untaught}: give --guidance 1")
        if self.steps is not None and steps not in self.step_counts:
            allowed = ", ".join(map(str, self.step_counts))
            raise UserError(
                f"this student was trained on a grid of {self.steps} steps, and {steps} steps have times beside it: "
                f"give --steps {allowed.replace(', ', ' or ')}"
            )
        if (self.average or self.steps is not None) and solver != "euler":
            raise UserError(f"this student ({self.objective}) takes whole steps, not solver {solver}: give euler")

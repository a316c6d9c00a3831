"""The steps of a model: which norm preconditions which branch, found by a table and a trial run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ofa._lazy import on_first_use

if TYPE_CHECKING:
    from ofa.anatomy.steps import GRANULARITIES as GRANULARITIES
    from ofa.anatomy.steps import Anatomy as Anatomy
    from ofa.anatomy.steps import Branch as Branch
    from ofa.anatomy.steps import Norm as Norm
    from ofa.anatomy.steps import NormView as NormView
    from ofa.anatomy.steps import Step as Step
    from ofa.anatomy.steps import find as find
    from ofa.anatomy.steps import tuned_norms as tuned_norms
    from ofa.anatomy.steps import view_norm as view_norm

__all__, __getattr__, __dir__ = on_first_use(
    __name__,
    {"ofa.anatomy.steps": "Anatomy Branch GRANULARITIES Norm NormView Step find tuned_norms view_norm"},
)

"""Few-shot adaptation of language models by tuning only their norm scales (OFA, arXiv 2505.19107)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ofa.errors import InputError

__version__ = "0.1.0"

_LAZY = {
    "fused_regularizers": "ofa.regularizers",
    "tune_norms": "ofa.tuning",
    "restore_norms": "ofa.tuning",
    "save_adapter": "ofa.adapters",
    "load_adapter": "ofa.adapters",
    "merge": "ofa.adapters",
    "push_to_hub": "ofa.publishing",
    "adapt": "ofa.adaptation",
    "Adaptation": "ofa.adaptation",
    "evaluate": "ofa.evaluation",
    "probe": "ofa.probing",
    "Evaluation": "ofa.evaluation",
    "Scorer": "ofa.evaluation",
    "Task": "ofa.tasks",
    "TaskData": "ofa.tasks",
    "Example": "ofa.tasks",
    "FewShot": "ofa.tasks",
    "few_shot": "ofa.tasks",
    "class_balanced": "ofa.tasks",
    "load_task": "ofa.tasks",
    "load_model": "ofa.models",
}
"""Public name → module; loaded on first use, so that `import ofa` costs neither torch nor transformers."""

__all__ = ["InputError", *_LAZY]

if TYPE_CHECKING:
    from ofa.adaptation import Adaptation as Adaptation
    from ofa.adaptation import adapt as adapt
    from ofa.adapters import load_adapter as load_adapter
    from ofa.adapters import merge as merge
    from ofa.adapters import save_adapter as save_adapter
    from ofa.evaluation import Evaluation as Evaluation
    from ofa.evaluation import Scorer as Scorer
    from ofa.evaluation import evaluate as evaluate
    from ofa.models import load_model as load_model
    from ofa.probing import probe as probe
    from ofa.publishing import push_to_hub as push_to_hub
    from ofa.regularizers import fused_regularizers as fused_regularizers
    from ofa.tasks import Example as Example
    from ofa.tasks import FewShot as FewShot
    from ofa.tasks import Task as Task
    from ofa.tasks import TaskData as TaskData
    from ofa.tasks import class_balanced as class_balanced
    from ofa.tasks import few_shot as few_shot
    from ofa.tasks import load_task as load_task
    from ofa.tuning import restore_norms as restore_norms
    from ofa.tuning import tune_norms as tune_norms


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ofa' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

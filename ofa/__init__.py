"""Few-shot adaptation of language models by tuning only their norm scales (OFA, arXiv 2505.19107)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ofa._lazy import on_first_use
from ofa._version import __version__ as __version__
from ofa.errors import InputError

_LAZY = {
    "ofa.regularizers.attach": "fused_regularizers",
    "ofa.tuning.norms": "tune_norms restore_norms",
    "ofa.anatomy.fused_layers": "fuse_layers unfuse_layers",
    "ofa.tuning.relative_steps": "relative_steps",
    "ofa.training.graphed_step": "graphed_step",
    "ofa.adapters.save_and_load": "save_adapter load_adapter merge",
    "ofa.adapters.gguf_norms": "merge_gguf",
    "ofa.adapters.pool": "AdapterPool",
    "ofa.adaptation": "adapt Adaptation",
    "ofa.evaluation.scorer": "evaluate Evaluation Scorer",
    "ofa.probing.layerwise": "probe",
    "ofa.tasks": "Task TaskData Example FewShot few_shot class_balanced load_task",
    "ofa.models.load": "load_model",
}
"""The public names of every module; loaded on first use, so that `import ofa` costs neither torch nor transformers."""

_names, __getattr__, __dir__ = on_first_use(__name__, _LAZY)
__all__ = ["InputError", *_names]

if TYPE_CHECKING:
    from ofa.adaptation import Adaptation as Adaptation
    from ofa.adaptation import adapt as adapt
    from ofa.adapters.gguf_norms import merge_gguf as merge_gguf
    from ofa.adapters.pool import AdapterPool as AdapterPool
    from ofa.adapters.save_and_load import load_adapter as load_adapter
    from ofa.adapters.save_and_load import merge as merge
    from ofa.adapters.save_and_load import save_adapter as save_adapter
    from ofa.anatomy.fused_layers import fuse_layers as fuse_layers
    from ofa.anatomy.fused_layers import unfuse_layers as unfuse_layers
    from ofa.evaluation.scorer import Evaluation as Evaluation
    from ofa.evaluation.scorer import Scorer as Scorer
    from ofa.evaluation.scorer import evaluate as evaluate
    from ofa.models.load import load_model as load_model
    from ofa.probing.layerwise import probe as probe
    from ofa.regularizers.attach import fused_regularizers as fused_regularizers
    from ofa.tasks import Example as Example
    from ofa.tasks import FewShot as FewShot
    from ofa.tasks import Task as Task
    from ofa.tasks import TaskData as TaskData
    from ofa.tasks import class_balanced as class_balanced
    from ofa.tasks import few_shot as few_shot
    from ofa.tasks import load_task as load_task
    from ofa.training.graphed_step import graphed_step as graphed_step
    from ofa.tuning.norms import restore_norms as restore_norms
    from ofa.tuning.norms import tune_norms as tune_norms
    from ofa.tuning.relative_steps import relative_steps as relative_steps

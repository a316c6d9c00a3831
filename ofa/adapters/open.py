"""Open an adapter folder of any kind in a model, and restore the model afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from ofa.adapters.attach_peft import attach_adapter
from ofa.adapters.folder import NORMS
from ofa.adapters.peft_folder import check_tensors, fitting, put_norms, without_norms
from ofa.adapters.read import PREFIX, Adapter
from ofa.adapters.same_base import check_base
from ofa.adapters.save_and_load import load_adapter
from ofa.models.types import CausalLM
from ofa.tuning.heads import ReplacedHead
from ofa.tuning.norms import hold_norms, restore_norms


@contextmanager
def opened_adapter(model: nn.Module, adapter: Adapter) -> Iterator[CausalLM]:
    """Put an adapter that `ofa` made into its base model, and take it out again completely.

    Yields:
        The model to score with, which for a soft prompt is PEFT's wrapper.

    Raises:
        InputError: the adapter belongs to another base.
    """
    with ExitStack() as undo:
        yield put_adapter(model, adapter, undo)


def put_adapter(model: CausalLM, adapter: Adapter, undo: ExitStack) -> CausalLM:
    """As `opened_adapter`, until `undo` is closed, if ever."""
    if adapter.kind == NORMS:
        undo.callback(restore_norms, model)
        load_adapter(model, adapter)
        return model
    from peft import PeftConfig, set_peft_model_state_dict

    check_base(model, adapter)
    config = PeftConfig.from_pretrained(adapter.folder)
    norms = without_norms(config, model, adapter)
    if norms:
        undo.callback(restore_norms, model)
        hold_norms(model)
        put_norms(model, norms)
    if adapter.labels:
        head = ReplacedHead(model, adapter.labels)
        undo.callback(head.remove)
    # Without PEFT's wrapper the keys lack the path of the model in it.
    own = {key.removeprefix(PREFIX): value for key, value in adapter.parameters.items()}
    with fitting(adapter):
        attached = attach_adapter(model, config, 0, undo)
        set_peft_model_state_dict(attached, {key: value for key, value in own.items() if key not in norms})
    check_tensors(attached, adapter, norms)
    return attached

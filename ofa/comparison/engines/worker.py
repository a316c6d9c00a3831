"""Set up a worker of any engine. Heavy imports wait until GPU and threads are set."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ofa.comparison.engines import Placement, Source
from ofa.errors import InputError, in_words

if TYPE_CHECKING:
    from ofa.comparison.cell import CellRunner


class Refused(InputError):
    """The model cannot be loaded, and retrying would not help."""


def place(placement: Placement) -> None:
    """Set this process's GPUs and threads, which must happen before importing torch."""
    if placement.visible_gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = placement.visible_gpus
    os.environ["OMP_NUM_THREADS"] = str(placement.threads)


def load(source: Source, placement: Placement) -> CellRunner:
    """Load the model, once for all cells of this process.

    Raises:
        Refused: it cannot be loaded.
    """
    import torch

    from ofa.comparison.cell import CellRunner
    from ofa.models.load import load_model

    torch.set_num_threads(placement.threads)
    try:
        loaded = load_model(
            source.model,
            dtype=source.dtype,
            device=placement.device,
            device_map=source.device_map,
            trust_remote_code=source.trust_remote_code,
            offline=source.offline,
        )
        return CellRunner(loaded, source.batch_size, placement.sharing)
    except Exception as error:
        words = in_words(error)
        if not isinstance(error, InputError):
            words = f"the model cannot be loaded ({words})"
        raise Refused(words) from error

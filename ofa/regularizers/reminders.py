"""Warns once about lines that a training loop with regularizers lacks: `tune_norms`, or adding the penalty."""

from __future__ import annotations

import logging

from torch import nn

_PASSES = 4
"""Measured passes without use of the penalty before the warning."""

logger = logging.getLogger(__name__)


class Reminders:
    """The warnings of one attachment: all weights train, or the penalty is not used."""

    def __init__(self) -> None:
        self.used = False
        """Whether the penalty or the measurements were asked for."""
        self._passes = 0
        self._told = False

    def before_pass(self, model: nn.Module) -> None:
        """Called at every measured pass with gradients."""
        self._passes += 1
        if self._passes == 1 and all(parameter.requires_grad for parameter in model.parameters()):
            logger.warning(
                "all weights of the model train, while OFA tunes only its norm scales; to freeze the rest, call this "
                "before making the optimizer: params = ofa.tune_norms(model)"
            )
        if self._passes == _PASSES:
            self.at_end()

    def at_end(self) -> None:
        """Called when the regularizers are closed."""
        if self._passes and not self.used and not self._told:
            self._told = True
            logger.warning(
                "the regularizers are measured and never used, so training ignores them; add them where the loss is "
                "computed: loss = model(**batch).loss + reg.penalty()"
            )

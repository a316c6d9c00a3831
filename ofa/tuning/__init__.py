"""Makes the norm scales trainable and freezes the rest; undoes both."""

from ofa.tuning.norms import base_parameters, hold_norms, restore_norms, tune_norms

__all__ = ["base_parameters", "hold_norms", "restore_norms", "tune_norms"]

"""Analyze a model layer by layer: label accuracy and loss, step ratio, sharpness."""

from ofa.probing.layerwise import probe

__all__ = ["probe"]

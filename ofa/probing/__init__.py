"""Analyze a model layer by layer: label accuracy and loss, step ratio, sharpness."""

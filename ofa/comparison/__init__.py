"""Comparing methods: a grid of cells, each run once, kept as one JSON line, and read back for tables and figures."""

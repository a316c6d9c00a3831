"""Compare methods: run each cell of a grid once, and store one JSON line per cell."""

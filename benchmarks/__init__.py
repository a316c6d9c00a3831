"""The cost of the regularizers, counted and timed, also against the paper's Algorithm 1."""

"""What the regularizers cost: counted and timed against the paper's Algorithm 1."""

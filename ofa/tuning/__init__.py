"""Makes the norm scales trainable and freezes the rest; undoes both."""

"""Operations for the CPU, worked through in blocks that stay in a processor's cache, with derivatives by hand."""

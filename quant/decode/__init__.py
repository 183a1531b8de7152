"""Codecs of weights that a release has quantized already: bytes in, plain rows or MLX's codes out.

Nearly every format says the same thing in another packing: a code picks a value from a table, a
zero point is taken off, a scale multiplies. ``block`` states that once, with its decoding and its
exact repacking for MLX; the other modules only unpack.
"""

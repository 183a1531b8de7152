"""What calibration holds in memory at most, whatever the release."""

from typing import Final

SPILL_BYTES: Final = 1 << 30
"""Hidden states of a pass beyond this many bytes are kept in a file."""
HESSIAN_BYTES: Final = 1 << 30
"""Whole moment matrices are collected in batches of this size, with a pass for each."""
GRADIENT_BYTES: Final = 2 << 30
"""Gradients of more bytes are not held at once: they are found part by part, at the same point."""
TABLE_BYTES: Final = 64 << 20
"""Tables inside blocks, and those of a streamed proof, of more float32 bytes are never whole."""

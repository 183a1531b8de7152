"""What both sides of a streamed proof may hold of a vocabulary table at once."""

from typing import Final

SLICE_BYTES: Final = 128 << 20
"""Float32 bytes of an output projection that are multiplied by at once."""

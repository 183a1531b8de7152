"""What both sides of a streamed proof may hold of a vocabulary table at once."""

from typing import Final

TABLE_BYTES: Final = 64 << 20
"""Tables and output projections of more float32 bytes than this are never whole in float32."""
SLICE_BYTES: Final = 128 << 20
"""Float32 bytes of an output projection that are multiplied by at once."""

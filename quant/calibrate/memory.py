"""Memory that nothing holds any more, handed back to the system."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Let the C library hand free memory back, which it else keeps for allocations to come.

    glibc gives up to 32 MiB from arenas, of which each thread may have its own. What was computed
    there stays resident when it is free, while the next phase takes its memory from elsewhere.
    Does nothing where the library has no such call.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc
        library.malloc_trim(ctypes.c_size_t(0))
    elif hasattr(library, "malloc_zone_pressure_relief"):  # macOS: all zones
        library.malloc_zone_pressure_relief(None, ctypes.c_size_t(0))

"""What a worker has that a stage may need, as tags: its system, and Metal."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence

from converter.batch.watchlist import TAG
from converter.errors import UsageError

METAL = "metal"


def measured() -> frozenset[str]:
    """This machine's tags: ``linux`` or ``darwin``, its processor, and ``metal`` where it is."""
    found = {sys.platform, platform.machine().lower().replace("_", "-")}
    if sys.platform == "darwin":  # nowhere else, so that a server that forks never loads MLX
        import mlx.core as mx

        found |= {METAL} if mx.metal.is_available() else set()
    return frozenset(found)


def with_own(tags: Sequence[str]) -> frozenset[str]:
    """The measured tags and those of the command line; UsageError for what is no tag."""
    wrong = [tag for tag in tags if not TAG.fullmatch(tag)]
    if wrong:
        raise UsageError(
            f"--tag {wrong[0]}: a tag is made of lower-case letters, digits, . and -, at most 40"
        )
    return measured() | frozenset(tags)

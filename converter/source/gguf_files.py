"""Which GGUF files of a release are read: one model, in one file or in numbered parts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from converter.errors import PlanError
from converter.source.header import quote

SUFFIX: Final = ".gguf"
FLAG: Final = "--gguf-file"
_PART: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_BESIDE: Final = re.compile(r"(mmproj|imatrix)[-_.].*|.*[-_.](mmproj|imatrix)[-_.].*")
"""Files that hold no language model: a picture tower, statistics of activations."""
_SHOWN: Final = 12


def choose_gguf(names: Iterable[str], wanted: str | None, where: str) -> tuple[str, ...]:
    """The file ``wanted``, or the only model among the ``names`` of ``where``, with all its parts.

    Empty where there is none and none is wanted. Raises PlanError where the choice would be a
    guess, and where a part is missing.
    """
    present = sorted(name for name in names if name.endswith(SUFFIX))
    models: dict[str, list[str]] = {}
    for name in present:
        match = _PART.fullmatch(name)
        stem = f"{match[1]} of {match[3]}" if match else name
        if wanted is not None or not _BESIDE.fullmatch(name.rpartition("/")[2].lower()):
            models.setdefault(stem, []).append(name)
    shown = ", ".join(quote(names[0]) for names in list(models.values())[:_SHOWN])
    shown += f" and {len(models) - _SHOWN} more" if len(models) > _SHOWN else ""
    if wanted is not None:
        found = next((parts for parts in models.values() if wanted in parts), None)
        if found is None:
            here = f"; it has {shown}" if shown else " and no other GGUF file"
            raise PlanError([f"{FLAG} {quote(wanted)}: {where} has no such file{here}"])
    elif not models:
        return ()
    elif len(models) > 1:
        raise PlanError(
            [f"{where}: {len(models)} GGUF models; name the one to convert with {FLAG}: {shown}"]
        )
    else:
        [found] = models.values()
    match = _PART.fullmatch(found[0])
    if match is not None:
        parts = [f"{match[1]}-{i:05d}-of-{match[3]}.gguf" for i in range(1, int(match[3]) + 1)]
        if missing := [part for part in parts if part not in found]:
            raise PlanError([f"{where}: {quote(missing[0])} is missing, a part of {found[0]}"])
    return tuple(found)

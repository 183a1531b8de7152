"""Folders for what a pass puts aside: gone with it, or with the next where it was killed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal, get_args

from quant.calibrate.store import cache_folder
from quant.locks import lock

Kind = Literal["fisher", "hidden"]
_SUFFIX: Final = ".scratch"


@contextmanager
def temporary(kind: Kind) -> Iterator[Path]:
    """An empty folder beside the statistics, as /tmp is often memory itself.

    What killed processes left there goes first. Whoever lives holds a lock, which dies with its
    process; where nothing can be locked, nobody finds out who is dead, and all of it stays.
    """
    parent = cache_folder()
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(parent)
    while True:
        place = parent / f".{kind}-{secrets.token_hex(4)}{_SUFFIX}"
        descriptor = _hold(place)
        if descriptor is not None:
            break  # else another took its lock, not yet held, for a dead one's
    try:
        place.mkdir(exist_ok=True)
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        _let_go(place, descriptor)


def _hold(place: Path) -> int | None:
    """A descriptor that holds a folder's lock, None while another has it; -1 where none can be."""
    try:
        return lock(place.with_suffix(".lock"))
    except OSError:
        return -1


def _let_go(place: Path, descriptor: int) -> None:
    place.with_suffix(".lock").unlink(missing_ok=True)
    if descriptor >= 0:
        os.close(descriptor)


def _remove_abandoned(parent: Path) -> None:
    for kind in get_args(Kind):
        names = parent.glob(f".{kind}-{'[0-9a-f]' * 8}.*")
        for place in {name.with_suffix(_SUFFIX) for name in names}:
            descriptor = _hold(place)
            if descriptor is None:
                continue  # its maker is at work
            if descriptor >= 0:
                shutil.rmtree(place, ignore_errors=True)
            _let_go(place, descriptor)

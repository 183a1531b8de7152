"""Several files of a finished output replaced together, so that a kill leaves all or none."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from converter.atomic import write_atomic

_DRAFT: Final = ".renewal.partial"
_READY: Final = ".renewal"
_ORDER: Final = "order.json"


def renew(out: Path, files: Mapping[str, bytes | None]) -> None:
    """Replace ``files`` of ``out`` by name, in this order; what is None goes.

    All are written beside it first. From when that is done on, :func:`complete` does what is left.
    """
    draft = out / _DRAFT
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    for number, content in enumerate(files.values()):
        if content is not None:
            write_atomic(draft / str(number), content)
    write_atomic(draft / _ORDER, json.dumps([[n, c is None] for n, c in files.items()]))
    draft.rename(out / _READY)
    complete(out)


def complete(out: Path) -> None:
    """Go on with what a kill has interrupted after :func:`renew` had everything written."""
    ready = out / _READY
    shutil.rmtree(out / _DRAFT, ignore_errors=True)
    if not ready.is_dir():
        return
    order = ready / _ORDER
    steps = json.loads(order.read_text(encoding="utf-8")) if order.is_file() else []
    for number, (name, gone) in enumerate(steps):
        place, content = out / name, ready / str(number)
        if gone:
            place.unlink(missing_ok=True)
            if place.parent != out and place.parent.is_dir() and not any(place.parent.iterdir()):
                place.parent.rmdir()
        elif content.is_file():  # else it is in its place already
            place.parent.mkdir(exist_ok=True)
            os.replace(content, place)
    order.unlink(missing_ok=True)  # as the last file: without it there is nothing left to do
    ready.rmdir()

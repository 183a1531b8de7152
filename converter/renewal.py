"""Several files of a finished output replaced together, so that a kill leaves all or none."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from converter.atomic import write_atomic
from converter.errors import ConvertError
from converter.execute.folder import MANIFEST
from converter.scratch import held

_DRAFT: Final = ".renewal.partial"
_READY: Final = ".renewal"
_ORDER: Final = "order.json"
_REMOVE: Final = f"remove the folder {_READY} of this output, or fetch the output again"


def renew(out: Path, files: Mapping[str, bytes | None]) -> None:
    """Replace ``files`` of ``out`` by name, in this order; what is None goes.

    All are written beside it first. From when that is done on, :func:`complete` does what is left.
    BusyError while another process is at it.
    """
    draft = out / _DRAFT
    with held(draft):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        for number, content in enumerate(files.values()):
            if content is not None:
                write_atomic(draft / str(number), content)
        write_atomic(draft / _ORDER, json.dumps([[n, c is None] for n, c in files.items()]))
        draft.rename(out / _READY)
        _complete(out)


def complete(out: Path) -> None:
    """Go on with what a kill has interrupted after :func:`renew` had everything written.

    BusyError while another process is at it; ConvertError, and nothing is done, where what is there
    is not as ``renew`` leaves it: an output may come from anybody.
    """
    if os.path.lexists(out / _DRAFT) or os.path.lexists(out / _READY):
        with held(out / _DRAFT):
            _complete(out)


def make_ready(out: Path) -> None:
    """:func:`complete`, and refuse before long work what :func:`renew` would refuse after it."""
    with held(out / _DRAFT):
        _complete(out)


def is_unfinished(out: Path) -> bool:
    """Whether there is something that :func:`complete` has to do."""
    return (out / _READY / _ORDER).is_file()


def _complete(out: Path) -> None:
    ready = out / _READY
    shutil.rmtree(out / _DRAFT, ignore_errors=True)
    steps = _steps(out)
    for number, (name, gone) in enumerate(steps):
        place, content = out / name, ready / str(number)
        if gone:
            place.unlink(missing_ok=True)
            if place.parent != out and place.parent.is_dir() and not any(place.parent.iterdir()):
                place.parent.rmdir()
        elif content.is_file():  # else it is in its place already
            place.parent.mkdir(exist_ok=True)
            os.replace(content, place)
    if ready.is_dir():
        (ready / _ORDER).unlink(missing_ok=True)  # the last file: nothing is left to do without it
        ready.rmdir()


def _steps(out: Path) -> list[tuple[str, bool]]:
    """Names to replace, and whether each goes; ConvertError unless all of it is a study's own."""
    from quant.kv.spec import BASES

    ready = out / _READY
    order = ready / _ORDER
    _refuse_links(ready, order)
    if not order.is_file():
        return []
    steps = _read(order)
    for number, (name, _) in enumerate(steps):
        if name not in ("kv_cache.json", BASES, "config.json", MANIFEST):
            raise ConvertError(f"{order}: names {name!r}, which no KV study writes; {_REMOVE}")
        _refuse_links(ready / str(number), *(out / parent for parent in Path(name).parents[:-1]))
    return steps


def _refuse_links(*paths: Path) -> None:
    for path in paths:
        if path.is_symlink():
            raise ConvertError(f"{path}: is a link, which no KV study leaves; {_REMOVE}")


def _read(order: Path) -> list[tuple[str, bool]]:
    try:
        steps = json.loads(order.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{order}: is damaged; {_REMOVE}") from error
    if not isinstance(steps, list) or not all(_is_step(step) for step in steps):
        raise ConvertError(f"{order}: is damaged; {_REMOVE}")
    return [(name, gone) for name, gone in steps]


def _is_step(step: object) -> bool:
    return isinstance(step, list) and [type(one) for one in step] == [str, bool]

"""Which optional library is missing on this machine, when something could not be imported."""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Final

_ASKED: Final = {
    ImportError: re.compile(r"requires the (\w+) library"),
    ValueError: re.compile(r"Missing optional dependencies: (\w+)"),
}
"""How transformers names a library: in a placeholder's error, and in its automatic classes."""


def missing_library(error: BaseException) -> str | None:
    """The absent library behind ``error`` or what led to it; None when that is not the reason."""
    for item in _chain(error):
        found = (text.search(str(item)) for kind, text in _ASKED.items() if isinstance(item, kind))
        asked = next(filter(None, found), None)
        named = getattr(item, "name", None) if isinstance(item, ImportError) else None
        name = asked[1].lower() if asked else (named or "").partition(".")[0]
        if name and find_spec(name) is None:
            return name
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

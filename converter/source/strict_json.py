"""JSON objects of a release, read strictly."""

import json
import re
from collections import Counter
from typing import Any, Final

from converter.errors import PlanError

MAX_JSON_BYTES: Final = 100_000_000
"""Of a whole file: ten times what the index of the largest release takes."""
MAX_DEPTH: Final = 64
# As repr() spells it: a backslash that is no escaped one, so that text about surrogates passes.
_SURROGATE: Final = re.compile(r"(?<!\\)(?:\\\\)*\\ud[89a-f][0-9a-f]{2}")


def parse_object(text: bytes, name: str) -> dict[str, Any]:
    """The JSON object in file ``name``; repeated keys and non-objects raise PlanError.

    NaN and Infinity are kept as floats, since published configs contain them. What is accepted can
    be copied, and written again as UTF-8.
    """
    repeated: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        unique = dict(items)
        if len(unique) < len(items):
            counts = Counter(key for key, _ in items)
            repeated.extend(key for key, count in counts.items() if count > 1)
        return unique

    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=pairs)
    except UnicodeDecodeError as error:
        raise PlanError([f"{name}: not UTF-8 at byte {error.start}"]) from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise PlanError([f"{name}: not JSON: {reason}"]) from error
    if not isinstance(document, dict):
        raise PlanError([f"{name}: not a JSON object"])
    if repeated:
        keys = ", ".join(ascii(key)[1:-1] for key in dict.fromkeys(repeated))
        raise PlanError([f"{name}: keys that appear more than once: {keys}"])
    if text.count(b"{") + text.count(b"[") > MAX_DEPTH and _depth(document) > MAX_DEPTH:
        raise PlanError([f"{name}: not JSON of a release: nested too deeply"])
    if b"\\u" in text and (found := _SURROGATE.search(repr(document))):
        raise PlanError([f"{name}: not JSON of a release: lone surrogate {found[0]}"])
    return document


def _depth(document: object) -> int:
    """How deep containers are nested, level by level rather than by recursion."""
    depth, level = 0, [document]
    while level:
        depth += 1
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
            elif isinstance(item, list):
                below += item
        level = [item for item in below if isinstance(item, dict | list)]
    return depth

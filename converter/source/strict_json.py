"""JSON objects of a release, read strictly."""

import json
from typing import Any, Final

from converter.errors import PlanError

MAX_JSON_BYTES: Final = 1 << 30


def parse_object(text: bytes, name: str) -> dict[str, Any]:
    """The JSON object in file ``name``; repeated keys and non-objects raise PlanError.

    NaN and Infinity are kept as floats, since published configs contain them.
    """
    repeated: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        unique: dict[str, Any] = {}
        for key, value in items:
            if key in unique:
                repeated.append(key)
            unique[key] = value
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
    return document

"""What is wrong with a watch list, in words: a line for each problem, with its file and key."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

_WORDS: Final = {
    "tuple_type": "must be a list, in square brackets",
    "too_short": "must not be empty",
    "dict_type": "must be a table of keys",
    "model_type": "must be a table of keys",
    "string_type": "must be text, in quotes",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "missing": "is missing",
}
"""By pydantic's name of a problem, which speaks of the program's types otherwise."""


def told(
    path: Path,
    errors: Sequence[Any],
    *,
    top: type[BaseModel],
    tables: Mapping[str, type[BaseModel]],
) -> Iterator[str]:
    """The lines for pydantic's ``errors``; ``tables`` are the models below ``top``, by key."""
    places = [item["loc"] for item in errors]
    for item in errors:
        place = item["loc"]
        inside = any(other[: len(place)] == place and other != place for other in places)
        if not (item["type"] == "too_short" and inside):  # its items are there, and wrong
            said = _unknown(place, top, tables) if item["type"] == "extra_forbidden" else None
            yield from located(path, place, said or _said(item))


def located(path: Path, place: Sequence[str | int], said: str) -> list[str]:
    """Lines about one key, each with file and key."""
    key = ""
    for part in place:
        key += f"[{part}]" if isinstance(part, int) else f"{'.' if key else ''}{part}"
    where = f"{path}: {key}: " if key else f"{path}: "
    return [f"{where}{line}" for line in said.splitlines()]


def near(name: str, known: Collection[str]) -> str:
    """A hint at the known name that was meant, if one is near."""
    found = get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _said(item: Any) -> str:
    if item["type"] in _WORDS:
        return _WORDS[item["type"]]
    return str(item["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")


def _unknown(
    place: Sequence[str | int], top: type[BaseModel], tables: Mapping[str, type[BaseModel]]
) -> str:
    """What is said of a key that there is not, with the one that is meant or the table it is of."""
    *above, name = map(str, place)
    model = top
    for part in above:
        model = tables.get(part, model)
    hint = near(name, model.model_fields)
    homes = [key for key, one in tables.items() if name in one.model_fields and one is not model]
    if not hint and above and name in top.model_fields:
        hint = "; it belongs at the top of the file, before the first table"
    elif not hint and homes:
        hint = f"; it belongs into {' or '.join(homes)}"
    return f"unknown key{hint}"

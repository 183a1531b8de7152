"""The shipped example configs: one full-size ``config.json`` per model type, as released.

Beside it lie the variants of the type, ``<variant>.json``: other releases of the same code that
take other branches of it. An example is named ``type`` or ``type:variant``.
"""

import json
from difflib import get_close_matches
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Final

from validate.twin.errors import TwinError
from validate.twin.family import Json

_MAIN: Final = "config"


def list_examples() -> tuple[str, ...]:
    """Model types with a shipped example config, sorted."""
    return tuple(sorted(entry.name for entry in _root().iterdir() if entry.is_dir()))


def list_variants(model_type: str | None = None) -> tuple[str, ...]:
    """The variants of ``model_type``, or of all types, as ``type:variant``, sorted."""
    found = []
    for name in list_examples() if model_type is None else (model_type,):
        stems = (entry.name.removesuffix(".json") for entry in (_root() / name).iterdir())
        found += [f"{name}:{stem}" for stem in stems if stem != _MAIN]
    return tuple(sorted(found))


def load_example(name: str) -> Json:
    """The full-size config of a real release, by ``type`` or ``type:variant``.

    TwinError when none of that name is shipped.
    """
    known = (*list_examples(), *list_variants())
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise TwinError(
            f"no example config for model type {name!r}{hint} Shipped: {', '.join(known)}. "
            "Or pass a folder that has a config.json."
        )
    model_type, _, variant = name.partition(":")
    path = _root() / model_type / f"{variant or _MAIN}.json"
    config: Json = json.loads(path.read_text(encoding="utf-8"))
    return config


def _root() -> Traversable:
    return files("arch_maps") / "examples"

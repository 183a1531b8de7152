"""The shipped example configs: one full-size ``config.json`` per model type, as released."""

import json
from difflib import get_close_matches
from importlib.resources import files
from importlib.resources.abc import Traversable

from validate.twin.errors import TwinError
from validate.twin.family import Json


def list_examples() -> tuple[str, ...]:
    """Model types with a shipped example config, sorted."""
    return tuple(sorted(entry.name for entry in _root().iterdir() if entry.is_dir()))


def load_example(model_type: str) -> Json:
    """The full-size config of a real release of ``model_type``; TwinError when none is shipped."""
    names = list_examples()
    if model_type not in names:
        near = get_close_matches(model_type, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise TwinError(
            f"no example config for model type {model_type!r}{hint} Shipped: {', '.join(names)}. "
            "Or pass a folder that has a config.json."
        )
    text = (_root() / model_type / "config.json").read_text(encoding="utf-8")
    config: Json = json.loads(text)
    return config


def _root() -> Traversable:
    return files("arch_maps") / "examples"

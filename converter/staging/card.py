"""Reading a model card's front matter, which anybody may have written, without trusting it."""

import math
import re
from datetime import date
from typing import Any

import yaml

MAX_CARD_BYTES = 256 * 1024
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


class CardError(ValueError):
    """The front matter is not a YAML mapping of plain values."""


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML without aliases, whose expansion can be exponential."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            raise CardError("YAML aliases are not accepted in a model card")
        return super().compose_node(parent, index)


def split_front_matter(text: str) -> tuple[str | None, str]:
    """(YAML between the leading `---` lines or None, the text after them)."""
    found = _FRONT_MATTER.match(text)
    return (found.group(1), text[found.end() :]) if found else (None, text)


def parse_front_matter(text: str) -> dict[str, Any] | None:
    """The card's metadata as JSON-ready values, None without any; `CardError` if malformed."""
    yaml_text, _ = split_front_matter(text)
    if yaml_text is None or not yaml_text.strip():
        return None
    try:
        parsed = yaml.load(yaml_text, Loader=_PlainLoader)
        if parsed is None:
            return None
        if not isinstance(parsed, dict):
            raise CardError("The metadata must be a mapping of keys to values")
        return {str(key): _plain(value) for key, value in parsed.items()}
    except (yaml.YAMLError, RecursionError) as error:
        raise CardError(f"Invalid YAML: {str(error)[:500]}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, date):
        return value.isoformat()
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def card_tags(card: dict[str, Any] | None) -> list[str]:
    """The tags that the hub derives from a card's metadata, without repetitions."""
    card = card or {}

    def strings(key: str) -> list[str]:
        value = card.get(key)
        values = value if isinstance(value, list) else [value]
        return [item for item in values if isinstance(item, str) and item]

    relations = strings("base_model_relation")
    tags = [*strings("library_name"), *strings("tags"), *strings("pipeline_tag")]
    tags += strings("language")
    for base in strings("base_model"):
        tags += [f"base_model:{base}", *(f"base_model:{kind}:{base}" for kind in relations)]
    tags += [f"dataset:{name}" for name in strings("datasets")]
    tags += [f"license:{name}" for name in strings("license")]
    return list(dict.fromkeys(tags))

"""Special tokens of a twin: every token id in the config gets a token, and the token a new id."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from validate.twin.family import Family, Json

ID_SUFFIXES = ("_token_id", "_token_ids", "_token_index")


def is_token_field(name: str, value: Any) -> bool:
    """Whether a config field holds token ids: ``*_token_id`` with an int or a list of ints."""
    if not name.endswith(ID_SUFFIXES):
        return False
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(type(item) is int and item >= 0 for item in values)


@dataclass(frozen=True)
class TokenPlan:
    """``specials`` in id order starting at ``first_id``, and the token of each source id."""

    specials: tuple[str, ...]
    first_id: int
    by_source_id: Mapping[int, str]

    def id_of(self, token: str) -> int:
        """The twin's id of a special token."""
        return self.first_id + self.specials.index(token)

    def renumber(self, value: Any) -> Any:
        """The twin's id, or list of ids, for a source id or list of them."""
        if isinstance(value, list):
            return [self.id_of(self.by_source_id[item]) for item in value]
        return self.id_of(self.by_source_id[value])


def plan_tokens(config: Json, family: Family, *, vocab_size: int) -> TokenPlan:
    """Name every token id of ``config``; WordPiece puts special tokens first, BPE last."""
    by_source_id: dict[int, str] = {}
    for name, value in _token_fields(config):
        listed = value if isinstance(value, list) else [value]
        for position, source_id in enumerate(listed):
            stem = name.removesuffix("s").removesuffix("_token_id").removesuffix("_token_index")
            default = f"<|{stem}|>" if position == 0 else f"<|{stem}_{position}|>"
            token = family.tokens.get(name, default) if position == 0 else default
            by_source_id.setdefault(source_id, token)
    extra = [token for token in by_source_id.values() if token not in family.specials]
    specials = tuple(dict.fromkeys((*family.specials, *extra)))
    first_id = 0 if family.tokenizer == "wordpiece" else vocab_size - len(specials)
    return TokenPlan(specials, first_id, by_source_id)


def _token_fields(config: Json) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _token_fields(value)
        elif is_token_field(name, value):
            yield name, value

"""YAML without its silent choices: a key that is given twice is an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Takes mappings whose keys are all different."""

    def get_single_node(self) -> yaml.Node | None:
        """The document as it is written; ConstructorError, with line and column, for a key twice.

        Looked at before anything is made of it, since merge keys change the nodes as they go.
        """
        node: yaml.Node | None = super().get_single_node()
        left, known = [node], set()
        while left:
            one = left.pop()
            if id(one) in known or not isinstance(one, yaml.CollectionNode):
                continue
            known.add(id(one))  # which aliases come to again
            if isinstance(one, yaml.MappingNode):
                _require_different([key for key, _ in one.value])
                left += [part for pair in one.value for part in pair]
            else:
                left += one.value
        return node


def _require_different(keys: Sequence[yaml.Node]) -> None:
    seen = set()
    for key in keys:
        if not isinstance(key, yaml.ScalarNode):
            continue
        if key.value in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key.value!r} is given twice", key.start_mark
            )
        seen.add(key.value)


def load(text: str) -> Any:
    """What a YAML document says, as plain data; yaml.YAMLError."""
    return yaml.load(text, _Loader)

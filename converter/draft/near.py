"""The mapped types whose layers look most like those of a release."""

from __future__ import annotations

import re
from collections.abc import Iterable

from arch_maps.facts import Facts
from arch_maps.registry import find, model_types
from arch_maps.rules import Rule

_LAYER = re.compile(r"^.*?\.\d+\.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def nearest(rules: Iterable[Rule], *, count: int = 3) -> list[str]:
    """The most similar types with their parts and the share of layer tensors in common."""
    from validate.twin import list_examples, load_example
    from validate.twin.families import family_of
    from validate.twin.shrink import shrink_config

    mine = _shape(rules)
    scored = []
    for model_type in model_types():
        arch = find(model_type)
        if arch is None or model_type not in list_examples():
            continue
        small, _ = shrink_config(load_example(model_type), family_of(model_type))
        facts = Facts(small)
        theirs = _shape(arch.expand(facts, arch.layouts[0]).rules)
        share = len(mine & theirs) / max(1, len(mine | theirs))
        scored.append((share, f"{model_type} ({', '.join(arch.parts)}), {share:.0%} in common"))
    scored.sort(key=lambda item: (-item[0], item[1]))
    return [text for share, text in scored[:count] if share > 0.2]


def _shape(rules: Iterable[Rule]) -> set[tuple[str, str, int]]:
    """What the tensors of a layer are called, their kind and rank, layer numbers aside."""
    return {
        (_NUMBER.sub("N", _LAYER.sub("", rule.target)), str(rule.kind), len(rule.expr.shape))
        for rule in rules
    }

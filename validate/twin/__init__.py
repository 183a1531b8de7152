"""Twins: tiny checkpoints of a release's architecture, made from ``config.json`` alone."""

from validate.twin.build import TwinInfo, make_twin, twin_from
from validate.twin.errors import TwinError
from validate.twin.examples import list_examples, list_variants, load_example
from validate.twin.shrink import Sizes

__all__ = [
    "Sizes",
    "TwinError",
    "TwinInfo",
    "list_examples",
    "list_variants",
    "load_example",
    "make_twin",
    "twin_from",
]

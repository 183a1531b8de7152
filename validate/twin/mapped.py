"""Weights of a twin from the map itself, for releases whose model class transformers lacks.

The map's first layout says every name and shape that a release of these sizes has. What it cannot
say, the level around which norms and states lie, follows from each tensor's kind.
"""

from typing import TYPE_CHECKING, Final

from arch_maps.facts import Facts
from arch_maps.ops import Affine, Expr, sources
from arch_maps.registry import find, map_name
from arch_maps.rules import Kind, Tensors
from validate.twin.errors import TwinError
from validate.twin.family import Json
from validate.twin.randomise import drawn

if TYPE_CHECKING:
    import torch

SKIP_GAINS: Final = (".D", "_D")
"""Ends of the names of state-space skip connections, which multiply and so lie around one."""


def mapped_weights(config: Json, *, seed: int) -> dict[str, "torch.Tensor"]:
    """Every source tensor of the map for ``config``, float32, drawn by its name alone.

    TwinError when the type has no map or the map finds fault with ``config``.
    """
    arch = find(str(map_name(config)))
    if arch is None:
        raise TwinError(f"model_type {config['model_type']!r} has no map to make a twin from")
    facts = Facts(config)
    tensors = arch.expand(facts, arch.layouts[0])
    if facts.problems:
        raise TwinError(
            f"the map of {arch.model_type!r} cannot expand the shrunk config; its family must "
            f"adjust what is named here: {'; '.join(facts.problems)}"
        )
    return {
        name: drawn(name, shape, level=level, seed=seed)
        for name, (shape, level) in sorted(_levels(tensors).items())
    }


def _levels(tensors: Tensors) -> dict[str, tuple[tuple[int, ...], float]]:
    """Shape and middle value of each source tensor that a release must have."""
    found: dict[str, tuple[tuple[int, ...], float]] = {}
    for rule in tensors.rules:
        for leaf in sources(rule.expr):
            shape = tuple(int(size) for size in leaf.shape)
            found.setdefault(leaf.name, (shape, _level(leaf.name, rule.kind, rule.expr)))
    for drop in tensors.drops:
        if drop.required and drop.shape is not None:
            found.setdefault(drop.name, (tuple(int(size) for size in drop.shape), 0.0))
    return found


def _level(name: str, kind: Kind, expr: Expr) -> float:
    if kind is Kind.NORM:
        return 1.0 - (expr.offset if isinstance(expr, Affine) else 0.0)
    return 1.0 if kind is Kind.STATE and name.endswith(SKIP_GAINS) else 0.0

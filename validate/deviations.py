"""Faults of the stock runtimes that are known, understood and measured.

A checkpoint cannot mend its runtime. So that a runtime's fault neither hides a wrong weight nor
condemns right ones, a checkpoint whose outputs miss the gate is run once more with the documented
fault taken out in memory: that run must meet the gate, and what stock users get is stated beside
it, bounded by the effect the fault is known to have.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

Patch = tuple[Any, str, Any]
"""(module, attribute, what belongs there)"""


@dataclass(frozen=True)
class Deviation:
    """One documented fault: where it is, what it does, how large it may be, how to take it out."""

    name: str
    runtime: str
    model_types: tuple[str, ...]
    modality: str
    what: str
    bound: float
    """Largest relative logit error that this fault explains."""
    patches: Callable[[Any], Sequence[Patch]]


def deviations_for(runtime: str, *, model_type: str, modality: str) -> tuple[Deviation, ...]:
    """The documented faults of a runtime for one model and modality."""
    return tuple(
        item
        for item in DOCUMENTED
        if item.runtime == runtime and model_type in item.model_types and item.modality == modality
    )


@contextmanager
def without(deviations: Sequence[Deviation], model: Any) -> Iterator[None]:
    """Run a block with the faults taken out of a loaded MLX model."""
    undo: list[Patch] = []
    try:
        for item in deviations:
            for module, attribute, value in item.patches(model):
                undo.append((module, attribute, getattr(module, attribute)))
                setattr(module, attribute, value)
        yield
    finally:
        for module, attribute, value in reversed(undo):
            setattr(module, attribute, value)


def _exact_merger_gelu(model: Any) -> list[Patch]:
    nn: Any = import_module("mlx.nn")
    return [(block, "act", nn.GELU()) for block in model.merger.mlp]


DOCUMENTED: Final = (
    Deviation(
        name="merger activation",
        runtime="mlx_vlm",
        model_types=("minicpmv4_6",),
        modality="image",
        what="mlx-vlm 0.7.10 computes the merger's GELU by its tanh approximation "
        "(MLX's 'precise'), where the release uses the error function",
        bound=1e-2,
        patches=_exact_merger_gelu,
    ),
)

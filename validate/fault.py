"""What is said of a documented fault of a stock runtime, and how it is taken out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
    patches: Callable[..., Sequence[Patch]]
    """Of a loaded model, and where ``configured`` of the checkpoint's config.json."""
    configured: bool = False
    released: bool = False
    """Whether ``patches`` also takes the folder of the release, for weights the runtime discards.
    """
    prepares: bool = False
    """Whether the runtime's processor prepares something else than the release's, so that without
    the fault both models get what the reference's processor made."""
    foreign: bool = False
    """Whether what it prepares is of another kind, which the reference cannot read at all."""


def text_fault(
    name: str,
    *model_types: str,
    what: str,
    bound: float,
    patches: Callable[..., Sequence[Patch]],
    configured: bool = False,
    released: bool = False,
    runtimes: Sequence[str] = ("mlx_vlm", "mlx_lm"),
) -> tuple[Deviation, ...]:
    """A fault of a text stack, in each of ``runtimes``."""
    return tuple(
        Deviation(name, runtime, model_types, "text", what, bound, patches, configured, released)
        for runtime in runtimes
    )


def picture_fault(
    name: str, *model_types: str, what: str, bound: float, patches: Callable[..., Sequence[Patch]]
) -> Deviation:
    """A fault of mlx-vlm that only pictures show."""
    return Deviation(name, "mlx_vlm", model_types, "image", what, bound, patches, configured=True)

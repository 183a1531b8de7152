"""Give every parameter of a torch model values that no wrong map can hide behind."""

import hashlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

SPREAD: Final = 0.3
BOUND: Final = 1.6
ORDERING: Final = "token_ordering"
"""End of the names of tables that hold every token once."""
NO_GAINS: Final[Mapping[str, float]] = MappingProxyType({})
# Decays of a state-space layer: slow enough that the state of earlier tokens reaches later ones.
DECAY_RANGE: Final = (0.05, 1.5)


def randomise(
    model: "torch.nn.Module", *, seed: int, gains: Mapping[str, float] = NO_GAINS
) -> None:
    """Overwrite each float parameter and saved float buffer, in place, by its tensor name alone.

    Matrices and kernels: N(0, 1 / fan_in).  Vectors: their initial level plus U(-0.3, 0.3), so that
    norms around one, norms around zero and biases each stay plausible and none is constant.
    Bounds that start out infinite become finite, so that what they cut off shows.  ``gains``
    multiplies what is drawn for tensors by the ends of their names.
    """
    import torch

    seen: set[int] = set()
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
            if name.endswith(ORDERING):
                tensor.copy_(torch.randperm(len(tensor), generator=_generator(name, seed)))
            if not tensor.is_floating_point() or tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            values = _values(name, tensor.detach(), _generator(name, seed))
            gain = next((gains[end] for end in gains if name.endswith(end)), 1.0)
            tensor.copy_(values * gain)


def drawn(name: str, shape: tuple[int, ...], *, level: float, seed: int) -> "torch.Tensor":
    """The float32 values that the tensor ``name`` gets when it starts out as ``level``."""
    import torch

    return _values(name, torch.full(shape, level), _generator(name, seed))


def _generator(name: str, seed: int) -> "torch.Generator":
    import torch

    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _values(name: str, initial: "torch.Tensor", generator: "torch.Generator") -> "torch.Tensor":
    import torch

    shape = initial.shape
    if name.endswith("A_log"):
        low, high = DECAY_RANGE
        decay = low + (high - low) * torch.rand(shape, generator=generator)
        return decay.log()
    if initial.ndim >= 2:
        stacked = initial.ndim == 3 and "expert" in name
        fan_in = shape[-1] if stacked else shape[1:].numel()
        normal = torch.randn(shape, generator=generator)
        return normal.div(fan_in**0.5)
    offset = (2 * torch.rand(shape, generator=generator) - 1) * SPREAD
    if bool(initial.isinf().all()):
        return initial.sign() * (BOUND + offset)
    if bool((initial == initial.flatten()[0]).all()):
        return initial + offset
    # Drawn by the constructor from the global generator: keep the level, not the draw.
    return initial.mean().round() + offset

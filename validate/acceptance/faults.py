"""Faults of the pinned runtimes that no checkpoint can help, and what shows that they are theirs.

A row that meets one still fails: people meet it too. Its note then says whose fault it is.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A runtime's fault, where it shows, and how it was found to be the runtime's."""

    runtime: str
    rows: tuple[str, ...]
    model_types: tuple[str, ...]
    what: str


_MINICPM: Final = (
    "a fault of mlx-vlm 0.7.10: its minicpmv4_6 keeps token positions on the model instead of "
    "returning them with the embeddings as its qwen3_5 does, so in a batch of unequal prompts the "
    "shorter, padded ones get wrong positions, and prompts that join a running batch can end it "
    "with [broadcast_shapes]; neither happens once positions are handed over with each prompt"
)
_GEMMA4: Final = (
    "a fault of mlx-vlm 0.7.10: its gemma4 makes the relative position embedding of the audio part "
    "with __new__ and without Module.__init__, so that such a model cannot be frozen for training"
)
_ROTATING: Final = (
    "mlx-lm 0.32.2 cannot quantize the cache of a sliding window (RotatingKVCache.to_quantized "
    "raises NotImplementedError)"
)
_QWEN4_BATCH: Final = (
    "a fault of mlx-vlm 0.7.10: while a row of a batch has padding, its qwen4_exp decodes with "
    "attention to all tokens before, where the release attends to the chosen blocks; with the mask "
    "of its own indexer in that place rows agree with prompts alone to 6e-7"
)
_QWEN4_CACHE: Final = (
    "mlx-vlm 0.7.10 cannot quantize the cache of chosen blocks (QSAKVCache) in its server"
)
_QWEN4_TRAINING: Final = (
    "a fault of mlx-vlm 0.7.10: its qwen4_exp chooses blocks by argpartition without "
    "stop_gradient, so that nothing can be trained through it; with that, gradients are computed"
)
_GLM5_TRAINING: Final = (
    "a fault of mlx-vlm 0.7.10: the indexer of its glm5_next hands on the places of chosen tokens "
    "without stop_gradient, so that nothing can be trained through it; with that, gradients are "
    "computed"
)
FAULTS: Final = (
    Fault(
        runtime="mlx_lm",
        rows=("KV cache uniform 8",),
        model_types=("gemma4",),
        what=_ROTATING,
    ),
    Fault(
        runtime="mlx_vlm",
        rows=("LoRA fine-tuning", "adapter loading"),
        model_types=("gemma4",),
        what=_GEMMA4,
    ),
    Fault(
        runtime="mlx_vlm",
        rows=("server, two at once", "server, eight at once"),
        model_types=("minicpmv4_6",),
        what=_MINICPM,
    ),
    Fault(
        runtime="mlx_vlm",
        rows=("server, two at once", "server, eight at once"),
        model_types=("qwen4_exp",),
        what=_QWEN4_BATCH,
    ),
    Fault(
        runtime="mlx_vlm",
        rows=("KV cache uniform 8", "KV cache turboquant 3.5"),
        model_types=("qwen4_exp",),
        what=_QWEN4_CACHE,
    ),
    Fault(
        runtime="mlx_vlm",
        rows=("LoRA fine-tuning", "adapter loading"),
        model_types=("qwen4_exp",),
        what=_QWEN4_TRAINING,
    ),
    Fault(
        runtime="mlx_vlm",
        rows=("LoRA fine-tuning", "adapter loading"),
        model_types=("glm5_next",),
        what=_GLM5_TRAINING,
    ),
)


def known_fault(runtime: str, row: str, model_type: str) -> str | None:
    """The documented fault that explains a failed row; None where there is none."""
    for fault in FAULTS:
        if fault.runtime == runtime and row in fault.rows and model_type in fault.model_types:
            return fault.what
    return None

"""Faults of the stock runtimes that are known, understood and measured.

A checkpoint cannot mend its runtime. So that a runtime's fault neither hides a wrong weight nor
condemns right ones, a checkpoint whose outputs miss the gate is run once more with the documented
fault taken out in memory: that run must meet the gate, and what stock users get is stated beside
it, bounded by the effect the fault is known to have.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

from validate import image_faults, moe_faults, text_faults

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


def deviations_for(runtime: str, *, model_type: str, modality: str) -> tuple[Deviation, ...]:
    """The documented faults of a runtime for one model and modality."""
    return tuple(
        item
        for item in DOCUMENTED
        if item.runtime == runtime
        and model_type in item.model_types
        and item.modality == ("text" if modality in _WRITTEN else modality)
    )


@contextmanager
def without(
    deviations: Sequence[Deviation], model: Any, config: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Run a block with the faults taken out of a loaded MLX model."""
    undo: list[Patch] = []
    try:
        for item in deviations:
            facts = (config or {},) if item.configured else ()
            for module, attribute, value in item.patches(model, *facts):
                undo.append((module, attribute, getattr(module, attribute)))
                setattr(module, attribute, value)
        yield
    finally:
        for module, attribute, value in reversed(undo):
            setattr(module, attribute, value)


def _exact_merger_gelu(model: Any) -> list[Patch]:
    nn: Any = import_module("mlx.nn")
    return [(block, "act", nn.GELU()) for block in model.merger.mlp]


def _text(
    name: str,
    *model_types: str,
    what: str,
    bound: float,
    patches: Callable[..., Sequence[Patch]],
    configured: bool = False,
    runtimes: Sequence[str] = ("mlx_vlm", "mlx_lm"),
) -> tuple[Deviation, ...]:
    """A fault of a text stack, in each of ``runtimes``."""
    return tuple(
        Deviation(name, runtime, model_types, "text", what, bound, patches, configured)
        for runtime in runtimes
    )


_WRITTEN: Final = ("chat", "code", "unicode")
"""Kinds of prompts that are text like any other to a runtime."""


def _picture(
    name: str, *model_types: str, what: str, bound: float, patches: Callable[..., Sequence[Patch]]
) -> Deviation:
    """A fault of mlx-vlm that only pictures show."""
    return Deviation(name, "mlx_vlm", model_types, "image", what, bound, patches, configured=True)


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
    _picture(
        "pictures",
        "gemma3",
        what="mlx-vlm 0.7.10 lets the tokens of a picture attend backwards only, where the release "
        "lets them see the whole picture; rounds the scale of the embeddings to bfloat16; and "
        "has an epsilon of its own in the tower's last norm",
        bound=2.0,
        patches=image_faults.gemma3,
    ),
    _picture(
        "swapped activations",
        "qwen3_vl_moe",
        what="mlx-vlm 0.7.10 computes exact GELU in the tower's blocks, where the release means "
        "its tanh form, and the tanh form in the mergers, where it means exact GELU",
        bound=1.0,
        patches=image_faults.swapped_gelu,
    ),
    _picture(
        "activation",
        "internvl",
        what="mlx-vlm 0.7.10 computes the tanh form of GELU in the tower and the projector, where "
        "the release means exact GELU",
        bound=1e-1,
        patches=image_faults.internvl,
    ),
    _picture(
        "positions",
        "idefics3",
        "smolvlm",
        what="mlx-vlm 0.7.10 rounds the position of a patch within its picture otherwise than the "
        "release, so that some patches take a neighbour's position, and has an epsilon of its "
        "own in the tower's last norm",
        bound=1.0,
        patches=image_faults.idefics3,
    ),
    Deviation(
        name="activation",
        runtime="mlx_vlm",
        model_types=("modernbert",),
        modality="sentence",
        what="mlx-vlm computes the tanh form of GELU, where the release means the exact one",
        bound=1e-2,
        patches=text_faults.exact_modernbert,
    ),
    *_text(
        "embedding scale",
        "gemma3_text",
        "gemma3",
        what="the runtimes round the scale of the embeddings to bfloat16 in every precision",
        bound=1e-2,
        patches=text_faults.exact_scale,
    ),
    *_text(
        "activation",
        "gemma",
        what="the runtimes compute exact GELU, where the release means its tanh form",
        bound=1e-2,
        patches=text_faults.tanh_gated,
    ),
    *_text(
        "activation",
        "gpt_neox",
        what="the runtimes compute the tanh form of GELU, where the release means the exact one",
        bound=1e-2,
        patches=text_faults.exact_neox,
    ),
    *_text(
        "activation",
        "gpt_bigcode",
        what="the runtimes compute exact GELU, where the release means its tanh form",
        bound=1e-2,
        patches=text_faults.tanh_bigcode,
    ),
    *_text(
        "sliding window",
        "gemma2",
        what="the runtimes attend to all tokens in the layers that the release gives a window",
        bound=1.0,
        patches=text_faults.sliding_windows,
        configured=True,
    ),
    *_text(
        "partial rotation",
        "glm",
        what="the runtimes rotate whole heads, where the release rotates a part of each",
        bound=1.5,
        patches=text_faults.rotated_part,
        configured=True,
    ),
    *_text(
        "window and activation",
        "starcoder2",
        what="the runtimes attend to all tokens, where the release has a window, and compute "
        "exact GELU, where it means its tanh form",
        bound=1.0,
        patches=text_faults.starcoder2,
        configured=True,
    ),
    *_text(
        "window and long positions",
        "phi3",
        what="the runtimes attend to all tokens, where the early releases have a window, and "
        "mlx-lm applies LongRoPE's long factors at every length",
        bound=2.0,
        patches=text_faults.phi3,
        configured=True,
    ),
    *_text(
        "YaRN bounds",
        "gpt_oss",
        what="the runtimes round the bounds of YaRN's ramp to whole dimensions, where the release "
        "says truncate: false",
        bound=1.0,
        patches=moe_faults.untruncated_yarn,
    ),
    *_text(
        "latent norms",
        "glm4_moe_lite",
        what="the runtimes give the latent norms the layers' epsilon, where the release has 1e-6",
        bound=1.0,
        patches=moe_faults.latent_epsilon,
    ),
    *_text(
        "router",
        "lfm2_moe",
        what="mlx-vlm routes by a softmax and weighs experts with the bias added, where the "
        "release has a sigmoid whose bias only chooses",
        bound=1.5,
        patches=moe_faults.sigmoid_router,
        runtimes=("mlx_vlm",),
    ),
    *_text(
        "routing weights",
        "jamba",
        what="the runtimes take the softmax over the chosen experts, where the release takes it "
        "over all of them",
        bound=1.5,
        patches=moe_faults.softmax_of_all,
    ),
    *_text(
        "position scaling",
        "solar_open",
        "qwen3_moe",
        what="mlx-lm rotates by plain positions, where the release scales them (YaRN)",
        bound=1.5,
        patches=moe_faults.scaled_positions,
        runtimes=("mlx_lm",),
    ),
)

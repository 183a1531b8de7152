"""Faults of the stock runtimes that are known, understood and measured.

A checkpoint cannot mend its runtime. So that a runtime's fault neither hides a wrong weight nor
condemns right ones, a checkpoint whose outputs miss the gate is run once more with the documented
fault taken out in memory: that run must meet the gate, and what stock users get is stated beside
it, bounded by the effect the fault is known to have.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from validate import (
    audio_faults,
    compression_faults,
    gemma3n_faults,
    gemma_faults,
    llama4_faults,
    mllama_faults,
    moe_faults,
    norm_faults,
    phi4mm_faults,
    router_faults,
    text_faults,
)
from validate.fault import Deviation, Patch
from validate.fault import text_fault as _text
from validate.picture_deviations import PICTURES


def deviations_for(runtime: str, *, model_type: str, modality: str) -> tuple[Deviation, ...]:
    """The documented faults of a runtime for one model and modality."""
    return tuple(
        item
        for item in DOCUMENTED
        if item.runtime == runtime
        and model_type in item.model_types
        and item.modality in _SHOWN_BY.get(modality, (modality,))
    )


@contextmanager
def without(
    deviations: Sequence[Deviation],
    model: Any,
    config: Mapping[str, Any] | None = None,
    *,
    source: Path | None = None,
) -> Iterator[None]:
    """Run a block with the faults taken out of a loaded MLX model."""
    undo: list[Patch] = []
    try:
        for item in deviations:
            facts: tuple[Any, ...] = (config or {},) if item.configured else ()
            facts += (source,) if item.released else ()
            for module, attribute, value in item.patches(model, *facts):
                undo.append((module, attribute, getattr(module, attribute)))
                setattr(module, attribute, value)
        yield
    finally:
        for module, attribute, value in reversed(undo):
            setattr(module, attribute, value)


_SHOWN_BY: Final[Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys(("chat", "code", "unicode"), ("text",)),
    "video": ("image", "video"),
}
"""The faults that prompts of a kind show: of text like any other, of the tower of pictures."""


DOCUMENTED: Final = (
    *PICTURES,
    Deviation(
        name="pictures",
        runtime="mlx_vlm",
        model_types=("gemma4",),
        modality="image",
        what="mlx-vlm 0.7.10 lets the tokens of a picture see all of it in every layer, where the "
        "release lets them in the layers with a window alone, and no further than the window",
        bound=1.5,
        patches=gemma_faults.windowed_pictures,
    ),
    Deviation(
        name="sums over pixels",
        runtime="mlx_vlm",
        model_types=("gemma4_unified",),
        modality="image",
        what="MLX's CPU kernel sums the 6,912 values of a patch one after another in float32, so "
        "that their norm is off by 1e-5",
        bound=6e-4,
        patches=gemma_faults.summed_pixels,
    ),
    Deviation(
        name="sounds",
        runtime="mlx_vlm",
        model_types=("gemma4",),
        modality="audio",
        what="mlx-vlm 0.7.10 counts a sound's tokens by its duration, one more than the reference "
        "for a quarter of all lengths, and computes its analysis window in float32",
        bound=0.6,
        patches=audio_faults.gemma4_sounds,
    ),
    Deviation(
        name="quiet sounds",
        runtime="mlx_vlm",
        model_types=("inkling_mm_model",),
        modality="audio",
        what="mlx-vlm 0.7.10 lets a frequency's magnitude fall to 1e-10, where the release stops "
        "at 1e-5, so that silence and what is as quiet get lower levels; with that floor one level "
        "in a thousand lies between two and is rounded either way",
        bound=2.0,
        patches=audio_faults.inkling_sounds,
        prepares=True,
    ),
    *(
        Deviation(
            name="embedding scale and shared positions",
            runtime="mlx_vlm",
            model_types=("gemma3n",),
            modality=modality,
            what="mlx-vlm 0.7.10 leaves out the scale of the embeddings in a prompt, and turns the "
            "queries of layers that share keys as if they came after the tokens of the same step; "
            "mlx-lm does neither",
            bound=2.0,
            patches=gemma3n_faults.scaled_and_placed,
        )
        for modality in ("text", "audio")
    ),
    Deviation(
        name="pictures",
        runtime="mlx_vlm",
        model_types=("gemma3n",),
        modality="image",
        what="mlx-vlm 0.7.10 hands a picture's tokens over column by column, where the release "
        "means them row by row, pads the tower's strided convolutions on both sides, computes "
        "exact GELU there for its tanh form, leaves out the scale of the embeddings in a prompt, "
        "and turns the queries of layers that share keys as if they came after the tokens of the "
        "same step",
        bound=2.0,
        patches=gemma3n_faults.pictures,
    ),
    Deviation(
        name="adapter",
        runtime="mlx_vlm",
        model_types=("phi4mm",),
        modality="text",
        what="a checkpoint has the adapter for pictures in its text weights, as mlx-vlm's loader "
        "has, where the release adds none to text alone",
        bound=3.0,
        patches=phi4mm_faults.no_adapter,
        released=True,
    ),
    Deviation(
        name="adapter",
        runtime="mlx_vlm",
        model_types=("phi4mm",),
        modality="audio",
        what="a checkpoint has the adapter for pictures in its text weights, as mlx-vlm's loader "
        "has, where the release adds that for speech to sounds",
        bound=3.0,
        patches=phi4mm_faults.speech_adapter,
        released=True,
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
        bound=2.0,
        patches=text_faults.sliding_windows,
        configured=True,
    ),
    *_text(
        "sliding window",
        "mistral",
        what="the runtimes cannot give every layer a window, and attend to all tokens",
        bound=2.0,
        patches=text_faults.windows_everywhere,
        configured=True,
    ),
    *_text(
        "prompts without a picture",
        "paligemma",
        what="the runtime reads a prompt without a picture both ways, where the reference of "
        "PaliGemma 2 reads it backwards",
        bound=1.5,
        patches=text_faults.backwards_only,
        runtimes=("mlx_vlm",),
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
        "correction of the choice",
        "ernie4_5_moe",
        what="the runtimes discard the correction bias that helps to choose experts, and so choose "
        "others where it matters",
        bound=1.5,
        patches=router_faults.corrected_choice,
        released=True,
    ),
    *_text(
        "indexer",
        "deepseek_v32",
        what="mlx-vlm rotates neighbouring dimensions in the indexer, where the release rotates "
        "halves, and so attends to other tokens once there are more than index_topk",
        bound=3.0,
        patches=moe_faults.indexed_halves,
        runtimes=("mlx_vlm",),
    ),
    *_text(
        "routing weights",
        "hunyuan",
        what="the runtimes weigh the chosen experts by their softmax over all, where the release "
        "divides these weights by their sum",
        bound=1.5,
        patches=router_faults.divided_by_sum,
    ),
    *_text(
        "window and long positions",
        "phimoe",
        what="the runtimes attend to all tokens, where the release has a window, and mlx-lm "
        "applies LongRoPE's long factors at every length",
        bound=2.0,
        patches=text_faults.phi3,
        configured=True,
    ),
    *_text(
        "chosen tokens",
        "hy_v4",
        what="mlx-vlm compiles the choice of tokens without shapes, with a place that holds for "
        "the first length it meets, and so attends to other tokens at every other length",
        bound=3.0,
        patches=moe_faults.partitioned_afresh,
        runtimes=("mlx_vlm",),
    ),
    *_text(
        "overlapping windows",
        "deepseek_v4",
        what="mlx-vlm lets a compressed window overlap the one before it within one call only, so "
        "that every window completed while decoding lacks half of what it compresses",
        bound=1.8,
        patches=compression_faults.overlapping_windows,
        runtimes=("mlx_vlm",),
    ),
    *_text(
        "chosen blocks",
        "minimax_m3_vl",
        what="mlx-vlm chooses the same blocks of tokens for all heads, where the release chooses "
        "for each group of heads; mlx-lm does as the release",
        bound=3.0,
        patches=compression_faults.blocks_by_head,
        runtimes=("mlx_vlm",),
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
    *_text(
        "norm epsilon",
        "nanochat",
        what="the runtimes give every norm an epsilon of 1e-5, whatever the release says",
        bound=2e-3,
        patches=norm_faults.stated_epsilon,
        configured=True,
    ),
    *_text(
        "gated norm",
        "mamba2",
        what="the runtimes norm the gated output as a whole, where the release norms each group",
        bound=1.5,
        patches=norm_faults.grouped_mamba2,
        configured=True,
    ),
    *_text(
        "gated norm",
        "falcon_h1",
        what="the runtimes norm the gated output as a whole, where the release norms each group",
        bound=0.6,
        patches=norm_faults.grouped_falcon_h1,
        configured=True,
    ),
    *_text(
        "embedding scale",
        "recurrent_gemma",
        what="the runtimes scale the embeddings by the exact root of their size, where the release "
        "rounds it to bfloat16 in every precision",
        bound=5e-4,
        patches=norm_faults.rounded_scale,
    ),
    *_text(
        "cross-attention without a picture",
        "mllama",
        what="mlx-vlm 0.7.10 runs the cross-attention layers where there is no picture, with keys "
        "made from the text, where the release leaves them out",
        bound=0.75,
        patches=mllama_faults.crossing,
        configured=True,
        runtimes=("mlx_vlm",),
    ),
    *_text(
        "norm epsilon",
        "llama4",
        what="the runtimes norm queries and keys with an epsilon of 1e-6, whatever the release "
        "says",
        bound=0.2,
        patches=llama4_faults.text,
        configured=True,
    ),
)

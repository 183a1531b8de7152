"""Idefics2's pictures as the release sees them, in a loaded mlx-vlm model.

The runtime places patches one bucket off and lets padding take part in attention; its layers have
no way to be told otherwise, so the way from pixels to tokens is written out here.
"""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from validate.image_faults import patch_positions

Patch = tuple[Any, str, Any]
Config = Mapping[str, Any]


def idefics2(model: Any, config: Config) -> list[Patch]:
    """Positions, masks, the tower's activation, and every epsilon that the runtime makes up."""
    nn: Any = import_module("mlx.nn")
    tower, resampler = model.vision_model, model.connector.perceiver_resampler
    epsilon = config["perceiver_config"]["rms_norm_eps"]
    norms = [resampler.norm]
    for layer in resampler.layers:
        norms += [layer.input_latents_norm, layer.input_context_norm]
        norms.append(layer.post_attention_layernorm)
    return [
        (tower.post_layernorm, "eps", config["vision_config"]["layer_norm_eps"]),
        *((norm, "eps", epsilon) for norm in norms),
        *((lay.mlp, "activation_fn", nn.GELU(approx="precise")) for lay in tower.encoder.layers),
        (model, "get_input_embeddings", partial(_embed, model, model.get_input_embeddings)),
    ]


def _embed(
    model: Any,
    stock: Callable[..., Any],
    input_ids: Any,
    pixel_values: Any = None,
    *,
    pixel_attention_mask: Any = None,
    **kwargs: Any,
) -> Any:
    """Text embeddings with every picture token replaced, for the pictures of one prompt."""
    mx: Any = import_module("mlx.core")
    embedded = stock(input_ids, None, **kwargs)
    if pixel_values is None:
        return embedded
    pixels = np.array(pixel_values[0])
    real = pixels.any(axis=(1, 2, 3))
    present = np.ones((len(pixels), *pixels.shape[2:]), dtype=bool)
    if pixel_attention_mask is not None:
        present = np.array(pixel_attention_mask[0]).astype(bool)
    grid = _whole_patches(present[real], model.config.vision_config.patch_size)
    features = _resample(model.connector, _see(model.vision_model, pixels[real], grid), grid)
    text = embedded.inputs_embeds
    token = model.config.image_token_index
    at = [index for index, found in enumerate(input_ids[0].tolist()) if found == token]
    text[0, mx.array(at)] = features.reshape(len(at), -1).astype(text.dtype)
    embedded.inputs_embeds = text
    return embedded


def _whole_patches(present: Any, patch: int) -> Any:
    """Which patches hold no padding at all, [pictures, rows, columns]."""
    count, height, width = present.shape
    rows, columns = height // patch, width // patch
    cut = present[:, : rows * patch, : columns * patch]
    return cut.reshape(count, rows, patch, columns, patch).all(axis=(2, 4))


def _see(tower: Any, pixels: Any, grid: Any) -> Any:
    """Features of each patch, [pictures, patches, size]."""
    mx: Any = import_module("mlx.core")
    patches = tower.embeddings.patch_embedding(mx.array(pixels.transpose(0, 2, 3, 1)))
    positions = patch_positions(grid, tower.embeddings.num_patches)
    x = mx.flatten(patches, start_axis=1, end_axis=2)
    x = x + tower.embeddings.position_embedding(mx.array(positions))
    seen = mx.array(grid.reshape(len(grid), 1, 1, -1))
    for layer in tower.encoder.layers:
        y = layer.layer_norm1(x)
        x = x + _attend(layer.self_attn, y, y, seen, layer.self_attn.out_proj)
        x = x + layer.mlp(layer.layer_norm2(x))
    return tower.post_layernorm(x)


def _resample(connector: Any, features: Any, grid: Any) -> Any:
    """A few tokens of each picture, [pictures, latents, size]."""
    mx: Any = import_module("mlx.core")
    context, resampler = connector.modality_projection(features), connector.perceiver_resampler
    latents = mx.repeat(resampler.latents[None], len(grid), axis=0)
    there = np.ones((len(grid), latents.shape[1]), dtype=bool)
    seen = np.concatenate([grid.reshape(len(grid), -1), there], axis=1)[:, None, None, :]
    for layer in resampler.layers:
        asking = layer.input_latents_norm(latents)
        asked = mx.concatenate([layer.input_context_norm(context), asking], axis=1)
        heads = layer.self_attn
        latents = latents + _attend(heads, asking, asked, mx.array(seen), heads.o_proj)
        latents = latents + layer.mlp(layer.post_attention_layernorm(latents))
    return resampler.norm(latents)


def _attend(heads: Any, asking: Any, asked: Any, seen: Any, out: Any) -> Any:
    """Multi-head attention of ``asking`` to ``asked`` where ``seen``."""
    mx: Any = import_module("mlx.core")

    def split(x: Any) -> Any:
        size = round(heads.scale**-2)
        return x.reshape(*x.shape[:2], -1, size).transpose(0, 2, 1, 3)

    q, k, v = split(heads.q_proj(asking)), split(heads.k_proj(asked)), split(heads.v_proj(asked))
    found = mx.fast.scaled_dot_product_attention(q, k, v, scale=heads.scale, mask=seen)
    return out(found.transpose(0, 2, 1, 3).reshape(*asking.shape[:2], -1))

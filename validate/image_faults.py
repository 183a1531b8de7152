"""Taking documented faults out of a loaded multimodal model, in memory.

Each function returns patches (module, attribute, what belongs there), given the model and the
checkpoint's config.
"""

import math
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np

from validate.text_faults import exact_scale

Patch = tuple[Any, str, Any]
Config = Mapping[str, Any]


def final_norm(model: Any, config: Config) -> list[Patch]:
    """The config's epsilon in the tower's last norm, where the runtime has one of its own."""
    tower = getattr(model, "vision_tower", None)
    tower = model.vision_model if tower is None else tower.vision_model
    return [(tower.post_layernorm, "eps", config["vision_config"]["layer_norm_eps"])]


def idefics3(model: Any, config: Config) -> list[Patch]:
    """Positions bucketed as the reference rounds them, and the last norm's epsilon."""
    tower = model.vision_model
    return [(tower, "embeddings", _Bucketed(tower.embeddings)), *final_norm(model, config)]


def cohere2_vision(model: Any, config: Config) -> list[Patch]:
    """The tower's last norm, with the config's epsilon, over what the projector reads."""
    tower = model.vision_tower.vision_model
    normed, project = tower.post_layernorm, model.multi_modal_projector
    return [
        *final_norm(model, config),
        (model, "multi_modal_projector", lambda features: project(normed(features))),
    ]


def muse_glimmer(model: Any, config: Config) -> list[Patch]:
    """Positions in the order of the release: it walks its table by columns, the patches by rows."""
    embedder = model.vision_tower.patch_embedder
    stock = embedder._position_embeddings

    def turned(grid: Any) -> Any:
        return stock([(frames, width, height) for frames, height, width in grid])

    return [(embedder, "_position_embeddings", turned)]


def swapped_gelu(model: Any, config: Config) -> list[Patch]:
    """The tanh form of GELU in the tower's blocks, the exact one in its mergers."""
    del config
    nn: Any = import_module("mlx.nn")
    tower = model.vision_tower
    mergers = [tower.merger, *tower.deepstack_merger_list]
    return [
        *((block.mlp, "act_fn", nn.GELU(approx="precise")) for block in tower.blocks),
        *((merger, "act_fn", nn.GELU()) for merger in mergers),
    ]


def tanh_blocks(model: Any, config: Config) -> list[Patch]:
    """The tanh form of GELU in the blocks of a thinker's tower."""
    del config
    nn: Any = import_module("mlx.nn")
    blocks = model.thinker.vision_tower.blocks
    return [(block.mlp, "act_fn", nn.GELU(approx="precise")) for block in blocks]


def internvl(model: Any, config: Config) -> list[Patch]:
    """Exact GELU in the tower and in the projector."""
    del config
    nn: Any = import_module("mlx.nn")
    layers = model.vision_tower.encoder.layer
    return [
        *((layer.mlp, "activation_fn", nn.GELU()) for layer in layers),
        (model.multi_modal_projector, "activation", nn.GELU()),
    ]


def gemma3(model: Any, config: Config) -> list[Patch]:
    """Pictures that see themselves whole, at the exact scale, and the last norm's epsilon."""
    mx: Any = import_module("mlx.core")
    text = model.language_model
    stack, projector = text.model, model.multi_modal_projector
    exact = math.sqrt(stack.embed_tokens.weight.shape[1])
    correction = exact / float(mx.array(exact, mx.bfloat16))
    return [
        *exact_scale(model),
        *final_norm(model, config),
        (model, "multi_modal_projector", lambda features: projector(features) * correction),
        (text, "model", _WholePictures(stack, config["image_token_index"])),
    ]


class _Bucketed:
    """Idefics 3's embeddings with positions in float32, in the reference's order of operations."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.patch_embedding = inner.patch_embedding

    def __call__(self, pixels: Any, patch_attention_mask: Any = None) -> Any:
        mx: Any = import_module("mlx.core")
        patches = mx.flatten(self.inner.patch_embedding(pixels), start_axis=1, end_axis=2)
        count, side = patches.shape[0], self.inner.num_patches_per_side
        if patch_attention_mask is None:
            mask = np.ones((count, side, side), dtype=bool)
        else:
            mask = np.array(patch_attention_mask).astype(bool).reshape(count, side, -1)
        return patches + self.inner.position_embedding(mx.array(patch_positions(mask, side)))


def patch_positions(mask: Any, side: int) -> Any:
    """Table rows [pictures, patches] of a grid of present patches, for a square table."""
    rows = _buckets(mask[:, :, 0].sum(axis=1), mask.shape[1], side)
    columns = _buckets(mask[:, 0, :].sum(axis=1), mask.shape[2], side)
    ids = np.where(mask, rows[:, :, None] * side + columns[:, None, :], 0)
    return ids.reshape(len(mask), -1)


def _buckets(present: Any, size: int, side: int) -> Any:
    """Table rows of ``size`` patches per picture, ``present`` of them real, [pictures, size]."""
    edges = np.arange(1 / side, 1.0, 1 / side).astype(np.float32)
    step = np.float32(1.0) / present.astype(np.float32)
    at = np.arange(size, dtype=np.float32)[None, :] * step[:, None]
    return np.searchsorted(edges, np.minimum(at, np.float32(1.0 - 1e-6)), side="right")


class _WholePictures:
    """Gemma 3's stack where the tokens of one picture attend to each other both ways."""

    def __init__(self, inner: Any, image_token: int) -> None:
        self.inner = inner
        self.image_token = image_token

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(
        self, inputs: Any, inputs_embeds: Any = None, mask: Any = None, cache: Any = None
    ) -> Any:
        mx: Any = import_module("mlx.core")
        picture = np.array(inputs[0]) == self.image_token
        if not picture.any() or inputs_embeds is None:
            return self.inner(inputs, inputs_embeds=inputs_embeds, mask=mask, cache=cache)
        config, count = self.inner.config, len(picture)
        starts = picture & ~np.concatenate([[False], picture[:-1]])
        block = np.where(picture, np.cumsum(starts), 0)
        back = np.arange(count)[:, None] - np.arange(count)[None, :]
        seen = (back >= 0) | (picture[:, None] & (block[:, None] == block[None, :]))
        full, near = mx.array(seen), mx.array(seen & (back < config.sliding_window))
        hidden = inputs_embeds * mx.array(config.hidden_size**0.5, mx.bfloat16).astype(mx.float32)
        for index, layer in enumerate(self.inner.layers):
            wide = (index + 1) % config.sliding_window_pattern == 0
            hidden = layer(hidden, full if wide else near, cache[index])
        return self.inner.norm(hidden)

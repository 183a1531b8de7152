"""Taking documented faults out of models whose pictures are cut into tiles of any resolution.

Each function returns patches (module, attribute, what belongs there), given the model and the
checkpoint's config.
"""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any, Final

Patch = tuple[Any, str, Any]
Config = Mapping[str, Any]
_QFORMER_EPS: Final = 1e-12
"""Of BLIP-2's Q-Former, whose config class says so."""


def siglip_gelu(model: Any) -> list[Patch]:
    """The tanh form of GELU in a SigLIP tower, where the runtime takes x*sigmoid(1.7x)."""
    nn: Any = import_module("mlx.nn")
    layers = model.vision_tower.vision_model.encoder.layers
    return [(layer.mlp, "activation_fn", nn.GELU(approx="precise")) for layer in layers]


def packed_tiles(model: Any, config: Config) -> list[Patch]:
    """Tiles laid out as one picture, its padding cut off, a newline after each row."""
    stock = model.get_input_embeddings
    return [
        (model, "get_input_embeddings", partial(_embed, model, stock, config)),
        *(siglip_gelu(model) if config["model_type"] == "granite_vision" else ()),
    ]


def granite4(model: Any, config: Config) -> list[Patch]:
    """The tower's activation, and the epsilon of the Q-Formers' norms."""
    del config
    patches = siglip_gelu(model)
    for projector in [*model.layerwise_projectors, *model.spatial_projectors]:
        former = projector.qformer
        norms = [former.layernorm]
        for layer in former.encoder.layer:
            blocks = (layer.attention.output, layer.crossattention.output, layer.output_query)
            norms += [block.LayerNorm for block in blocks]
        patches += [(norm, "eps", _QFORMER_EPS) for norm in norms]
    return patches


def _embed(
    model: Any,
    stock: Callable[..., Any],
    config: Config,
    input_ids: Any,
    pixel_values: Any = None,
    **kwargs: Any,
) -> Any:
    """Text embeddings with every picture token replaced, for one picture of several tiles."""
    mx: Any = import_module("mlx.core")
    if pixel_values is None:
        return stock(input_ids, None, **kwargs)
    embedded = stock(input_ids, None, **kwargs)
    states = model.vision_tower(pixel_values[0].transpose(0, 2, 3, 1), True)[-1]
    depths = config["vision_feature_layer"]
    read = [states[depth] for depth in (depths if isinstance(depths, list) else [depths])]
    if config["vision_feature_select_strategy"] == "default":
        read = [state[:, 1:] for state in read]
    tiles = model.multi_modal_projector(mx.concatenate(read, axis=-1))
    height, width = (int(side) for side in kwargs["image_sizes"][0].tolist())
    features = _pack(tiles, model.image_newline, config, (height, width))
    text = embedded.inputs_embeds
    at = [i for i, token in enumerate(input_ids[0].tolist()) if token == _image_token(config)]
    text[0, mx.array(at)] = features.astype(text.dtype)
    embedded.inputs_embeds = text
    return embedded


def _image_token(config: Config) -> Any:
    return config.get("image_token_index", config.get("image_token_id"))


def _pack(tiles: Any, newline: Any, config: Config, original: tuple[int, int]) -> Any:
    """[tiles, patches, size] with the small whole picture first -> [picture tokens, size]."""
    from transformers.image_processing_utils import select_best_resolution

    mx: Any = import_module("mlx.core")
    vision = config["vision_config"]
    side = vision["image_size"] // vision["patch_size"]
    if len(tiles) == 1:
        return mx.concatenate([tiles[0], newline[None]])
    pinpoints = [tuple(pair) for pair in config["image_grid_pinpoints"]]
    best = select_best_resolution(original, pinpoints)
    down, across = (edge // vision["image_size"] for edge in best)
    grid = tiles[1:].reshape(down, across, side, side, -1).transpose(0, 2, 1, 3, 4)
    grid = _unpadded(grid.reshape(down * side, across * side, -1), original)
    ends = mx.broadcast_to(newline, (grid.shape[0], 1, grid.shape[2]))
    rows = mx.concatenate([grid, ends], axis=1)
    return mx.concatenate([tiles[0], rows.reshape(-1, rows.shape[2])])


def _unpadded(grid: Any, original: tuple[int, int]) -> Any:
    """Cut off what padding to the tiles' shape added, rounded as the reference rounds it."""
    (tall, wide), (height, width) = original, grid.shape[:2]
    if wide / tall > width / height:
        cut = (height - int(round(tall * (width / wide), 7))) // 2
        return grid[cut : height - cut]
    cut = (width - int(round(wide * (height / tall), 7))) // 2
    return grid[:, cut : width - cut]

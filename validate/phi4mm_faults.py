"""Phi-4 Multimodal in mlx-vlm as the release computes it, in memory.

Each function returns patches (module, attribute, what belongs there) for a loaded model, given the
folder of the release: it has the adapters and the marks between lines that no checkpoint holds.
"""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np

from validate.phi4mm import picture_token, read_adapters, read_tensors, scales
from validate.reference import read_config

Patch = tuple[Any, str, Any]
_MARKS: Final = ("glb_GN", "sub_GN")


def no_adapter(model: Any, source: Path) -> list[Patch]:
    """Text weights without the adapter for pictures, which is folded into the checkpoint's."""
    return list(_adapted(model, source, speech=False))


def speech_adapter(model: Any, source: Path) -> list[Patch]:
    """Text weights with the adapter for speech in place of that for pictures."""
    return list(_adapted(model, source, speech=True))


def _adapted(model: Any, source: Path, *, speech: bool) -> Iterator[Patch]:
    mx: Any = import_module("mlx.core")
    weights, factors = read_adapters(source, "mlx"), scales(read_config(source))

    def product(name: str, kind: str) -> Any:
        down, up = (weights[f"{name}.lora_{half}.{kind}.weight"] for half in "AB")
        return factors[kind] * (up.astype(mx.float32) @ down.astype(mx.float32))

    for name, module in model.language_model.named_modules():
        if f"{name}.lora_A.vision.weight" not in weights:
            continue
        delta = -product(name, "vision") + (product(name, "speech") if speech else 0.0)
        yield module, "weight", (module.weight + delta).astype(module.weight.dtype)


def tiles(model: Any, source: Path) -> list[Patch]:
    """Pictures cut into tiles, averaged two by two, with marks at line ends, as the release's."""
    stock = model.get_input_embeddings
    config = read_config(source)
    marks = _marks(source)
    crop, token = config["embd_layer"]["image_embd_layer"]["crop_size"], picture_token(config)

    def embedded(input_ids: Any = None, pixel_values: Any = None, **inputs: Any) -> Any:
        if "image_pixel_values" not in inputs:
            return stock(input_ids, pixel_values, **inputs)
        mx: Any = import_module("mlx.core")
        seen = (inputs[f"image_{name}"] for name in ("pixel_values", "attention_mask", "sizes"))
        pixels, masks, sizes = map(np.asarray, seen)
        pictures = [
            model.apply_mm_projector(_picture(model, *picture, marks))
            for picture in zip(pixels, masks.astype(bool), sizes // crop, strict=True)
        ]
        found = stock(input_ids, None)
        places = mx.array(np.flatnonzero(np.asarray(input_ids[0]) == token))
        found.inputs_embeds[0, places] = mx.concatenate(pictures)
        return found

    return [(model, "get_input_embeddings", embedded)]


def _marks(source: Path) -> tuple[Any, Any]:
    """What stands between a picture's tiles and its whole, and what ends each of its lines."""
    mx: Any = import_module("mlx.core")
    found = read_tensors(source, "mlx", _MARKS)
    whole, line = (found[f"model.embed_tokens_extend.image_embed.{name}"] for name in _MARKS)
    return whole.reshape(1, -1).astype(mx.float32), line.reshape(1, 1, -1).astype(mx.float32)


def _picture(model: Any, pixels: Any, masks: Any, grid: Any, marks: tuple[Any, Any]) -> Any:
    """Features [tokens, width] of one picture: its tiles, a mark, and the whole of it.

    pixels [1 + tiles, channels, rows, columns], masks [1 + tiles, rows, columns] of patches.
    """
    mx: Any = import_module("mlx.core")
    features = _averaged(_tower(model, pixels, masks))
    side, width = features.shape[1], features.shape[-1]
    rows, columns = (int(count) for count in grid)
    count = rows * columns

    def laid_out(parts: Any, *tail: int) -> Any:
        apart = parts[1 : count + 1].reshape(rows, columns, side, side, *tail)
        return apart.swapaxes(1, 2).reshape(rows * side, columns * side, *tail)

    useful = laid_out(masks[:, 0::2, 0::2])
    tiled = laid_out(features, width)[: int(useful[:, 0].sum()), : int(useful[0].sum())]
    between, line = marks

    def lines(picture: Any) -> Any:
        ends = mx.broadcast_to(line, (picture.shape[0], 1, width))
        return mx.concatenate([picture, ends], axis=1).reshape(-1, width)

    return mx.concatenate([lines(tiled), between, lines(features[0])])


def _averaged(features: Any) -> Any:
    """Means of two by two patches, [pictures, side, side, width] halved; odd sides are mirrored."""
    mx: Any = import_module("mlx.core")
    if features.shape[1] % 2:
        features = mx.concatenate([features, features[:, -2:-1]], axis=1)
        features = mx.concatenate([features, features[:, :, -2:-1]], axis=2)
    count, side, _, width = features.shape
    return features.reshape(count, side // 2, 2, side // 2, 2, width).mean(axis=(2, 4))


def _tower(model: Any, pixels: Any, masks: Any) -> Any:
    """The tower's last layer but one, [pictures, side, side, width]."""
    mx: Any = import_module("mlx.core")
    tower = model.vision_tower.vision_tower
    embeddings = tower.embeddings
    patch, side = embeddings.patch_size, masks.shape[1]
    count, channels = pixels.shape[:2]
    cut = pixels.reshape(count, channels, side, patch, side, patch).transpose(0, 2, 4, 3, 5, 1)
    x = embeddings.patch_embedding(mx.array(cut.reshape(count, side * side, -1)))
    x = x + embeddings.position_embedding(mx.array(_places(masks)))
    hidden = mx.where(mx.array(masks.reshape(count, 1, 1, -1)), 0.0, -mx.inf)
    _, states = tower.encoder(x, output_hidden_states=True, mask=hidden)
    return states[model.vision_tower.select_layer].reshape(count, side, side, -1)


def _places(masks: Any) -> Any:
    """Rows of the table of positions: what is seen of a tile is stretched over all of it."""
    side = masks.shape[1]
    bounds = np.arange(1 / side, 1.0, 1 / side, dtype=np.float32)

    def places(counts: Any) -> Any:
        steps = np.arange(side, dtype=np.float32) * (np.float32(1) / counts[:, None])
        near = np.minimum(steps.astype(np.float32), np.float32(1 - 1e-6))
        return np.searchsorted(bounds, near, side="right")

    rows, columns = places(masks[:, :, 0].sum(1)), places(masks[:, 0].sum(1))
    found = rows[:, :, None] * side + columns[:, None, :]
    return np.where(masks, found, 0).reshape(len(masks), -1)

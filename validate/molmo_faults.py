"""Molmo 2 and its kin: what the stock runtime computes otherwise on pictures, taken out in memory.

Each function returns patches (module, attribute, what belongs there), given the model and the
checkpoint's config.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Final

import numpy as np

Patch = tuple[Any, str, Any]
Config = Mapping[str, Any]
_MARKERS: Final = (
    "image_patch_id",
    "image_col_id",
    "image_start_token_id",
    "low_res_image_start_token_id",
    "frame_start_token_id",
    "image_end_token_id",
    "frame_end_token_id",
    "image_low_res_id",
)
"""Tokens of a picture, all of which see each other."""


def picture_tokens(config: Config) -> list[int]:
    """Ids of the tokens that stand for pictures or around them; none for other types."""
    if config.get("model_type") != "molmo2":
        return []
    return [config[name] for name in _MARKERS if config.get(name) is not None]


def molmo2(model: Any, config: Config) -> list[Patch]:
    """Pictures that see themselves whole, and the tanh form of GELU in the tower."""
    nn: Any = import_module("mlx.nn")
    blocks = model.vision_tower.image_vit.transformer
    text = model.language_model
    return [
        *((block.feed_forward, "act", nn.GELU(approx="precise")) for block in blocks),
        (text, "model", _WholePictures(text.model, picture_tokens(config))),
    ]


class _WholePictures:
    """A text stack where the tokens of pictures attend to each other both ways."""

    def __init__(self, inner: Any, tokens: Sequence[int]) -> None:
        self.inner = inner
        self.tokens = tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(
        self, inputs: Any, inputs_embeds: Any = None, mask: Any = None, cache: Any = None
    ) -> Any:
        mx: Any = import_module("mlx.core")
        picture = np.isin(np.array(inputs[0]), self.tokens)
        if mask is None and len(picture) > 1 and picture.any():
            at = np.arange(len(picture))
            seen = (at[:, None] >= at[None, :]) | (picture[:, None] & picture[None, :])
            mask = mx.array(seen)
        return self.inner(inputs, inputs_embeds, mask, cache)

"""LFM2-VL: tiles of a picture and a small whole one, in flat patches, four to a token."""

from types import MappingProxyType

from validate.twin.families import dense
from validate.twin.family import CHAT_TOKENS, Family, Files, Json

IMAGE, START, END = "<image>", "<|image_start|>", "<|image_end|>"
THUMBNAIL = "<|img_thumbnail|>"
TILE_SIDE, POSITION_SIDE, MAX_TILES = 4, 6, 4
"""Patches per side of a tile and of the position table; most tiles of a picture."""
TILES = tuple(
    f"<|img_row_{row}_col_{column}|>"
    for row in range(1, MAX_TILES + 1)
    for column in range(1, MAX_TILES + 1)
    if row * column <= MAX_TILES
)


def _adjust(config: Json, source: Json) -> Json:
    config["text_config"] = dense.LFM2.adjust(config["text_config"], source["text_config"])
    vision = config["vision_config"]
    vision["num_patches"] = POSITION_SIDE**2
    config.update(projector_hidden_size=160, tile_size=TILE_SIDE * vision["patch_size"])
    config.update(max_image_tokens=8, min_image_tokens=2, max_tiles=MAX_TILES)
    return config


def _processor(config: Json) -> Files:
    images = {
        "do_image_splitting": True,
        "downsample_factor": config["downsample_factor"],
        "encoder_patch_size": config["vision_config"]["patch_size"],
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Lfm2VlImageProcessorFast",
        "image_std": [0.5, 0.5, 0.5],
        "max_pixels_tolerance": 2.0,
        "min_tiles": 2,
        "processor_class": "Lfm2VlProcessor",
        "resample": 3,
        "use_thumbnail": True,
        **{name: config[name] for name in ("max_image_tokens", "min_image_tokens")},
        **{name: config[name] for name in ("max_tiles", "tile_size")},
    }
    return {"preprocessor_config.json": images}


FAMILY = Family(
    specials=(*CHAT_TOKENS, IMAGE, START, END, THUMBNAIL, *TILES),
    tokens=MappingProxyType({"image_token_id": IMAGE}),
    named_tokens=MappingProxyType(
        {
            "image_token": IMAGE,
            "image_start_token": START,
            "image_end_token": END,
            "image_thumbnail_token": THUMBNAIL,
        }
    ),
    image_markup=IMAGE,
    adjust=_adjust,
    processor=_processor,
)

"""Cohere Compass: Qwen's patches under names of its own."""

from types import MappingProxyType

from validate.twin.families.qwen import QWEN3_5
from validate.twin.family import CHAT_TOKENS, Family, Files, Json

IMAGE, VIDEO, START, END = "<|IMAGE_PAD|>", "<|VIDEO_PAD|>", "<|VISION_START|>", "<|VISION_END|>"


def _adjust(config: Json, source: Json) -> Json:
    config = QWEN3_5.adjust(config, source)
    for settings in config["text_config"]["rope_parameters"].values():
        if settings:
            settings["mrope_section"] = [6, 5, 5]
    config["vision_config"].pop("rope_parameters", None)
    # Sizes of pictures stand in both files: mlx-vlm reads them here.
    config["min_pixels"], config["max_pixels"] = _pixels(config)
    return config


def _pixels(config: Json) -> tuple[int, int]:
    vision = config["vision_config"]
    cell = (vision["patch_size"] * vision["spatial_merge_size"]) ** 2
    return 4 * cell, 24 * cell


def _processor(config: Json) -> Files:
    vision = config["vision_config"]
    smallest, largest = _pixels(config)
    images = {
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "CohereCompassImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "max_pixels": largest,
        "merge_size": vision["spatial_merge_size"],
        "min_pixels": smallest,
        "patch_size": vision["patch_size"],
        "processor_class": "CohereCompassProcessor",
        "temporal_patch_size": vision["temporal_patch_size"],
    }
    return {"preprocessor_config.json": images}


FAMILY = Family(
    specials=(*CHAT_TOKENS, IMAGE, VIDEO, START, END),
    tokens=MappingProxyType(
        {
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "vision_end_token_id": END,
            "vision_start_token_id": START,
        }
    ),
    image_markup=f"{START}{IMAGE}{END}",
    adjust=_adjust,
    processor=_processor,
)

"""Aya Vision and Command A Vision: square tiles, four patches to a token."""

from dataclasses import replace
from types import MappingProxyType

from validate.twin.families.llava import SIDE, small_pictures
from validate.twin.family import CHAT_TOKENS, Family, Files, Json

PATCH, START, END = "<|IMG_PATCH|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>"
BREAK = "<|IMG_LINE_BREAK|>"


def _adjust(config: Json, source: Json) -> Json:
    del source
    config["alignment_intermediate_size"] = 320
    return small_pictures(config)


def _files(config: Json, processor: str) -> Files:
    vision = config["vision_config"]
    tile, patch = vision["image_size"], vision["patch_size"]
    assert tile == SIDE * patch
    images = {
        "crop_to_patches": True,
        "do_convert_rgb": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "GotOcr2ImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "max_patches": 4,
        "min_patches": 1,
        "processor_class": processor,
        "size": {"height": tile, "width": tile},
    }
    settings = {
        "downsample_factor": config["downsample_factor"],
        "img_size": tile,
        "patch_size": patch,
        "processor_class": processor,
    }
    return {"preprocessor_config.json": images, "processor_config.json": settings}


def _aya(config: Json) -> Files:
    return _files(config, "AyaVisionProcessor")


def _command(config: Json) -> Files:
    """As Aya Vision's: the release's own image processor exists for torchvision only."""
    files = _files(config, "Cohere2VisionProcessor")
    # So the release calls the tokens per side of a tile.
    files["preprocessor_config.json"]["patch_size"] = SIDE // config["downsample_factor"]
    return files


AYA = Family(
    silent_bos="<BOS_TOKEN>",
    specials=("<BOS_TOKEN>", *CHAT_TOKENS, PATCH, START, END, BREAK),
    tokens=MappingProxyType(
        {"bos_token_id": "<BOS_TOKEN>", "image_token_index": PATCH, "image_token_id": PATCH}
    ),
    image_markup="<image>",
    adjust=_adjust,
    processor=_aya,
)
COMMAND = replace(
    AYA,
    named_tokens=MappingProxyType(
        {
            "boi_token": START,
            "eoi_token": END,
            "image_token": PATCH,
            "img_line_break_token": BREAK,
        }
    ),
    image_markup=PATCH,
    processor=_command,
)

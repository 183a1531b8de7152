"""Mistral 3 and Pixtral: pictures of any shape, rows of patches between break tokens."""

from types import MappingProxyType

from validate.twin.families.llava import small_text
from validate.twin.family import CHAT_TOKENS, Family, Files, Json

IMAGE, BREAK, END = "[IMG]", "[IMG_BREAK]", "[IMG_END]"
SIDE = 8
"""Most patches per side of the twin's pictures."""
TOWER = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}
"""A small tower, where the source leaves its sizes to the reference's defaults."""


def _adjust(config: Json, source: Json) -> Json:
    del source
    config = small_text(config)
    vision = config["vision_config"]
    if "hidden_size" not in vision:
        vision |= TOWER
    vision["image_size"] = SIDE * vision["patch_size"]
    return config


def _processor(config: Json) -> Files:
    patch = config["vision_config"]["patch_size"]
    images = {
        "do_convert_rgb": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "PixtralImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "patch_size": patch,
        "processor_class": "PixtralProcessor",
        "resample": 3,
        "size": {"longest_edge": SIDE * patch},
    }
    settings = {
        "image_break_token": BREAK,
        "image_end_token": END,
        "image_token": IMAGE,
        "patch_size": patch,
        "processor_class": "PixtralProcessor",
        "spatial_merge_size": config.get("spatial_merge_size", 1),
    }
    return {"preprocessor_config.json": images, "processor_config.json": settings}


FAMILY = Family(
    add_bos=True,
    specials=("<s>", *CHAT_TOKENS, IMAGE, BREAK, END),
    tokens=MappingProxyType({"image_token_index": IMAGE, "image_token_id": IMAGE}),
    named_tokens=MappingProxyType({"image_token": IMAGE}),
    image_markup=IMAGE,
    adjust=_adjust,
    processor=_processor,
)

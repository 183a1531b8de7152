"""LLaVA and its kin: an image token that the processor repeats once per patch."""

from types import MappingProxyType

from validate.twin.family import CHAT_TOKENS, Family, Files, Json

IMAGE = "<image>"
SIDE = 6
"""Patches per side of the twin's pictures."""
STACK = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
}
"""A small text stack, where the source leaves its sizes to the reference's defaults."""


def small_text(config: Json) -> Json:
    """Fill in the sizes that the source does not state."""
    text = config["text_config"]
    for name, value in STACK.items():
        text.setdefault(name, value)
    return config


def small_pictures(config: Json) -> Json:
    """Cut the tower's pictures to a few patches."""
    vision = config["vision_config"]
    vision["image_size"] = SIDE * vision["patch_size"]
    return config


def _adjust(config: Json, source: Json) -> Json:
    del source
    return small_pictures(small_text(config))


VIDEO = "<video>"
"""LLaVA-OneVision's mark for a video."""


def _adjust_onevision(config: Json, source: Json) -> Json:
    config = _adjust(config, source)
    size = config["vision_config"]["image_size"]
    config["image_grid_pinpoints"] = [[size * a, size * b] for a in (1, 2) for b in (1, 2)]
    return config


def _onevision_files(config: Json) -> Files:
    size = config["vision_config"]["image_size"]
    images = {
        "do_pad": True,
        "image_grid_pinpoints": config["image_grid_pinpoints"],
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "LlavaOnevisionProcessor",
        "resample": 3,
        "size": {"height": size, "width": size},
    }
    settings = {
        "image_token": IMAGE,
        "num_image_tokens": SIDE**2,
        "processor_class": "LlavaOnevisionProcessor",
        "video_token": VIDEO,
        "vision_aspect_ratio": config["vision_aspect_ratio"],
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
    }
    return {"preprocessor_config.json": images, "processor_config.json": settings}


ONEVISION = Family(
    specials=(*CHAT_TOKENS, IMAGE, VIDEO),
    tokens=MappingProxyType({"image_token_index": IMAGE, "video_token_index": VIDEO}),
    named_tokens=MappingProxyType({"image_token": IMAGE, "video_token": VIDEO}),
    image_markup=f"{IMAGE}\n",
    adjust=_adjust_onevision,
    processor=_onevision_files,
)

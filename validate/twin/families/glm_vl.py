"""GLM-OCR, GLM-4.1V and 4.5V: GLM's picture tokens, patches merged two by two."""

from dataclasses import replace
from types import MappingProxyType

from validate.twin.family import CHAT_TOKENS, Family, Files, Json

IMAGE, IMAGE_START, IMAGE_END = "<|image|>", "<|begin_of_image|>", "<|end_of_image|>"
VIDEO, VIDEO_START, VIDEO_END = "<|video|>", "<|begin_of_video|>", "<|end_of_video|>"


def _adjust(config: Json, source: Json) -> Json:
    del source
    config["vision_config"]["out_hidden_size"] = config["text_config"]["hidden_size"]
    return config


def _processor(config: Json) -> Files:
    vision = config["vision_config"]
    patch, merge = vision["patch_size"], vision["spatial_merge_size"]
    cell = (patch * merge) ** 2
    settings = {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "Glm46VImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "merge_size": merge,
        "patch_size": patch,
        "processor_class": "Glm46VProcessor",
        "size": {"longest_edge": 2 * 24 * cell, "shortest_edge": 2 * 4 * cell},
        "temporal_patch_size": vision["temporal_patch_size"],
    }
    return {"preprocessor_config.json": settings}


GLM_OCR = Family(
    specials=(*CHAT_TOKENS, IMAGE, IMAGE_START, IMAGE_END, VIDEO, VIDEO_START, VIDEO_END),
    tokens=MappingProxyType(
        {
            "image_token_id": IMAGE,
            "image_start_token_id": IMAGE_START,
            "image_end_token_id": IMAGE_END,
            "video_token_id": VIDEO,
            "video_start_token_id": VIDEO_START,
            "video_end_token_id": VIDEO_END,
        }
    ),
    named_tokens=MappingProxyType({"image_token": IMAGE, "video_token": VIDEO}),
    image_markup=f"{IMAGE_START}{IMAGE}{IMAGE_END}",
    adjust=_adjust,
    processor=_processor,
)

SIDE = 6
"""Positions per side of the tower's table: fewer than a picture has, so that they are resampled."""


def _adjust_4v(config: Json, source: Json) -> Json:
    config = _adjust(config, source)
    vision = config["vision_config"]
    vision["image_size"] = SIDE * vision["patch_size"]
    text = config["text_config"]
    # Half of each head is rotated, its frequencies shared out as in the release.
    head = text.get("head_dim", text["hidden_size"] // text["num_attention_heads"])
    text["partial_rotary_factor"] = 0.5
    text["rope_scaling"]["mrope_section"] = [head // 4 - 2 * (head // 12), *(2 * [head // 12])]
    return config


def _processor_4v(config: Json) -> Files:
    (name, settings), *_ = _processor(config).items()
    kinds = {"image_processor_type": "Glm4vImageProcessor", "processor_class": "Glm4vProcessor"}
    return {name: settings | kinds}


GLM4V = replace(GLM_OCR, adjust=_adjust_4v, processor=_processor_4v)

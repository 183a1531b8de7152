"""dots.ocr: Qwen2-VL's pictures without frames, between marks of its own."""

from types import MappingProxyType
from typing import Final

from validate.twin.family import CHAT_TOKENS, Family, Files, Json

IMAGE: Final = "<|imgpad|>"
VIDEO: Final = "<|video_pad|>"
MARKS: Final = ("<|img|>", "<|endofimg|>")
WIDTH: Final = 64


def _adjust(config: Json, source: Json) -> Json:
    del source
    config["vision_config"].update(embed_dim=WIDTH, hidden_size=config["hidden_size"])
    return config


def _processor(config: Json) -> Files:
    vision = config["vision_config"]
    settings = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_pixels": 11289600,
        "merge_size": vision["spatial_merge_size"],
        "min_pixels": 3136,
        "patch_size": vision["patch_size"],
        "processor_class": "DotsVLProcessor",
        "resample": 3,
        "size": {"longest_edge": 11289600, "shortest_edge": 3136},
        "temporal_patch_size": vision["temporal_patch_size"],
    }
    return {"preprocessor_config.json": settings}


FAMILY: Final = Family(
    specials=(*CHAT_TOKENS, *MARKS, IMAGE, VIDEO),
    tokens=MappingProxyType({"image_token_id": IMAGE, "video_token_id": VIDEO}),
    image_markup=f"{MARKS[0]}{IMAGE}{MARKS[1]}",
    adjust=_adjust,
    processor=_processor,
)

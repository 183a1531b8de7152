"""PaddleOCR-VL: pictures of any size in patches, between marks of their own."""

from types import MappingProxyType
from typing import Final

from validate.twin.family import CHAT_TOKENS, Family, Files, Json

IMAGE: Final = "<|IMAGE_PLACEHOLDER|>"
VIDEO: Final = "<|video_pad|>"
MARKS: Final = ("<|IMAGE_START|>", "<|IMAGE_END|>")


def _processor(config: Json) -> Files:
    vision = config["vision_config"]
    patch, merge = vision["patch_size"], vision["spatial_merge_size"]
    cell = (patch * merge) ** 2
    settings = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "PaddleOCRVLImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "max_pixels": 32 * cell,
        "merge_size": merge,
        "min_pixels": 4 * cell,
        "patch_size": patch,
        "processor_class": "PaddleOCRVLProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "temporal_patch_size": 1,
    }
    return {"preprocessor_config.json": settings}


FAMILY: Final = Family(
    specials=(*CHAT_TOKENS, *MARKS, IMAGE, VIDEO),
    tokens=MappingProxyType(
        {
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "vision_start_token_id": MARKS[0],
            "vision_end_token_id": MARKS[1],
            "pad_token_id": "<|endoftext|>",
        }
    ),
    named_tokens=MappingProxyType({"image_token": IMAGE}),
    image_markup=f"{MARKS[0]}{IMAGE}{MARKS[1]}",
    pinned=MappingProxyType(
        {
            "hidden_size": "the runtime's projector has it in its code",
            "vision_config.layer_norm_eps": "the runtime's layers have it in their code",
        }
    ),
    processor=_processor,
)

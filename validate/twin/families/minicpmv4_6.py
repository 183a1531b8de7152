"""MiniCPM-V 4.6 and 4.7: Qwen 3.5 text, SigLIP with a window merger inside, sliced images."""

from dataclasses import replace
from types import MappingProxyType

from validate.twin.family import CHAT_TOKENS, Family, Files, Json

IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
NAMED = {
    "image_id_end_token": "</image_id>",
    "image_id_start_token": "<image_id>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "image_token": IMAGE,
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "video_token": VIDEO,
}
SPECIALS = (*CHAT_TOKENS, *NAMED.values())
PREFIXES = {"minicpmv4_6": "MiniCPMV4_6", "minicpmv4_7": "MiniCPMV4_7"}
# Patches per side: of the position grid (no power of two, so that bucketing rounds) and of a slice.
POSITION_SIDE = 10
SLICE_SIDE = 8
MAX_SLICES = 4


def _adjust(config: Json, source: Json) -> Json:
    del source
    vision = config["vision_config"]
    patch = vision["patch_size"]
    vision["image_size"] = POSITION_SIDE * patch
    config["image_size"] = SLICE_SIDE * patch
    # Neither the first layer nor the last, so that both sides of the window merger have layers.
    config["insert_layer_id"] = 1
    if "insert_layer_id" in vision:
        vision["insert_layer_id"] = 1
    return config


MARKERS = {
    "image_start_id": "<image>",
    "image_end_id": "</image>",
    "slice_start_id": "<slice>",
    "slice_end_id": "</slice>",
}
NEWLINE = 198
"""The line feed among the 256 bytes that the twin's tokenizer numbers first."""


def _adjust_4_7(config: Json, source: Json) -> Json:
    """Name the markers by the twin's ids, which lie around the picture token's."""
    config = _adjust(config, source)
    first = config["image_token_id"] - SPECIALS.index(IMAGE)
    for name, token in MARKERS.items():
        config[name] = first + SPECIALS.index(token)
    config["newline_id"] = NEWLINE
    return config


def _processor(config: Json) -> Files:
    name = PREFIXES[config["model_type"]]
    patch = config["vision_config"]["patch_size"]
    common = {
        "downsample_mode": config.get("downsample_mode", "16x"),
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "max_slice_nums": MAX_SLICES,
        "norm_mean": [0.5, 0.5, 0.5],
        "norm_std": [0.5, 0.5, 0.5],
        "patch_size": patch,
        "processor_class": f"{name}Processor",
        "scale_resolution": SLICE_SIDE * patch,
        "slice_mode": True,
        "use_image_id": True,
    }
    return {
        "preprocessor_config.json": common | {"image_processor_type": "MiniCPMV4_6ImageProcessor"},
        "video_preprocessor_config.json": common
        | {"max_num_frames": 4, "video_processor_type": "MiniCPMV4_6VideoProcessor"},
    }


FAMILY = Family(
    tokenizer_class="Qwen2Tokenizer",
    specials=SPECIALS,
    tokens=MappingProxyType({"image_token_id": IMAGE, "video_token_id": VIDEO}),
    named_tokens=MappingProxyType(NAMED),
    image_markup=f"{IMAGE}\n",
    video_markup=f"{VIDEO}\n",
    pinned=MappingProxyType(
        {
            "vision_config.layer_norm_eps": "the final merger has 1e-6 in its code, not its config",
        }
    ),
    adjust=_adjust,
    processor=_processor,
)

V4_7 = replace(FAMILY, adjust=_adjust_4_7)

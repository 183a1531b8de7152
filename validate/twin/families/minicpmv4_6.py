"""MiniCPM-V 4.6: Qwen 3.5 text part, SigLIP tower with a window merger inside, sliced images."""

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


def _processor(config: Json) -> Files:
    patch = config["vision_config"]["patch_size"]
    common = {
        "downsample_mode": config.get("downsample_mode", "16x"),
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "max_slice_nums": MAX_SLICES,
        "norm_mean": [0.5, 0.5, 0.5],
        "norm_std": [0.5, 0.5, 0.5],
        "patch_size": patch,
        "processor_class": "MiniCPMV4_6Processor",
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
    specials=(*CHAT_TOKENS, *NAMED.values()),
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

"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: Qwen's picture tokens, towers of their own."""

from dataclasses import replace

from validate.twin.families.qwen import QWEN3_5
from validate.twin.family import Files, Json


def _adjust(config: Json, source: Json) -> Json:
    vision = config["vision_config"]
    width = config.get("text_config", config)["hidden_size"]
    if "embed_dim" in vision:
        vision["embed_dim"], vision["hidden_size"] = vision["hidden_size"], width
        vision["mlp_ratio"] = 2
    else:
        vision["out_hidden_size"] = width
    if "fullatt_block_indexes" in vision:
        vision["fullatt_block_indexes"] = [vision["depth"] - 1]
    for name in ("rope_scaling", "rope_parameters"):
        settings = config.get("text_config", config).get(name)
        if settings and "mrope_section" in settings:
            settings["mrope_section"] = [4, 6, 6]
    del source
    return config


def _processor(config: Json) -> Files:
    vision = config["vision_config"]
    patch, merge = vision["patch_size"], vision["spatial_merge_size"]
    cell = (patch * merge) ** 2
    kind = "Qwen2_5_VLProcessor" if config["model_type"] == "qwen2_5_vl" else "Qwen2VLProcessor"
    return {
        "preprocessor_config.json": {
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_processor_type": "Qwen2VLImageProcessor",
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "max_pixels": 32 * cell,
            "merge_size": merge,
            "min_pixels": 4 * cell,
            "patch_size": patch,
            "processor_class": kind,
            "temporal_patch_size": vision["temporal_patch_size"],
        }
    }


QWEN2_VL = replace(QWEN3_5, adjust=_adjust, processor=_processor)

"""GLM-OCR, GLM-4.1V, 4.5V and 5.3: GLM's picture tokens, patches merged two by two."""

from dataclasses import replace
from types import MappingProxyType

from validate.twin.families.moe import INDEXER, LATENT
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


def _adjust_next(config: Json, source: Json) -> Json:
    """A dense layer, two periods of attention, and so few tokens chosen that prompts have more."""
    config = _adjust(config, source)
    config["vision_config"] |= {"projection_intermediate_size": 320, "swiglu_limit": 0.5}
    text = config["text_config"]
    kinds = ["linear_attention", "linear_attention", "deepseek_sparse_attention"]
    layers = 2 * len(kinds)
    text |= {"num_hidden_layers": layers, "layer_types": 2 * kinds}
    text |= {"mlp_layer_types": ["dense"] + ["sparse"] * (layers - 1), "first_k_dense_replace": 1}
    text |= {"indexer_types": ["full"] * layers, "swiglu_limit": 0.5}
    text |= LATENT | {"qk_rope_head_dim": 0, "qk_head_dim": LATENT["qk_nope_head_dim"]}
    text |= INDEXER
    delta = [index for index in range(layers) if text["layer_types"][index] == kinds[0]]
    text["linear_attn_config"] |= {
        **{"num_heads": 3, "head_dim": 64, "gate_lower_bound": -4.0, "kda_layers": delta},
        "full_attn_layers": [index for index in range(layers) if index not in delta],
    }
    return config


def _processor_next(config: Json) -> Files:
    vision = config["vision_config"]
    settings = {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "merge_size": vision["spatial_merge_size"],
        "patch_expand_factor": 1,
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        # The release's: the runtime's loader puts a processor with these in the place of any.
        "min_image_tokens": 16,
    }
    image = settings | {"image_processor_type": "Glm5NextImageProcessor", "max_image_tokens": 8000}
    video = settings | {
        **{"video_processor_type": "Glm5NextVideoProcessor", "max_image_tokens": 240000},
        "fps": 2,
    }
    joined = {"processor_class": "Glm5NextProcessor"}
    return {
        "processor_config.json": joined | {"image_processor": image, "video_processor": video},
    }


GLM5_NEXT = replace(
    GLM_OCR,
    adjust=_adjust_next,
    processor=_processor_next,
    video_markup=f"{VIDEO_START}{VIDEO}{VIDEO_END}",
)

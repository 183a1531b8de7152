"""Kimi's pictures: patches of any grid joined two by two, and DeepSeek's latent attention."""

from types import MappingProxyType

from validate.twin.families.moe import LATENT
from validate.twin.family import CHAT_TOKENS, Family, Files, Json

IMAGE, START, END = "<|media_pad|>", "<|media_begin|>", "<|media_end|>"
SIDE = 6
"""Positions per side of the tower's table: no picture's grid, so that they are resampled."""


def _adjust(config: Json, source: Json) -> Json:
    del source
    config["text_config"] |= LATENT
    vision = config["vision_config"]
    vision.update(pos_emb_height=SIDE, pos_emb_width=SIDE)
    config["projection_hidden_size"] = vision["hidden_size"]
    return config


def _processor(config: Json) -> Files:
    vision = config["vision_config"]
    media = {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "in_patch_limit": 64,
        "merge_kernel_size": 2,
        "patch_limit_on_one_side": 16,
        "patch_size": vision["patch_size"],
    }
    settings = {
        "image_processor_type": "Kimi_K25ImageProcessor",
        "media_proc_cfg": media,
        "processor_class": "Kimi_K25Processor",
        **{name: media[name] for name in ("image_mean", "image_std", "patch_size")},
    }
    return {"preprocessor_config.json": settings}


FAMILY = Family(
    specials=(*CHAT_TOKENS, IMAGE, START, END),
    tokens=MappingProxyType(
        {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END}
    ),
    named_tokens=MappingProxyType({"image_token": IMAGE}),
    image_markup=f"{START}{IMAGE}{END}",
    pinned=MappingProxyType(
        {"projection_layer_norm_eps": "the runtime has 1e-5 in its code, as all releases"}
    ),
    adjust=_adjust,
    processor=_processor,
)


def _adjust_vl(config: Json, source: Json) -> Json:
    del source
    config["text_config"] |= LATENT | {"q_lora_rank": None}
    vision = config["vision_config"]
    vision.update(init_pos_emb_height=SIDE, init_pos_emb_width=SIDE)
    # What the release leaves to defaults of its own size is stated here.
    vision.update(
        depth=vision["num_hidden_layers"],
        embed_dim=vision["hidden_size"],
        num_heads=vision["num_attention_heads"],
    )
    return config


def _vl_files(config: Json) -> Files:
    settings = {
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "KimiVLImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "in_token_limit": 64,
        "merge_kernel_size": [2, 2],
        "pad_input": True,
        "patch_size": config["vision_config"]["patch_size"],
        "processor_class": "KimiVLProcessor",
    }
    return {"preprocessor_config.json": settings}


VL = Family(
    specials=(*CHAT_TOKENS, IMAGE, START, END),
    tokens=MappingProxyType({"media_placeholder_token_id": IMAGE}),
    named_tokens=MappingProxyType({"image_token": IMAGE}),
    image_markup=f"{START}{IMAGE}{END}",
    adjust=_adjust_vl,
    processor=_vl_files,
)

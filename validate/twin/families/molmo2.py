"""Molmo, Molmo 2 and MolmoPoint: overlapping crops, with markers in a vocabulary of their own."""

from dataclasses import replace
from types import MappingProxyType

from validate.twin.family import CHAT_TOKENS, Family, Files, Json

IMAGE, VIDEO = "<|image|>", "<|video|>"
MARKERS = {
    "image_start_token_id": "<im_start>",
    "image_end_token_id": "<im_end>",
    "image_patch_id": "<im_patch>",
    "image_col_id": "<im_col>",
    "low_res_image_start_token_id": "<low_res_im_start>",
    "image_low_res_id": "<im_low>",
    "frame_start_token_id": "<frame_start>",
    "frame_end_token_id": "<frame_end>",
}
SPECIALS = (*CHAT_TOKENS, IMAGE, VIDEO, *MARKERS.values())
POINTING = (*SPECIALS, "<POINT_PATCH>", "<POINT_SUBPATCH>", "<POINT_LOCATION>")
ADDED = 256
"""Rows of the second table: half of all, because that is where transformers 5 cuts the two."""


POINTS = {
    "image_non_indexable_patch_id": "<im_low>",
    "patch_token_id": "<POINT_PATCH>",
    "subpatch_token_id": "<POINT_SUBPATCH>",
    "location_token_id": "<POINT_LOCATION>",
}


def _adjust_point(config: Json, source: Json) -> Json:
    first = config["image_start_token_id"] - POINTING.index("<im_start>")
    config = _adjust(config, source)
    for name, token in (MARKERS | POINTS).items():
        if name in config:
            config[name] = first + POINTING.index(token)
    config["image_high_res_id"] = config["image_patch_id"]
    config["patch_embed_dim"] = 64
    return config


def _adjust(config: Json, source: Json) -> Json:
    del source
    text, adapter = config["text_config"], config["adapter_config"]
    text["vocab_size"] -= ADDED
    text["additional_vocab_size"] = ADDED
    first = config["image_start_token_id"] - SPECIALS.index("<im_start>")
    for name, token in MARKERS.items():
        if name in config:
            config[name] = first + SPECIALS.index(token)
    config["image_high_res_id"] = config["image_patch_id"]
    vit = config["vit_config"]
    # A tower one layer deeper than what is read, as published.
    vit["num_hidden_layers"] = 4
    adapter["vit_layers"] = [-2, -4]
    for section in (vit, adapter):
        section.update(head_dim=16, hidden_size=64, num_attention_heads=4, num_key_value_heads=4)
        section["intermediate_size"] = 128
    adapter["text_hidden_size"] = text["hidden_size"]
    return config


def _processor(config: Json) -> Files:
    """The released settings: the runtime's loader takes no others."""
    vit = config["vit_config"]
    side = vit["image_default_input_size"][0]
    images = {
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Molmo2ImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "max_crops": 8,
        "overlap_margins": [4, 4],
        "patch_size": vit["image_patch_size"],
        "pooling_size": [2, 2],
        "processor_class": "Molmo2Processor",
        "resample": 2,
        "size": {"height": side, "width": side},
    }
    settings = {
        "image_use_col_tokens": True,
        "processor_class": "Molmo2Processor",
        "use_frame_special_tokens": True,
        "use_single_crop_start_token": True,
        "video_use_col_tokens": False,
    }
    return {"preprocessor_config.json": images, "processor_config.json": settings}


FAMILY = Family(
    tokenizer_class="Qwen2Tokenizer",
    specials=SPECIALS,
    tokens=MappingProxyType(MARKERS),
    named_tokens=MappingProxyType({"image_token": IMAGE, "video_token": VIDEO}),
    image_markup=IMAGE,
    adjust=_adjust,
    processor=_processor,
)

POINT = replace(
    FAMILY,
    specials=POINTING,
    tokens=MappingProxyType(MARKERS | POINTS),
    adjust=_adjust_point,
)


FIRST_SIDE = 4
"""Patches per side of a crop of the first Molmo, and what it is called on both ends."""


def _adjust_first(config: Json, source: Json) -> Json:
    """A small tower, whose sizes the release has in its code."""
    del source
    config["embedding_size"] = config["vocab_size"]
    config["intermediate_size"] = 320
    config["vision_config"] = {
        "image_default_input_size": [FIRST_SIDE * 14, FIRST_SIDE * 14],
        "image_emb_dim": 64,
        "image_head_dim": 16,
        "image_mlp_dim": 128,
        "image_num_heads": 4,
        "image_num_key_value_heads": 4,
        "image_num_layers": 9,
        "image_patch_size": 14,
    }
    # Where the stock loader looks, which finds the release's own sizes as its defaults.
    config["vision_config"] |= {
        "d_model": config["hidden_size"],
        "hidden_size": config["intermediate_size"] // 2,
        "image_num_pos": FIRST_SIDE**2 + 1,
    }
    config["text_config"] = {
        "d_model": config["hidden_size"],
        "embedding_size": config["vocab_size"],
        "mlp_hidden_size": config["intermediate_size"],
        "model_type": "molmo",
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "n_layers": config["num_hidden_layers"],
        "vocab_size": config["vocab_size"],
    }
    return config


def _first_files(config: Json) -> Files:
    side = config["vision_config"]["image_default_input_size"]
    settings = {
        "base_image_input_size": side,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_padding_mask": True,
        "image_patch_size": 14,
        "image_processor_type": "MolmoImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_token_length_h": FIRST_SIDE // 2,
        "image_token_length_w": FIRST_SIDE // 2,
        "max_crops": 2,
        "overlap_margins": [1, 1],
        "processor_class": "MolmoProcessor",
    }
    return {"preprocessor_config.json": settings}


FIRST = Family(
    tokenizer_class="Qwen2Tokenizer",
    specials=(*CHAT_TOKENS, "<im_patch>", "<im_col>", "<im_start>", "<im_end>", IMAGE),
    image_markup=f"{IMAGE}",
    adjust=_adjust_first,
    processor=_first_files,
)

"""Muse Glimmer: patches in windows, merged two by two, and positions in windowed layers only."""

from types import MappingProxyType

from validate.twin.family import CHAT_TOKENS, Family, Files, Json

IMAGE, START, END = "<|patch|>", "<|image_start|>", "<|image_end|>"
VIDEO = ("<|video|>", "<|vid_start|>", "<|vid_end|>", "<|vid_frame_separator|>")
WINDOW_SIDE = 4
"""Patches per side of a window and of the table of positions: less than a picture has."""
TOKENS = 24


def _adjust(config: Json, source: Json) -> Json:
    del source
    text, vision = config["text_config"], config["vision_config"]
    base = text["rope_parameters"]["rope_theta"]
    text["layer_rope_theta"] = [base if theta else 0 for theta in text["layer_rope_theta"]]
    vision["pos_emb_height"] = vision["pos_emb_width"] = WINDOW_SIDE
    vision["layer_types"][-1] = "full_attention"
    config["out_hidden_size"] = vision["hidden_size"] * vision["merge_size"] ** 2
    config["projector_hidden_size"] = 192
    return config


def _processor(config: Json) -> Files:
    vision = config["vision_config"]
    images = {
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "MuseGlimmerImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "max_image_tokens": TOKENS,
        "merge_size": vision["merge_size"],
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["patch_temporal"],
    }
    name = "MuseGlimmerProcessor"
    return {"processor_config.json": {"image_processor": images, "processor_class": name}}


FAMILY = Family(
    specials=(*CHAT_TOKENS, IMAGE, START, END, *VIDEO),
    tokens=MappingProxyType({"image_token_id": IMAGE, "video_token_id": VIDEO[0]}),
    image_markup=IMAGE,
    pinned=MappingProxyType(
        {"vision_config.layer_norm_eps": "the reference has 1e-5 in the layers' code"}
    ),
    adjust=_adjust,
    processor=_processor,
)

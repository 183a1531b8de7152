"""Granite Vision 3 and 4: pictures cut into square tiles, the tower read at several depths."""

from types import MappingProxyType

from validate.twin.families.llava import IMAGE, SIDE, small_pictures, small_text
from validate.twin.family import CHAT_TOKENS, Family, Files, Json


def _adjust(config: Json, source: Json) -> Json:
    del source
    config = small_pictures(small_text(config))
    vision = config["vision_config"]
    size = vision["image_size"]
    config["image_grid_pinpoints"] = [[size * a, size * b] for a in (1, 2) for b in (1, 2)]
    config["image_seq_length"] = SIDE**2
    # As many depths as the release reads, the last one included.
    depths = config["vision_feature_layer"]
    config["vision_feature_layer"] = [-1 - index for index in reversed(range(len(depths)))]
    return config


def _adjust_4(config: Json, source: Json) -> Json:
    """As many projectors as in the release, each with a text layer of its own."""
    del source
    text, vision = config["text_config"], config["vision_config"]
    window = int(config["downsample_rate"].split("/")[1])
    size = vision["image_size"] = window * vision["patch_size"]
    config["image_grid_pinpoints"] = [[size * a, size * b] for a in (1, 2) for b in (1, 2)]
    pairs, corners = config["deepstack_layer_map"], config["spatial_target_layers"]
    text["num_hidden_layers"] = len(pairs) + len(corners)
    depths = vision["num_hidden_layers"] + 1
    config["deepstack_layer_map"] = [
        [-1 - index % depths, len(pairs) - 1 - index] for index in range(len(pairs))
    ]
    config["spatial_target_layers"] = [len(pairs) + index for index in range(len(corners))]
    return config


def _processor(config: Json) -> Files:
    size = config["vision_config"]["image_size"]
    images = {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_pad": True,
        "image_grid_pinpoints": config["image_grid_pinpoints"],
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "LlavaNextImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "LlavaNextProcessor",
        "resample": 3,
        "size": {"height": size, "width": size},
    }
    settings = {
        "image_token": IMAGE,
        "num_additional_image_tokens": 0,
        "patch_size": config["vision_config"]["patch_size"],
        "processor_class": "LlavaNextProcessor",
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
    }
    return {"preprocessor_config.json": images, "processor_config.json": settings}


def _processor_4(config: Json) -> Files:
    files = _processor(config)
    for content in files.values():
        content["processor_class"] = "Granite4VisionProcessor"
    files["processor_config.json"]["downsample_rate"] = config["downsample_rate"]
    return files


FAMILY = Family(
    specials=(*CHAT_TOKENS, IMAGE),
    tokens=MappingProxyType({"image_token_index": IMAGE, "bos_token_id": "<|endoftext|>"}),
    named_tokens=MappingProxyType({"image_token": IMAGE}),
    image_markup=f"{IMAGE}\n",
    adjust=_adjust,
    processor=_processor,
)

GRANITE4 = Family(
    specials=(*CHAT_TOKENS, IMAGE),
    tokens=MappingProxyType({"image_token_index": IMAGE, "bos_token_id": "<|endoftext|>"}),
    named_tokens=MappingProxyType({"image_token": IMAGE}),
    image_markup=f"{IMAGE}\n",
    adjust=_adjust_4,
    processor=_processor_4,
)

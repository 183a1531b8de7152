"""LLaVA and its kin: an image token that the processor repeats once per patch."""

from dataclasses import replace
from types import MappingProxyType

from validate.twin.family import CHAT_TOKENS, Family, Files, Json

IMAGE = "<image>"
SIDE = 6
"""Patches per side of the twin's pictures."""
STACK = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
}
"""A small text stack, where the source leaves its sizes to the reference's defaults."""


def small_text(config: Json) -> Json:
    """Fill in the sizes that the source does not state."""
    text = config["text_config"]
    for name, value in STACK.items():
        text.setdefault(name, value)
    return config


def small_pictures(config: Json) -> Json:
    """Cut the tower's pictures to a few patches."""
    vision = config["vision_config"]
    vision["image_size"] = SIDE * vision["patch_size"]
    return config


def clip_images(config: Json, processor: str) -> Json:
    """CLIP's image processor: resize the short edge, cut out the centre."""
    size = config["vision_config"]["image_size"]
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "processor_class": processor,
        "resample": 3,
        "size": {"shortest_edge": size},
    }


def _adjust(config: Json, source: Json) -> Json:
    del source
    return small_pictures(small_text(config))


def _processor(config: Json) -> Files:
    settings = {
        "image_token": IMAGE,
        "num_additional_image_tokens": 1,
        "patch_size": config["vision_config"]["patch_size"],
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
    }
    return {
        "preprocessor_config.json": clip_images(config, "LlavaProcessor"),
        "processor_config.json": settings,
    }


LLAVA = Family(
    add_bos=True,
    specials=("<s>", *CHAT_TOKENS, IMAGE),
    tokens=MappingProxyType(
        {"bos_token_id": "<s>", "image_token_index": IMAGE, "pad_token_id": "<|endoftext|>"}
    ),
    named_tokens=MappingProxyType({"image_token": IMAGE}),
    image_markup=f"{IMAGE}\n",
    adjust=_adjust,
    processor=_processor,
)


VIDEO = "<video>"
"""LLaVA-OneVision's mark for a video."""


def _adjust_onevision(config: Json, source: Json) -> Json:
    config = _adjust(config, source)
    size = config["vision_config"]["image_size"]
    config["image_grid_pinpoints"] = [[size * a, size * b] for a in (1, 2) for b in (1, 2)]
    return config


def _onevision_files(config: Json) -> Files:
    size = config["vision_config"]["image_size"]
    images = {
        "do_pad": True,
        "image_grid_pinpoints": config["image_grid_pinpoints"],
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "LlavaOnevisionProcessor",
        "resample": 3,
        "size": {"height": size, "width": size},
    }
    settings = {
        "image_token": IMAGE,
        "num_image_tokens": SIDE**2,
        "processor_class": "LlavaOnevisionProcessor",
        "video_token": VIDEO,
        "vision_aspect_ratio": config["vision_aspect_ratio"],
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
    }
    same = ("do_pad", "image_mean", "image_std", "processor_class", "resample", "size")
    video = {name: images[name] for name in same}
    video["video_processor_type"] = "LlavaOnevisionVideoProcessor"
    return {
        "preprocessor_config.json": images,
        "processor_config.json": settings,
        "video_preprocessor_config.json": video,
    }


ONEVISION = Family(
    specials=(*CHAT_TOKENS, IMAGE, VIDEO),
    tokens=MappingProxyType({"image_token_index": IMAGE, "video_token_index": VIDEO}),
    named_tokens=MappingProxyType({"image_token": IMAGE, "video_token": VIDEO}),
    image_markup=f"{IMAGE}\n",
    video_markup=f"{VIDEO}\n",
    adjust=_adjust_onevision,
    processor=_onevision_files,
)


def _adjust_next(config: Json, source: Json) -> Json:
    config = _adjust(config, source)
    size = config["vision_config"]["image_size"]
    config["image_grid_pinpoints"] = [[size * a, size * b] for a in (1, 2) for b in (1, 2)]
    return config


def _next_files(config: Json) -> Files:
    size = config["vision_config"]["image_size"]
    images = clip_images(config, "LlavaNextProcessor") | {
        "do_pad": True,
        "image_grid_pinpoints": config["image_grid_pinpoints"],
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": size},
    }
    settings = _processor(config)["processor_config.json"]
    return {
        "preprocessor_config.json": images,
        "processor_config.json": settings | {"processor_class": "LlavaNextProcessor"},
    }


NEXT = replace(LLAVA, adjust=_adjust_next, processor=_next_files)


def _adjust_bunny(config: Json, source: Json) -> Json:
    """A small tower of as many patches as the runtime takes, whose facts no release states."""
    del source
    config["mm_hidden_size"] = 64
    config["auto_map"] = {}  # the stock loader asks for the key
    config["vision_config"] = {
        "hidden_size": 64,
        "image_size": 27 * 14,
        "intermediate_size": 128,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "patch_size": 14,
    }
    return config


BUNNY = Family(
    tokenizer_class="Qwen2Tokenizer",
    specials=(*CHAT_TOKENS, "<image>"),
    image_markup="<image>\n",
    adjust=_adjust_bunny,
    processor=lambda config: {
        "preprocessor_config.json": {
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "SiglipImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "resample": 3,
            "size": {"height": 378, "width": 378},
        }
    },
)

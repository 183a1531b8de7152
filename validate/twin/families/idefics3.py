"""Idefics 2, 3 and SmolVLM: pictures cut into tiles, each between markers."""

from types import MappingProxyType

from validate.twin.families.llava import SIDE, small_pictures, small_text
from validate.twin.family import CHAT_TOKENS, Family, Files, Json

IMAGE, AROUND, WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"
NAMES = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}


def _adjust(config: Json, source: Json) -> Json:
    del source
    config = small_pictures(small_text(config))
    vision = config["vision_config"]
    vision["image_size"] = _side(config) * vision["patch_size"]
    for name, value in {"max_image_size": 1, "size": 2}.items():
        if name in vision:
            vision[name] = {"longest_edge": value * vision["image_size"]}
    return config


def _side(config: Json) -> int:
    """Patches per side of a tile: a multiple of those that become one token."""
    scale: int = config["scale_factor"]
    return SIDE if SIDE % scale == 0 else 2 * scale


def _processor(config: Json) -> Files:
    vision, name = config["vision_config"], NAMES[config["model_type"]]
    tile = vision["image_size"]
    images = {
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": f"{name}ImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "max_image_size": {"longest_edge": tile},
        "processor_class": f"{name}Processor",
        "resample": 1,
        "size": {"longest_edge": 2 * tile},
    }
    length = (_side(config) // config["scale_factor"]) ** 2
    return {
        "preprocessor_config.json": images,
        "processor_config.json": {
            "image_seq_len": length,
            "processor_class": f"{name}Processor",
        },
    }


FAMILY = Family(
    specials=(*CHAT_TOKENS, IMAGE, AROUND, WHOLE, "<end_of_utterance>"),
    tokens=MappingProxyType({"image_token_id": IMAGE}),
    named_tokens=MappingProxyType(
        {
            "end_of_utterance_token": "<end_of_utterance>",
            "fake_image_token": AROUND,
            "global_image_token": WHOLE,
            "image_token": IMAGE,
        }
    ),
    image_markup=IMAGE,
    adjust=_adjust,
    processor=_processor,
)


LATENTS = 8


def _adjust_2(config: Json, source: Json) -> Json:
    """A resampler with an epsilon of its own, heads in groups, and a width of its own heads."""
    del source
    config = small_pictures(small_text(config))
    text = config["text_config"]
    config["perceiver_config"].update(
        hidden_size=text["hidden_size"],
        num_key_value_heads=2,
        resampler_depth=2,
        resampler_head_dim=48,
        resampler_n_heads=4,
        resampler_n_latents=LATENTS,
        rms_norm_eps=4 * text["rms_norm_eps"],
    )
    return config


def _processor_2(config: Json) -> Files:
    side = config["vision_config"]["image_size"]
    images = {
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Idefics2ImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Idefics2Processor",
        "resample": 2,
        "size": {"longest_edge": side, "shortest_edge": side // 2},
    }
    settings = {"image_seq_len": LATENTS, "processor_class": "Idefics2Processor"}
    return {"preprocessor_config.json": images, "processor_config.json": settings}


IDEFICS2 = Family(
    add_bos=True,
    specials=("<s>", *CHAT_TOKENS, IMAGE, AROUND, "<end_of_utterance>"),
    tokens=MappingProxyType({"image_token_id": IMAGE, "pad_token_id": "<|endoftext|>"}),
    named_tokens=MappingProxyType({"image_boundary_token": AROUND, "image_token": IMAGE}),
    image_markup=IMAGE,
    adjust=_adjust_2,
    processor=_processor_2,
)

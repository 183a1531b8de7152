"""Idefics3 and SmolVLM: pictures cut into square tiles, each between markers."""

from types import MappingProxyType

from validate.twin.families.llava import SIDE, small_pictures, small_text
from validate.twin.family import CHAT_TOKENS, Family, Files, Json

IMAGE, AROUND, WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"
NAMES = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}


def _adjust(config: Json, source: Json) -> Json:
    del source
    config = small_pictures(small_text(config))
    vision = config["vision_config"]
    for name, value in {"max_image_size": 1, "size": 2}.items():
        if name in vision:
            vision[name] = {"longest_edge": value * vision["image_size"]}
    return config


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
    length = (SIDE // config["scale_factor"]) ** 2
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

"""Llama 3.2 Vision: one token for a picture, whose tiles some layers attend to."""

from types import MappingProxyType

from validate.twin.family import CHAT_TOKENS, Family, Files, Json

BOS, IMAGE = "<|begin_of_text|>", "<|image|>"
SIDE = 4
"""Patches per side of a tile."""
CROSSING = (1, 3)


def _adjust(config: Json, source: Json) -> Json:
    del source
    text, vision = config["text_config"], config["vision_config"]
    text.update(num_hidden_layers=5, cross_attention_layers=list(CROSSING))
    read = [0, vision["num_hidden_layers"] - 1]
    vision.update(
        attention_heads=4,
        image_size=SIDE * vision["patch_size"],
        intermediate_layers_indices=read,
        num_global_layers=2,
        vision_output_dim=vision["hidden_size"] * (1 + len(read)),
    )
    return config


def _processor(config: Json) -> Files:
    vision = config["vision_config"]
    size = vision["image_size"]
    return {
        "preprocessor_config.json": {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_processor_type": "MllamaImageProcessor",
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "max_image_tiles": vision["max_num_tiles"],
            "processor_class": "MllamaProcessor",
            "resample": 2,
            "size": {"height": size, "width": size},
        }
    }


FAMILY = Family(
    silent_bos=BOS,
    specials=(BOS, *CHAT_TOKENS, IMAGE),
    tokens=MappingProxyType({"bos_token_id": BOS, "image_token_index": IMAGE}),
    named_tokens=MappingProxyType({"image_token": IMAGE}),
    image_markup=IMAGE,
    pinned=MappingProxyType(
        {"vision_config.norm_eps": "the tower's outer norms have 1e-5 in their code"}
    ),
    adjust=_adjust,
    processor=_processor,
)

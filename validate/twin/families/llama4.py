"""Llama 4: one tile of a picture, chunks and temperature steps that the prompts outgrow."""

from types import MappingProxyType

from validate.twin.family import CHAT_TOKENS, Family, Files, Json

BOS, IMAGE, PATCH = "<|begin_of_text|>", "<|image|>", "<|patch|>"
START, END = "<|image_start|>", "<|image_end|>"
TILE_X, TILE_Y = "<|tile_x_separator|>", "<|tile_y_separator|>"
LAYERS, PERIOD = 8, 4
SIDE = 4
"""Patches per side of a tile."""


def small_stack(text: Json) -> None:
    """Two periods of layers, with chunks and temperature steps of a few tokens."""
    text["num_hidden_layers"] = LAYERS
    if text.get("no_rope_layers"):
        text["no_rope_layers"] = [int((index + 1) % PERIOD != 0) for index in range(LAYERS)]
    for name, size in (("attention_chunk_size", 24), ("floor_scale", 8)):
        if name in text:
            text[name] = size


def _adjust(config: Json, source: Json) -> Json:
    del source
    text, vision = config["text_config"], config["vision_config"]
    small_stack(text)
    text["intermediate_size_mlp"] = 320
    width = vision["hidden_size"]
    vision.update(
        image_size=SIDE * vision["patch_size"],
        # What pixel shuffling makes of a patch's width.
        intermediate_size=4 * width,
        projector_input_dim=96,
        projector_output_dim=96,
        vision_output_dim=96,
    )
    return config


def _processor(config: Json) -> Files:
    size = config["vision_config"]["image_size"]
    images = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Llama4ImageProcessorFast",
        "image_std": [0.5, 0.5, 0.5],
        # The runtime cuts several tiles without the whole picture that the prompt announces.
        "max_patches": 1,
        "processor_class": "Llama4Processor",
        "resample": 2,
        "size": {"height": size, "width": size},
    }
    settings = {
        "fake_image_token": IMAGE,
        "image_token": IMAGE,
        "patch_size": config["vision_config"]["patch_size"],
        "processor_class": "Llama4Processor",
    }
    return {"preprocessor_config.json": images, "processor_config.json": settings}


FAMILY = Family(
    silent_bos=BOS,
    specials=(BOS, *CHAT_TOKENS, IMAGE, PATCH, START, END, TILE_X, TILE_Y),
    tokens=MappingProxyType(
        {
            "boi_token_index": START,
            "bos_token_id": BOS,
            "eoi_token_index": END,
            "image_token_index": PATCH,
        }
    ),
    image_markup=IMAGE,
    adjust=_adjust,
    processor=_processor,
)

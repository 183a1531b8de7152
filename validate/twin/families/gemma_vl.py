"""Gemma 3 and PaliGemma: pictures of one size, a fixed number of tokens each."""

from types import MappingProxyType

from validate.twin.families.llava import small_pictures, small_text
from validate.twin.family import CHAT_TOKENS, Family, Files, Json

IMAGE, START, END = "<image_soft_token>", "<start_of_image>", "<end_of_image>"
PALI_IMAGE = "<image>"
POOLED_SIDE = 2
"""Tokens per side that Gemma 3 pools a picture to."""

PICTURE_FIRST = """\
{%- for message in messages[-1:] -%}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}
{{ IMAGE }}
{%- else -%}
{{ item['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
"""
"""PaliGemma is no chat model: a prompt is one picture and what to do with it."""


def _images(config: Json, processor: str) -> Json:
    size = config["vision_config"]["image_size"]
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": processor,
        "resample": 2,
        "size": {"height": size, "width": size},
    }


def _adjust_gemma3(config: Json, source: Json) -> Json:
    del source
    config = small_pictures(small_text(config))
    config["mm_tokens_per_image"] = POOLED_SIDE**2
    text = config["text_config"]
    # Two periods of the reference's default pattern, so that both kinds of layer are there.
    text.update(num_hidden_layers=7, head_dim=64, query_pre_attn_scalar=48)
    text.update(rope_theta=70000.0, rope_local_base_freq=700.0, vocab_size=512)
    return config


def _gemma3_files(config: Json) -> Files:
    images = _images(config, "Gemma3Processor") | {"image_processor_type": "Gemma3ImageProcessor"}
    return {
        "preprocessor_config.json": images | {"image_seq_length": POOLED_SIDE**2},
        "processor_config.json": {
            "image_seq_length": POOLED_SIDE**2,
            "processor_class": "Gemma3Processor",
        },
    }


def _adjust_paligemma(config: Json, source: Json) -> Json:
    del source
    config = small_pictures(config)
    config["hidden_size"] = config["projection_dim"] = config["text_config"]["hidden_size"]
    vision = config["vision_config"]
    vision["projection_dim"] = config["text_config"]["hidden_size"]
    side = vision["image_size"] // vision["patch_size"]
    second = config["text_config"]["model_type"] == "gemma2"
    config["text_config"].update(num_image_tokens=side**2, head_dim=64 if second else 32)
    return config


def _paligemma_files(config: Json) -> Files:
    side = config["vision_config"]["image_size"] // config["vision_config"]["patch_size"]
    images = _images(config, "PaliGemmaProcessor") | {
        "image_processor_type": "SiglipImageProcessor"
    }
    return {"preprocessor_config.json": images | {"image_seq_length": side**2}}


GEMMA3 = Family(
    add_bos=True,
    specials=("<bos>", *CHAT_TOKENS, START, END, IMAGE),
    tokens=MappingProxyType(
        {"boi_token_index": START, "eoi_token_index": END, "image_token_index": IMAGE}
    ),
    named_tokens=MappingProxyType({"boi_token": START, "eoi_token": END, "image_token": IMAGE}),
    image_markup=START,
    adjust=_adjust_gemma3,
    processor=_gemma3_files,
)
PALIGEMMA = Family(
    silent_bos="<bos>",
    template=PICTURE_FIRST,
    specials=("<bos>", *CHAT_TOKENS, PALI_IMAGE),
    tokens=MappingProxyType({"bos_token_id": "<bos>", "image_token_index": PALI_IMAGE}),
    named_tokens=MappingProxyType({"image_token": PALI_IMAGE}),
    image_markup=PALI_IMAGE,
    pinned=MappingProxyType(
        {
            "text_config.sliding_window": "prompts never fill it; the reference reads a longer "
            "prompt without a picture both ways in some layers and backwards in the others",
        }
    ),
    adjust=_adjust_paligemma,
    processor=_paligemma_files,
)

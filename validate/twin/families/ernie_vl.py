"""ERNIE 4.5 VL: a SentencePiece tokenizer, and pictures between marks of their own."""

from types import MappingProxyType
from typing import Final

from validate.twin.family import CHAT_TOKENS, Family, Files, Json

MARKS: Final = ("<|IMAGE_START|>", "<|IMAGE_END|>", "<|VIDEO_START|>", "<|VIDEO_END|>")
PLACES: Final = ("<|IMAGE_PLACEHOLDER|>", "<|AUDIO_PLACEHOLDER|>")
_IN_CODE: Final = "the runtime's image processor has it in its code"


def _adjust(config: Json, source: Json) -> Json:
    """A dense layer before those with experts, fewer of these, and frequencies of three axes."""
    layers, half = 4, config["hidden_size"] // config["num_attention_heads"] // 2
    rows = half * 3 // 8
    config |= {
        **{"num_hidden_layers": layers, "moe_layer_end_index": [layers + 1, layers]},
        **{"moe_num_experts": [8, 8], "moe_intermediate_size": [128, 64], "moe_k": 3},
        "im_patch_id": config["image_token_id"],  # the release's only name of it
        "pixel_hidden_size": config["vision_config"]["hidden_size"],
        "freq_allocation": half - 2 * rows,
    }
    config["rope_scaling"]["mrope_section"] = [rows, rows, half - 2 * rows]
    config["vision_config"] |= {"embed_dim": config["vision_config"]["hidden_size"]}
    config["vision_config"]["mlp_ratio"] = 2
    del source
    return config


def _processor(config: Json) -> Files:
    vision = config["vision_config"]
    settings = {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "Ernie_45T_VLImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_pixels": 4816896,
        "merge_size": vision["spatial_merge_size"],
        "min_pixels": 3136,
        "patch_size": vision["patch_size"],
        "temporal_conv_size": config["temporal_conv_size"],
    }
    joined = {"processor_class": "Ernie4_5_VLProcessor", "spatial_conv_size": 2}
    return {"preprocessor_config.json": settings, "processor_config.json": joined}


FAMILY: Final = Family(
    tokenizer="sentencepiece",
    tokenizer_class="Ernie4_5_VLTokenizer",
    specials=(*CHAT_TOKENS, *PLACES, *MARKS),
    tokens=MappingProxyType(
        {
            "bos_token_id": "<|im_start|>",
            "eos_token_id": "<|im_end|>",
            "pad_token_id": "<|endoftext|>",
            "image_token_id": PLACES[0],
            "image_start_token_id": MARKS[0],
            "image_end_token_id": MARKS[1],
            "video_start_token_id": MARKS[2],
            "video_end_token_id": MARKS[3],
        }
    ),
    in_code=MappingProxyType(
        {
            "image_token_id": 100295,
            **{"image_start_token_id": 101304, "image_end_token_id": 101305},
            **{"video_start_token_id": 101306, "video_end_token_id": 101307},
        }
    ),
    image_markup=f"{MARKS[0]}<|image@placeholder|>{MARKS[1]}",
    pinned=MappingProxyType(
        {
            "rms_norm_eps": "the runtime's resampler has it in its code",
            "vision_config.patch_size": _IN_CODE,
            "vision_config.spatial_merge_size": _IN_CODE,
        }
    ),
    by_map=True,  # which its own config, of another type, does not build
    adjust=_adjust,
    processor=_processor,
)

"""Qwen 3 and 3.5: ChatML tokens; the multimodal one cuts images into merged patches."""

from dataclasses import replace
from types import MappingProxyType

from validate.twin.family import CHAT_TOKENS, Family, Files, Json

IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
# Position grid side of the twin's tower: small, and no power of two, so that interpolation rounds.
POSITION_SIDE = 6

TEXT = Family(
    tokenizer_class="Qwen2Tokenizer",
    tokens=MappingProxyType(
        {"bos_token_id": "<|endoftext|>", "pad_token_id": "<|endoftext|>"}
        | {"eos_token_id": "<|im_end|>"}
    ),
)


def _adjust(config: Json, source: Json) -> Json:
    vision = config["vision_config"]
    vision["num_position_embeddings"] = POSITION_SIDE**2
    vision["out_hidden_size"] = config["text_config"]["hidden_size"]
    # The released towers have none; a source that has some keeps one per kept layer but the last.
    if source["vision_config"].get("deepstack_visual_indexes"):
        vision["deepstack_visual_indexes"] = list(range(vision["depth"] - 1))
    return config


def _processor(config: Json) -> Files:
    vision = config["vision_config"]
    patch, merge = vision["patch_size"], vision["spatial_merge_size"]
    cell = (patch * merge) ** 2
    shared = {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "merge_size": merge,
        "patch_size": patch,
        "processor_class": "Qwen3VLProcessor",
        "temporal_patch_size": vision["temporal_patch_size"],
    }
    image = shared | {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"longest_edge": 24 * cell, "shortest_edge": 4 * cell},
    }
    video = shared | {
        "fps": 2,
        "size": {"longest_edge": 48 * cell, "shortest_edge": 8 * cell},
        "video_processor_type": "Qwen3VLVideoProcessor",
    }
    return {"preprocessor_config.json": image, "video_preprocessor_config.json": video}


def _dflash(config: Json, source: Json) -> Json:
    """Read the states of layers that the twin of Qwen3.5 has."""
    read = config["dflash_config"] | {"target_layer_ids": [0, 2, 4]}
    del source
    return config | {"dflash_config": read, "num_target_layers": 6, "block_size": 6}


DFLASH = Family(adjust=_dflash)


def _qwen4(config: Json, source: Json) -> Json:
    """Small n-gram tables in two layers, and so few blocks chosen that every prompt has more.

    With as many heads of the indexer no two blocks have a score of zero, which would tie.
    """
    config, text = _adjust(config, source), config["text_config"]
    text |= {"ple_layer_ids": [2, 4], "ple_embed_dim": text["hidden_size"], "heads_per_ngram": 2}
    text |= {"ngram_vocab_size_base": 90, "make_ngram_vocab_size_divisible_by": 24}
    text |= {"split_ngram_parts": 12, "hc_count": 3, "hc_lowrank": 64, "seed": 4321}
    text |= {"indexer_n_heads": 16, "indexer_head_dim": 64}
    text |= {"indexer_budget": 8, "indexer_compress_ratio": 2}
    return config


QWEN3_5 = Family(
    tokenizer_class="Qwen2Tokenizer",
    specials=(*CHAT_TOKENS, VISION_START, VISION_END, IMAGE, VIDEO),
    tokens=MappingProxyType(
        {
            **TEXT.tokens,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "vision_end_token_id": VISION_END,
            "vision_start_token_id": VISION_START,
        }
    ),
    named_tokens=MappingProxyType(
        {
            "image_token": IMAGE,
            "video_token": VIDEO,
            "vision_bos_token": VISION_START,
            "vision_eos_token": VISION_END,
        }
    ),
    image_markup=f"{VISION_START}{IMAGE}{VISION_END}",
    video_markup=f"{VISION_START}{VIDEO}{VISION_END}",
    adjust=_adjust,
    processor=_processor,
)

# n-grams begin anew at this token, so it is one that prompts have.
QWEN4 = replace(
    QWEN3_5,
    tokens=MappingProxyType({**QWEN3_5.tokens, "bos_token_id": "<|im_end|>"}),
    adjust=_qwen4,
)

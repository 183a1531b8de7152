"""Gemma 4: pictures of any shape pooled to at most 70 tokens, sounds of one token per 40 ms."""

from dataclasses import replace
from types import MappingProxyType

from validate.twin.family import CHAT_TOKENS, Family, Files, Json, no_files

IMAGE, BOI, EOI = "<|image|>", "<|image>", "<image|>"
AUDIO, BOA, EOA = "<|audio|>", "<|audio>", "<audio|>"
VIDEO = "<|video|>"
SOFT_TOKENS = 70
"""The fewest per picture that the image processor allows."""
PATCH = 8
FRAME = 640
"""Samples in the 40 ms that one token stands for where nothing encodes the sound."""

_PAD = "the runtime looks the layers' own embeddings of soft tokens up as token 0"
_EPS = "the runtime fixes the epsilon of the tower's query and key norms in code"


def _text(text: Json) -> None:
    text.update(global_head_dim=128, vocab_size_per_layer_input=text["vocab_size"])
    if text.get("num_global_key_value_heads"):
        text["num_global_key_value_heads"] = 1
    if text.get("hidden_size_per_layer_input"):
        text["hidden_size_per_layer_input"] = 64
    if text.get("num_kv_shared_layers"):
        # The last of two periods takes keys and values from the first one.
        text["num_kv_shared_layers"] = text["num_hidden_layers"] // 2
    if text.get("enable_moe_block"):
        text["top_k_experts"] = 2


def _adjust(config: Json, source: Json) -> Json:
    del source
    _text(config["text_config"])
    config["vision_soft_tokens_per_image"] = SOFT_TOKENS
    config["vision_config"].update(patch_size=PATCH, position_embedding_size=256)
    if config.get("audio_config"):
        # Bounds that are reached, and widths that differ from each other.
        config["audio_config"].update(
            subsampling_conv_channels=[128, 8],
            output_proj_dims=96,
            attention_logit_cap=2.5,
            gradient_clipping=1.75,
            residual_weight=0.4,
        )
    return config


def processor(config: Json) -> Files:
    """One file for all parts, as transformers 5 writes it."""
    vision = config["vision_config"]
    cut = {"patch_size": vision["patch_size"], "pooling_kernel_size": vision["pooling_kernel_size"]}
    shared = {"do_normalize": False, "do_rescale": True, "do_resize": True, **cut}
    settings: Json = {
        "audio_ms_per_token": 40,
        "audio_seq_length": 750,
        "feature_extractor": {
            "feature_extractor_type": "Gemma4AudioFeatureExtractor",
            "feature_size": 128,
            "frame_length_ms": 20.0,
            "hop_length_ms": 10.0,
            "mel_floor": 1e-3,
            "sampling_rate": 16000,
        },
        "image_processor": {
            **shared,
            "do_convert_rgb": True,
            "image_processor_type": "Gemma4ImageProcessor",
            "max_soft_tokens": SOFT_TOKENS,
        },
        "image_seq_length": SOFT_TOKENS,
        "processor_class": "Gemma4Processor",
        "video_processor": {
            **shared,
            "max_soft_tokens": SOFT_TOKENS,
            "num_frames": 4,
            "video_processor_type": "Gemma4VideoProcessor",
        },
    }
    return {"processor_config.json": settings}


# Queries are normed and never divided by the root of their size; a trained norm makes up for it,
# as a trained router does for being divided by the root of its width.
GAINS = MappingProxyType({"self_attn.q_norm.weight": 0.25, "router.scale": 8.0})
NAMED = MappingProxyType(
    {
        **{"image_token": IMAGE, "boi_token": BOI, "eoi_token": EOI},
        **{"audio_token": AUDIO, "boa_token": BOA, "eoa_token": EOA},
    }
)
TOKENS = MappingProxyType(
    {
        **{f"{name}_id": token for name, token in NAMED.items()},
        **{"bos_token_id": "<bos>", "eoa_token_index": EOA, "video_token_id": VIDEO},
    }
)
GEMMA4 = Family(
    add_bos=True,
    specials=("<bos>", *CHAT_TOKENS, BOI, EOI, IMAGE, BOA, EOA, AUDIO, VIDEO),
    tokens=TOKENS,
    named_tokens=NAMED,
    image_markup=IMAGE,
    audio_markup=AUDIO,
    video_markup=VIDEO,
    pinned=MappingProxyType({"text_config.pad_token_id": _PAD, "vision_config.rms_norm_eps": _EPS}),
    gains=GAINS,
    adjust=_adjust,
    processor=processor,
)


def _adjust_text(config: Json, source: Json) -> Json:
    del source
    _text(config)
    return config


def _adjust_unified(config: Json, source: Json) -> Json:
    del source
    _text(config["text_config"])
    # Patches and soft tokens stay the release's: the runtime's image processor reads neither.
    tokens = config["vision_config"]["num_soft_tokens"]
    config["vision_config"].update(mm_embed_dim=96, output_proj_dims=96, mm_posemb_size=tokens)
    # A frame of 40 ms is as wide as its samples are many.
    names = ("audio_embed_dim", "audio_samples_per_token", "hidden_size", "output_proj_dims")
    config["audio_config"].update(dict.fromkeys(names, FRAME))
    return config


def _processor_unified(config: Json) -> Files:
    settings = processor(config)["processor_config.json"]
    settings["feature_extractor"] = {
        "audio_samples_per_token": FRAME,
        "feature_extractor_type": "Gemma4UnifiedAudioFeatureExtractor",
        "feature_size": FRAME,
        "sampling_rate": 16000,
    }
    settings["processor_class"] = "Gemma4UnifiedProcessor"
    vision = config["vision_config"]
    settings["image_seq_length"] = vision["num_soft_tokens"]
    settings["image_processor"]["max_soft_tokens"] = vision["num_soft_tokens"]
    for part in ("image", "video"):
        kind = f"Gemma4Unified{part.capitalize()}Processor"
        settings[f"{part}_processor"][f"{part}_processor_type"] = kind
        settings[f"{part}_processor"]["model_patch_size"] = vision["model_patch_size"]
    return {"processor_config.json": settings}


TEXT = replace(
    GEMMA4,
    tokens=MappingProxyType({"bos_token_id": "<bos>"}),
    specials=("<bos>", *CHAT_TOKENS),
    named_tokens=MappingProxyType({}),
    image_markup=None,
    audio_markup=None,
    video_markup=None,
    pinned=MappingProxyType({"pad_token_id": _PAD}),
    adjust=_adjust_text,
    processor=no_files,
)
UNIFIED = replace(
    GEMMA4,
    pinned=MappingProxyType({"text_config.pad_token_id": _PAD}),
    adjust=_adjust_unified,
    processor=_processor_unified,
)


def _adjust_assistant(config: Json, source: Json) -> Json:
    """A drafter for the twin of its model: that one's width, heads and window."""
    del source
    _text(config["text_config"])
    layers = config["text_config"]["num_hidden_layers"]
    config["text_config"].update(
        hidden_size=64, vocab_size_per_layer_input=0, num_kv_shared_layers=layers
    )
    config.update(backbone_hidden_size=128, num_centroids=32, centroid_intermediate_top_k=4)
    return config


ASSISTANT = replace(
    TEXT,
    tokens=TOKENS,
    specials=GEMMA4.specials,
    pinned=MappingProxyType({"text_config.pad_token_id": _PAD}),
    adjust=_adjust_assistant,
)


def _adjust_embedding(config: Json, source: Json) -> Json:
    text = config["text_config"]
    text.update(embedding_dim=192, hidden_size_per_layer_input=64)
    wide = {"head_dim": 128, "num_key_value_heads": 1}
    full = [i for i, kind in enumerate(text["layer_types"]) if kind == "full_attention"]
    text["per_layer_config"] = {str(index): wide for index in full}
    shrunk = _adjust({**config, "text_config": {**text}}, source)
    del shrunk["vision_soft_tokens_per_image"]
    return {**shrunk, "text_config": text}


def _embedding_processor(config: Json) -> Files:
    settings = processor(config)["processor_config.json"]
    name = "EmbeddingGemma2Processor"
    video = {**settings["video_processor"], "video_processor_type": "EmbeddingGemma2VideoProcessor"}
    return {
        "processor_config.json": {**settings, "processor_class": name, "video_processor": video}
    }


EMBEDDING = replace(GEMMA4, adjust=_adjust_embedding, processor=_embedding_processor)

"""Qwen3-Omni: Qwen3-VL's pictures, and sounds of thirteen tokens a second."""

from types import MappingProxyType

from validate.twin.families.qwen import IMAGE, POSITION_SIDE, VIDEO, VISION_END, VISION_START
from validate.twin.family import CHAT_TOKENS, Family, Files, Json

AUDIO, BOA, EOA = "<|audio_pad|>", "<|audio_start|>", "<|audio_end|>"
_SIZES = "the runtime counts the frames of a sound by hundreds"


def _adjust(config: Json, source: Json) -> Json:
    del source
    thinker = config["thinker_config"]
    width = thinker["text_config"]["hidden_size"]
    vision = thinker["vision_config"]
    vision.update(num_position_embeddings=POSITION_SIDE**2, out_hidden_size=width)
    vision["deepstack_visual_indexes"] = list(range(vision["depth"] - 1))
    # Windows of a second, so that the longer sounds have two of them.
    thinker["audio_config"].update(
        d_model=64,
        downsample_hidden_size=8,
        encoder_attention_heads=4,
        encoder_ffn_dim=128,
        encoder_layers=3,
        num_hidden_layers=3,
        n_window_infer=100,
        output_dim=width,
    )
    return config


def _processor(config: Json) -> Files:
    vision = config["thinker_config"]["vision_config"]
    patch, merge = vision["patch_size"], vision["spatial_merge_size"]
    cell = (patch * merge) ** 2
    return {
        "preprocessor_config.json": {
            "chunk_length": 30,
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": config["thinker_config"]["audio_config"]["num_mel_bins"],
            "hop_length": 160,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "Qwen2VLImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "max_pixels": 24 * cell,
            "merge_size": merge,
            "min_pixels": 4 * cell,
            "n_fft": 400,
            "padding_value": 0.0,
            "patch_size": patch,
            "processor_class": "Qwen3OmniMoeProcessor",
            "return_attention_mask": True,
            "sampling_rate": 16000,
            "temporal_patch_size": vision["temporal_patch_size"],
        }
    }


FAMILY = Family(
    tokenizer_class="Qwen2Tokenizer",
    specials=(*CHAT_TOKENS, VISION_START, VISION_END, IMAGE, VIDEO, BOA, EOA, AUDIO),
    tokens=MappingProxyType(
        {
            **{"im_start_token_id": "<|im_start|>", "im_end_token_id": "<|im_end|>"},
            **{"image_token_id": IMAGE, "video_token_id": VIDEO},
            **{"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END},
            **{"audio_token_id": AUDIO, "audio_start_token_id": BOA, "audio_end_token_id": EOA},
        }
    ),
    named_tokens=MappingProxyType(
        {
            **{"image_token": IMAGE, "video_token": VIDEO, "audio_token": AUDIO},
            **{"vision_bos_token": VISION_START, "vision_eos_token": VISION_END},
            **{"audio_bos_token": BOA, "audio_eos_token": EOA},
        }
    ),
    image_markup=f"{VISION_START}{IMAGE}{VISION_END}",
    audio_markup=f"{BOA}{AUDIO}{EOA}",
    video_markup=f"{VISION_START}{VIDEO}{VISION_END}",
    pinned=MappingProxyType({"thinker_config.audio_config.n_window": _SIZES}),
    adjust=_adjust,
    processor=_processor,
)

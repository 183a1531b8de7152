"""Inkling: pictures and sounds as runs of one token each, behind a token that opens them."""

from types import MappingProxyType
from typing import Final

from validate.twin.family import CHAT_TOKENS, Family, Files, Json

IMAGE: Final = "<|unused_200054|>"
AUDIO: Final = "<|unused_200053|>"
OPEN_IMAGE: Final = "<|content_image|>"
OPEN_AUDIO: Final = "<|content_audio_input|>"
PADDED: Final = 64
"""Rows of the output beyond the vocabulary, whose logits are cut off."""
_TOKENS: Final = {
    **{"image_token_id": IMAGE, "audio_token_id": AUDIO},
    **{"image_bos_token_id": OPEN_IMAGE, "audio_bos_token_id": OPEN_AUDIO},
}


def _adjust(config: Json, source: Json) -> Json:
    """Layers of every kind, sizes that differ from each other, and distances that prompts pass."""
    del source
    text = config["text_config"]
    text |= {"num_hidden_layers": 6, "local_layer_ids": [0, 2, 4], "dense_mlp_idx": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    text |= {"swa_num_attention_heads": 6, "swa_num_key_value_heads": 3, "swa_head_dim": 32}
    text |= {"sliding_window_size": 15, "d_rel": 8, "rel_extent": 24, "log_scaling_n_floor": 12}
    text |= {"intermediate_size": 128, "dense_intermediate_size": 192}
    text |= {"unpadded_vocab_size": text["vocab_size"]}
    text["vocab_size"] += PADDED
    for name in ("audio_config", "vision_config"):
        config[name]["decoder_dmodel"] = text["hidden_size"]
    # The runtime's processor has the patch of the release in code.
    config["vision_config"]["n_layers"] = 3
    return config


def _processor(config: Json) -> Files:
    audio, vision = config["audio_config"], config["vision_config"]
    side = vision["patch_size"]
    settings = {
        **{"image_token": IMAGE, "audio_token": AUDIO},
        **{"image_bos_token": OPEN_IMAGE, "audio_bos_token": OPEN_AUDIO},
        "dmel_max_value": audio["dmel_max_value"],
        "dmel_min_value": audio["dmel_min_value"],
        "num_dmel_bins": audio["mel_vocab_size"],
        "processor_class": "InklingProcessor",
        "feature_extractor": {
            "audio_token_duration_s": 0.05,
            "feature_extractor_type": "InklingFeatureExtractor",
            "feature_size": audio["n_mel_bins"],
            "sampling_rate": 16000,
            "window_size_multiplier": 2.0,
        },
        "image_processor": {
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_processor_type": "InklingImageProcessor",
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "size": {"height": side, "width": side},
        },
    }
    return {"processor_config.json": settings}


FAMILY = Family(
    specials=(*CHAT_TOKENS, *_TOKENS.values()),
    tokens=MappingProxyType(_TOKENS),
    in_code=MappingProxyType(
        {
            **{"image_token_id": 200054, "audio_token_id": 200053},
            **{"image_bos_token_id": 200005, "audio_bos_token_id": 200020},
        }
    ),
    image_markup=f"{OPEN_IMAGE}{IMAGE}",
    audio_markup=f"{OPEN_AUDIO}{AUDIO}",
    adjust=_adjust,
    processor=_processor,
)

"""MiniCPM-o: pictures and sounds between markers, each a fixed or counted run of one token."""

from types import MappingProxyType

from validate.twin.family import CHAT_TOKENS, Family, Files, Json

MARKERS = ("<image>", "</image>", "<slice>", "</slice>", "<|audio_start|>", "<|audio_end|>")
VOICES = ("<|spk_bos|>", "<|spk_eos|>", "<|tts_bos|>", "<|tts_eos|>", "<|listen|>", "<unk>")
POSITION_SIDE = 10
"""Patches per side of the tower's table of positions."""


def _adjust(config: Json, source: Json) -> Json:
    del source
    vision, audio = config["vision_config"], config["audio_config"]
    vision["image_size"] = POSITION_SIDE * vision["patch_size"]
    audio.update(
        d_model=64,
        encoder_attention_heads=4,
        encoder_ffn_dim=256,
        encoder_layers=3,
        max_source_positions=1500,
    )
    config["query_num"] = 9
    config.pop("tts_config")
    return config


def _processor(config: Json) -> Files:
    return {
        "preprocessor_config.json": {
            "image_feature_size": config["query_num"],
            "max_slice_nums": 1,
            "norm_mean": [0.5, 0.5, 0.5],
            "norm_std": [0.5, 0.5, 0.5],
            "patch_size": config["vision_config"]["patch_size"],
            "scale_resolution": 8 * config["vision_config"]["patch_size"],
            "slice_mode": False,
        }
    }


FAMILY = Family(
    tokenizer_class="Qwen2Tokenizer",
    specials=(*CHAT_TOKENS, *MARKERS, *VOICES),
    tokens=MappingProxyType({}),
    image_markup="<image>./</image>\n",
    adjust=_adjust,
    processor=_processor,
)

"""Phi-4 with pictures: patches of any grid behind one mark per picture."""

from arch_maps.models.phi4mm import AUDIO_TOKEN, IMAGE_TOKEN
from validate.twin.family import CHAT_TOKENS, Family, Files, Json

IMAGE = "<image>"
PICTURE, SOUND = "<|endoftext10|>", "<|endoftext11|>"
POSITIONS = 16
"""Learned positions of the tower, a square that is stretched to each picture's grid."""


def _adjust(config: Json, source: Json) -> Json:
    del source
    vision = config["vision_config"]
    vision["num_patches"] = POSITIONS
    config["mm_hidden_size"] = vision["hidden_size"]
    config["min_num_patches"], config["max_num_patches"] = 16, 64
    return config


def _processor(config: Json) -> Files:
    return {
        "preprocessor_config.json": {
            "do_normalize": True,
            "do_rescale": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "Siglip2ImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "max_num_patches": config["max_num_patches"],
            "patch_size": config["vision_config"]["patch_size"],
            "resample": 2,
        }
    }


SIGLIP = Family(
    specials=(*CHAT_TOKENS, IMAGE),
    image_markup=f"{IMAGE}\n",
    adjust=_adjust,
    processor=_processor,
)
SIDE = 32
"""Patches per side of a tile, which the release's processor has in its code."""
TILE = 14 * SIDE


def _multimodal(config: Json, source: Json) -> Json:
    """Small towers, which no field rule reaches, and adapters with multiples of their own."""
    config["partial_rotary_factor"] = 0.5
    config["sliding_window"] = source["sliding_window"]
    # transformers reads no LongRoPE settings of a type that it does not know.
    config["rope_scaling"] = None
    config["vision_lora"].update(r=8, lora_alpha=12)
    config["speech_lora"].update(r=4, lora_alpha=8)
    config["vision_config"] = {
        "hidden_size": 64,
        "image_size": TILE,
        "intermediate_size": 128,
        "layer_norm_eps": 1e-6,
        "num_attention_heads": 4,
        "num_channels": 3,
        "num_hidden_layers": 3,
        "patch_size": 14,
    }
    config["mm_hidden_size"] = config["vision_config"]["hidden_size"]
    config["min_num_patches"], config["max_num_patches"] = 16, 64
    audio = config["audio_processor"]["config"]
    audio.update(
        attention_dim=64,
        attention_heads=4,
        depthwise_seperable_out_channel=64,
        ext_pw_out_channel=64,
        linear_units=96,
        conv_channels=32,  # the runtime's name of it, where its own loader looks
        nemo_conv_settings={"conv_channels": 32},
        num_blocks=2,
    )
    return config


def _tiles(config: Json) -> Files:
    del config
    return {
        "preprocessor_config.json": {
            "audio_compression_rate": 8,
            "audio_downsample_rate": 1,
            "audio_feat_stride": 1,
            "dynamic_hd": 36,
            "feature_extractor_type": "Phi4MMAudioFeatureExtractor",
            "image_processor_type": "Phi4MMImageProcessor",
            "processor_class": "Phi4MMProcessor",
        }
    }


MULTIMODAL = Family(
    tokens={"image_token_index": PICTURE, "audio_token_index": SOUND},
    in_code={"image_token_index": IMAGE_TOKEN, "audio_token_index": AUDIO_TOKEN},
    image_markup="<|image_1|>",
    audio_markup="<|audio_1|>",
    by_map=True,  # the class has no adapters
    adjust=_multimodal,
    processor=_tiles,
)

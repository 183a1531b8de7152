"""NVIDIA's omni releases: pictures of any grid, pairs of frames, and sounds of any length."""

from types import MappingProxyType
from typing import Final

from validate.twin.families import moe
from validate.twin.family import CHAT_TOKENS, Family, Files, Json

IMAGE, START, END, VIDEO = "<image>", "<img>", "</img>", "<video>"
SOUND, SOUND_START, SOUND_END = "<so_embedding>", "<so_start>", "<so_end>"
HIDDEN: Final = 64
SIDE: Final = 256
"""Pixels of the longest side that the table of positions has room for."""
_MEAN: Final = [0.48145466, 0.4578275, 0.40821073]
_STD: Final = [0.26862954, 0.26130258, 0.27577711]


def _adjust(config: Json, source: Json) -> Json:
    given = source["llm_config"]
    text = config["llm_config"] = moe.FAMILY.adjust(config["llm_config"], given)
    if "layers_block_type" in text:
        text["layers_block_type"] = 2 * list(dict.fromkeys(given["layers_block_type"]))
        text["num_hidden_layers"] = len(text["layers_block_type"])
        text["mtp_layers_block_type"] = given["mtp_layers_block_type"]
        text["moe_latent_size"] = HIDDEN
        # Nothing is predicted here, but the tower of such a release has a norm at its end.
        text["num_nextn_predict_layers"] = given["num_nextn_predict_layers"]
    # The reference bounds step sizes from below in a prompt, but not in single steps.
    text["time_step_min"] = 1e-12
    vision = config["vision_config"]
    vision.update(hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4)
    if "args" in vision:
        vision["args"]["cpe_max_size"] = vision["max_resolution"] = SIDE
        vision["intermediate_size"] = 2 * HIDDEN
    else:
        vision["max_img_size"] = SIDE
    config.update(vit_hidden_size=HIDDEN, projector_hidden_size=3 * HIDDEN)
    # Of a short video a release's rate would leave the first pair of frames alone.
    config["video_pruning_rate"] = 0.25
    if config.get("sound_config"):
        config["sound_config"].update(
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_attention_heads=4,
            num_hidden_layers=2,
            projection_hidden_size=3 * HIDDEN,
            subsampling_conv_channels=16,
        )
    return config


def _processor(config: Json) -> Files:
    pictures = {
        "downsample_ratio": 0.5,
        "image_processor_type": "NemotronH_Omni_Reasoning_V3ImageProcessor",
        "max_model_len": 16384,
        "max_num_patches": 96,
        "min_num_patches": 16,
        "norm_mean": _MEAN,
        "norm_std": _STD,
        "patch_size": config["vision_config"]["patch_size"],
        "processor_class": "NemotronH_Omni_Reasoning_V3Processor",
        "video_maintain_aspect_ratio": True,
        "video_target_num_patches": 32,
    }
    settings = {
        "audio_hop_length": 160,
        "audio_sampling_rate": 16000,
        "audio_subsampling_factor": 8,
        "processor_class": "NemotronH_Omni_Reasoning_V3Processor",
        "video_temporal_patch_dim": 2,
    }
    return {"preprocessor_config.json": pictures, "processor_config.json": settings}


FAMILY = Family(
    by_map=True,  # the class has layer scales, which no release has, and no buffers that all have
    specials=(*CHAT_TOKENS, IMAGE, START, END, VIDEO, SOUND, SOUND_START, SOUND_END),
    tokens=MappingProxyType(
        {
            "img_context_token_id": IMAGE,
            "video_context_token_id": VIDEO,
            "sound_context_token_id": SOUND,
        }
    ),
    image_markup=f"{IMAGE}\n",
    video_markup=f"{VIDEO}\n",
    audio_markup=f"{SOUND}\n",
    pinned=MappingProxyType({"vision_config.layer_norm_eps": "the runtime has it in its code"}),
    adjust=_adjust,
    processor=_processor,
)

"""Phi-4 Reasoning Vision: patches of any grid behind one mark per picture."""

from validate.twin.family import CHAT_TOKENS, Family, Files, Json

IMAGE = "<image>"
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

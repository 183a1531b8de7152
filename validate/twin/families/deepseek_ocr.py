"""DeepSeek-OCR and its kin: towers whose sizes the runtime fixes, and a processor of their own."""

from dataclasses import replace
from types import MappingProxyType
from typing import Final

from validate.twin.family import CHAT_TOKENS, Family, Files, Json

IMAGE: Final = "<image>"
# The releases' own spelling, with wide bars.
BOS: Final = "<\uff5cbegin▁of▁sentence\uff5c>"
EOS: Final = "<\uff5cend▁of▁sentence\uff5c>"
PAD: Final = "<\uff5c▁pad▁\uff5c>"
GROUNDING: Final = ("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>")
SPEAKERS: Final = ("<|User|>", "<|Assistant|>")
TOWER_LAYERS: Final = 2
TOWER_INNER: Final = 128


def _adjust(config: Json, source: Json) -> Json:
    """Fewer layers where the runtime reads how many; the SAM tower is in its code."""
    del source
    text = config.get("language_config", config)
    config["projector_config"]["n_embed"] = text["hidden_size"]
    vision = config["vision_config"]
    if "clip-l-14-224" in vision["width"]:
        vision["width"]["clip-l-14-224"]["layers"] = TOWER_LAYERS
        # Where the stock loader looks, which finds the release's own sizes as its defaults.
        vision.update(intermediate_size=TOWER_INNER, layers=TOWER_LAYERS)
        vision["num_attention_heads"] = vision["width"]["clip-l-14-224"]["heads"]
    return config


def _processor(config: Json) -> Files:
    del config
    settings = {
        "add_special_token": False,
        "candidate_resolutions": [[1024, 1024]],
        "downsample_ratio": 4,
        "ignore_id": -100,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_token": IMAGE,
        "mask_prompt": False,
        "normalize": True,
        "pad_token": PAD,
        "patch_size": 16,
        "processor_class": "DeepseekVLV2Processor",
        "sft_format": "deepseek",
    }
    return {"processor_config.json": settings}


OCR: Final = Family(
    silent_bos=BOS,
    specials=(BOS, EOS, PAD, IMAGE, *GROUNDING, *SPEAKERS, *CHAT_TOKENS),
    tokens=MappingProxyType({"bos_token_id": BOS, "eos_token_id": EOS}),
    template="",
    image_markup=f"{IMAGE}\n",
    adjust=_adjust,
    pinned=MappingProxyType(
        {"vision_config.width.qwen2-0-5b.dim": "the runtime has it in its code"}
    ),
    processor=_processor,
)


def _adjust_unlimited(config: Json, source: Json) -> Json:
    del source
    config["vision_config"]["encoder_config"]["num_hidden_layers"] = TOWER_LAYERS
    return config


def _in_code(*names: str) -> dict[str, str]:
    return {f"vision_config.{name}": "the runtime has it in its code" for name in names}


UNLIMITED: Final = replace(
    OCR,
    adjust=_adjust_unlimited,
    pinned=MappingProxyType(
        _in_code(
            *("encoder_config.hidden_size", "encoder_config.layer_norm_eps"),
            *("sam_config.hidden_size", "sam_config.layer_norm_eps"),
            *("sam_config.num_attention_heads", "sam_config.num_hidden_layers"),
        )
    ),
)


def _adjust_vl2(config: Json, source: Json) -> Json:
    del source
    tower = {"layers": TOWER_LAYERS, "width": 64, "mlp_ratio": 2.0, "num_attention_heads": 4}
    # What the release leaves to defaults of its own size is stated here.
    config["vision_config"].update(tower, intermediate_size=2 * 64)
    joint = {"n_embed": config["language_config"]["hidden_size"], "input_dim": 64}
    config["projector_config"].update(joint)
    return config


def _vl2_files(config: Json) -> Files:
    (settings,) = _processor(config).values()
    found = {"candidate_resolutions": config["candidate_resolutions"], "downsample_ratio": 2}
    return {"processor_config.json": {**settings, **found, "patch_size": 14}}


VL2: Final = replace(OCR, adjust=_adjust_vl2, processor=_vl2_files, pinned=MappingProxyType({}))

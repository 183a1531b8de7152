"""InternVL: square tiles between markers, four patches to a token."""

from dataclasses import replace
from types import MappingProxyType

from validate.twin.families.llava import SIDE
from validate.twin.family import CHAT_TOKENS, Family, Files, Json

CONTEXT, START, END, VIDEO = "<IMG_CONTEXT>", "<img>", "</img>", "<video>"


def _adjust(config: Json, source: Json) -> Json:
    del source
    vision = config["vision_config"]
    vision["image_size"] = [SIDE * patch for patch in vision["patch_size"]]
    if vision.get("use_qk_norm"):
        vision["layer_norm_eps"] = 1e-6  # the reference's own in the query and key norms
    config["image_seq_length"] = (SIDE // 2) ** 2
    return config


def _processor(config: Json) -> Files:
    height, width = config["vision_config"]["image_size"]
    images = {
        "crop_to_patches": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "GotOcr2ImageProcessor",
        "image_std": [0.229, 0.224, 0.225],
        "max_patches": 12,
        "min_patches": 1,
        "processor_class": "InternVLProcessor",
        "size": {"height": height, "width": width},
    }
    settings = {
        "image_seq_length": config["image_seq_length"],
        "processor_class": "InternVLProcessor",
    }
    return {"preprocessor_config.json": images, "processor_config.json": settings}


FAMILY = Family(
    tokenizer_class="Qwen2Tokenizer",
    specials=(*CHAT_TOKENS, CONTEXT, START, END, VIDEO),
    tokens=MappingProxyType({"image_token_id": CONTEXT}),
    named_tokens=MappingProxyType(
        {
            "context_image_token": CONTEXT,
            "end_image_token": END,
            "start_image_token": START,
            "video_token": VIDEO,
        }
    ),
    image_markup=f"{CONTEXT}\n",
    adjust=_adjust,
    processor=_processor,
)


def _adjust_chat(config: Json, source: Json) -> Json:
    del source
    vision = config["vision_config"]
    vision["image_size"] = config["force_image_size"] = SIDE * vision["patch_size"]
    config["hidden_size"] = config["llm_config"]["hidden_size"]
    return config


def _chat_files(config: Json) -> Files:
    side = config["force_image_size"]
    settings = {
        "crop_size": side,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": side,
    }
    return {"preprocessor_config.json": settings}


CHAT = replace(
    FAMILY,
    tokens=MappingProxyType({}),
    named_tokens=MappingProxyType({}),
    specials=(*CHAT_TOKENS, CONTEXT, START, END),
    image_markup="<image>\n",
    adjust=_adjust_chat,
    processor=_chat_files,
)
"""As OpenGVLab releases it: the runtime's processor reads config.json for its tiles."""

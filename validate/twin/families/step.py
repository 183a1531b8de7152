"""Step 3.5 and 3.7: per-layer lists, experts under names of their own, pictures of one size."""

from types import MappingProxyType

from validate.twin.family import CHAT_TOKENS, Family, Files, Json

IMAGE = "<im_patch>"
AROUND = ("<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>")
FULL, NEAR = "full_attention", "sliding_attention"
KINDS = [FULL, NEAR, NEAR, NEAR, FULL, NEAR]


def _text(text: Json, source: Json) -> Json:
    del source
    depth = len(KINDS)
    text.update(
        num_hidden_layers=depth,
        layer_types=KINDS,
        rope_theta=[350000.0 if kind == FULL else 700.0 for kind in KINDS],
        partial_rotary_factors=[0.5 if kind == FULL else 1.0 for kind in KINDS],
        num_attention_groups=2,
        attention_other_setting={
            "attention_type": NEAR,
            "head_dim": text["head_dim"],
            "num_attention_groups": 2,
            "num_attention_heads": 6,
        },
        moe_layers_enum="2,3,4,5",
        moe_num_experts=8,
        moe_top_k=2,
        share_expert_dim=128,
        # Bounds that are reached, at the last layers, as in the release.
        swiglu_limits=[0.0] * (depth - 2) + [0.3, 0.4],
        swiglu_limits_shared=[0.0] * (depth - 1) + [0.5],
    )
    text.pop("share_expert_dims", None)
    return text


def _adjust(config: Json, source: Json) -> Json:
    _text(config["text_config"], source)
    # Few layers and heads: pictures have 2,704 patches whatever the config says.
    config["vision_config"].update(width=64, layers=2, heads=2, mlp_ratio=2.0)
    return config


def _processor(config: Json) -> Files:
    vision = config["vision_config"]
    size = {"height": vision["image_size"], "width": vision["image_size"]}
    images = {"image_processor_type": "Step3p7ImageProcessor", "size": size}
    return {"preprocessor_config.json": images | {"processor_class": "Step3p7Processor"}}


FAMILY = Family(
    specials=(*CHAT_TOKENS, IMAGE, *AROUND),
    tokens=MappingProxyType({"image_token_id": IMAGE}),
    image_markup=IMAGE,
    adjust=_adjust,
    processor=_processor,
)
TEXT = Family(adjust=_text)

"""ERNIE 4.5 VL as transformers has it, under a type and with a config of its own."""

import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.models import ernie4_5_moe_vl as release

PARTS: Final = {"image_processor": "Ernie4_5_VLMoeImageProcessorPil"}
PLACE: Final = "<|IMAGE_PLACEHOLDER|>"
TOKENS: Final = {
    "image_token": PLACE,
    "image_start_token": "<|IMAGE_START|>",
    "image_end_token": "<|IMAGE_END|>",
    "video_token": "<|AUDIO_PLACEHOLDER|>",  # which transformers takes for videos
    "video_start_token": "<|VIDEO_START|>",
    "video_end_token": "<|VIDEO_END|>",
}
_MARK: Final = r"<\|image@placeholder\|>"
"""What the release's chat template writes for a picture."""
_TEXT: Final = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"),
    *("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings"),
    *("tie_word_embeddings", "use_bias", "moe_k", "moe_intermediate_size", "moe_norm_min"),
    *("moe_num_shared_experts", "bos_token_id", "eos_token_id", "pad_token_id"),
)
_VISION: Final = (
    *("depth", "hidden_size", "hidden_act", "num_heads", "in_channels", "patch_size"),
    "spatial_merge_size",
)


def torch_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The release's config.json in the terms of ``Ernie4_5_VLMoeConfig``."""
    spelled = release.MAP.config(dict(config), Facts(config))
    vision = spelled["vision_config"]
    _, _, sparse = release.sparse_layers(Facts(spelled), spelled["num_hidden_layers"])
    tokens = {name: spelled[name] for name in release.TOKENS if name != "im_patch_id"}
    return {
        **tokens,
        "model_type": "ernie4_5_vl_moe",
        "architectures": list(config["architectures"]),
        "image_token_id": spelled["im_patch_id"],
        "tie_word_embeddings": spelled["tie_word_embeddings"],
        "text_config": {
            **{name: spelled[name] for name in _TEXT if name in spelled},
            "moe_num_experts": spelled["moe_num_experts"][0],
            "mlp_layer_types": ["sparse" if one else "dense" for one in sparse],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": spelled["rope_theta"],
                "mrope_section": spelled["mrope_section"],
            },
        },
        "vision_config": {
            **{name: vision[name] for name in _VISION},
            "intermediate_size": int(vision["hidden_size"] * vision["mlp_ratio"]),
            "rms_norm_eps": vision["layer_norm_eps"],
            "temporal_merge_size": spelled["temporal_conv_size"],
        },
    }


def processor() -> type:
    """transformers' processor, made to take the marks that the release's template writes."""
    transformers: Any = import_module("transformers")

    class Ernie4_5_VLProcessor(transformers.Ernie4_5_VLMoeProcessor):  # type: ignore[misc]
        """The class, with the release's mark for a picture."""

        def __call__(self, images: Any = None, text: Any = None, **settings: Any) -> Any:
            text = [re.sub(_MARK, PLACE, one) for one in text]
            return super().__call__(images=images, text=text, **settings)

        def create_moe_mm_token_type_ids(self, input_ids: Any) -> Any:
            # transformers makes an array of the tensor itself, of which NumPy warns.
            return input_ids.new_tensor(super().create_moe_mm_token_type_ids(input_ids.tolist()))

    return Ernie4_5_VLProcessor


def complete(model: Any, folder: Path) -> None:
    """The class computes all that the release does."""
    del model, folder

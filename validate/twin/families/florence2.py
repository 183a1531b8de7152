"""Florence-2: pictures of a few patches before a task, an encoder and a decoder of few layers."""

from types import MappingProxyType
from typing import Final

from validate.twin.family import Family, Files, Json

SIDE: Final = 2
"""Tokens per side of a picture, each of 32 by 32 pixels."""
BOS, PAD, EOS, IMAGE = "<s>", "<pad>", "</s>", "<image>"
PLACE: Final = "<loc_0>"
"""The runtime's processor adds a thousand tokens of its own to a vocabulary without it."""


def _adjust(config: Json, source: Json) -> Json:
    del source
    text, vision = config["text_config"], config["vision_config"]
    text.update(
        **{"encoder_layers": 2, "decoder_layers": 3, "num_hidden_layers": 2},
        **{"encoder_ffn_dim": 192, "decoder_ffn_dim": 320},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 2},
        scale_embedding=False,
    )
    vision.update(
        depths=[1, 1, 2, 1],
        embed_dim=[16, 24, 32, 64],
        num_heads=[2, 3, 4, 8],
        num_groups=[2, 4, 4, 8],
        max_position_embeddings=8,
        max_temporal_embeddings=6,
        projection_dim=text["d_model"],
        window_size=3,
    )
    return config


def _processor(config: Json) -> Files:
    del config
    side = 32 * SIDE
    images = {
        "do_center_crop": False,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "CLIPImageProcessor",
        "image_seq_length": SIDE * SIDE + 1,
        "image_std": [0.229, 0.224, 0.225],
        "processor_class": "Florence2Processor",
        "resample": 3,
        "size": {"height": side, "width": side},
    }
    settings = {"num_additional_image_tokens": 0, "processor_class": "Florence2Processor"}
    return {"preprocessor_config.json": images, "processor_config.json": settings}


FAMILY: Final = Family(
    silent_bos=BOS,
    specials=(BOS, PAD, EOS, IMAGE, PLACE, "<|endoftext|>"),
    tokens=MappingProxyType(
        {
            **{"bos_token_id": BOS, "pad_token_id": PAD, "eos_token_id": EOS},
            **{"decoder_start_token_id": EOS, "image_token_id": IMAGE},
            **{"forced_bos_token_id": BOS, "forced_eos_token_id": EOS},
        }
    ),
    named_tokens=MappingProxyType({"image_token": IMAGE}),
    stop_tokens=(EOS,),
    template="",
    image_markup=IMAGE,
    adjust=_adjust,
    processor=_processor,
)

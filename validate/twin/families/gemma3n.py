"""Gemma 3n: a tower of one size for pictures, sounds of a fixed number of tokens."""

from types import MappingProxyType
from typing import Final

from validate.twin.family import CHAT_TOKENS, Family, Files, Json

BOI, EOI, IMAGE = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
BOA, EOA, AUDIO = "<start_of_audio>", "<end_of_audio>", "<audio_soft_token>"
LAYERS: Final = 8
SHARED: Final = 3
PERIOD: Final = 3
MARKS: Final = ("<|eos_1|>", BOI, BOA, EOI, IMAGE, EOA, AUDIO)
"""Last in the vocabulary: a medium's own tokens start with the end of the medium."""
SOFT_TOKENS: Final = 188
SIDE: Final = 512
"""Pixels of a picture's side: fewer than a release's 768, and still pooled after the tower."""


def _adjust(config: Json, source: Json) -> Json:
    """Layers that share and layers that do not, of both kinds; the first ones sparse."""
    del source
    text = config["text_config"]
    kinds = ["sliding_attention", "full_attention"]
    text.update(
        num_hidden_layers=LAYERS,
        num_kv_shared_layers=SHARED,
        layer_types=[kinds[(index + 1) % PERIOD == 0] for index in range(LAYERS)],
        activation_sparsity_pattern=[0.8] * 2 + [0.0] * (LAYERS - 2),
        intermediate_size=[192] * LAYERS,
        hidden_size_per_layer_input=64,
        vocab_size_per_layer_input=config["eoi_token_id"],
    )
    vision, audio = config["vision_config"], config["audio_config"]
    # The tower is of one size in code, whatever the config says.
    vision.update(hidden_size=2048, vocab_size=2, vocab_offset=config["eoi_token_id"])
    audio.update(
        vocab_size=2,
        vocab_offset=config["eoa_token_id"],
        conf_num_attention_heads=4,
        conf_num_hidden_layers=2,
        sscp_conv_channel_size=[32, 8],
        conf_attention_logit_cap=2.5,
        gradient_clipping=1.75,
        conf_residual_weight=0.4,
    )
    return config


def _processor(config: Json) -> Files:
    """The files of the first release: what hears and what sees in one, their lengths in another."""
    media = {
        "do_convert_rgb": None,
        "do_normalize": False,
        "do_rescale": True,
        "do_resize": True,
        "feature_extractor_type": "Gemma3nAudioFeatureExtractor",
        "feature_size": config["audio_config"]["input_feat_size"],
        "image_processor_type": "SiglipImageProcessorFast",
        "image_seq_length": 256,
        "processor_class": "Gemma3nProcessor",
        "size": {"height": SIDE, "width": SIDE},
    }
    lengths = {"audio_seq_length": SOFT_TOKENS, "image_seq_length": 256}
    return {
        "preprocessor_config.json": media,
        "processor_config.json": {**lengths, "processor_class": "Gemma3nProcessor"},
    }


FAMILY: Final = Family(
    by_map=True,
    add_bos=True,
    specials=("<bos>", *CHAT_TOKENS, *MARKS),
    tokens=MappingProxyType(
        {
            **{"boi_token_id": BOI, "eoi_token_id": EOI, "image_token_id": IMAGE},
            **{"boa_token_id": BOA, "eoa_token_id": EOA, "audio_token_id": AUDIO},
            "eos_token_id": "<|endoftext|>",
        }
    ),
    named_tokens=MappingProxyType(
        {
            **{"boi_token": BOI, "eoi_token": EOI, "image_token": IMAGE},
            **{"boa_token": BOA, "eoa_token": EOA, "audio_token": AUDIO},
        }
    ),
    image_markup=IMAGE,
    audio_markup=AUDIO,
    adjust=_adjust,
    processor=_processor,
)

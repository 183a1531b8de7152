"""Jina VLM: nested settings of its own; its crops have their marks in the runtime's code."""

from types import MappingProxyType
from typing import Final

from validate.twin.family import CHAT_TOKENS, Family, Json

IMAGE: Final = "<|image|>"
MARKS: Final = ("<im_patch>", "<im_start>", "<im_end>", "<im_col>")
SIDE: Final = 4
"""Patches per side of a crop."""
ADDED: Final = 64
"""Rows of the second table."""


def _adjust(config: Json, source: Json) -> Json:
    del source
    text, vision = config["text_config"], config["vision_config"]
    text.update(n_layers=3, additional_vocab_size=ADDED, vocab_size=text["vocab_size"])
    text["block_config"]["attn_config"] = {
        **text["block_config"]["attn_config"],
        **{"head_dim": 32, "n_heads": 4, "n_kv_heads": 2},
    }
    text["block_config"]["ffn_config"]["size"] = 192
    patch = vision["patch_size"]
    vision.update(input_size=[SIDE * patch, SIDE * patch], n_layers=5, vit_layers=[-1, -3])
    vision.update(hidden_size=64, output_size=text["hidden_size"])
    vision["block_config"]["attn_config"].update(head_dim=16, n_heads=4)
    vision["block_config"]["ffn_config"]["size"] = 128
    vision["vl_connector_config"]["mlp_projector_config"]["size"] = 160
    # Where the stock loader looks in the end, which finds the release's own sizes as its defaults.
    text.update(
        **{"hidden_size": text["hidden_size"], "num_hidden_layers": 3, "intermediate_size": 192},
        **{"head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
    )
    vision.update(
        **{"num_hidden_layers": 5, "num_attention_heads": 4, "head_dim": 16},
        **{"intermediate_size": 128, "connector_hidden_size": 160},
        image_size=SIDE * patch,
    )
    return config


FAMILY: Final = Family(
    tokenizer_class="Qwen2Tokenizer",
    specials=(*CHAT_TOKENS, *MARKS, IMAGE),
    tokens=MappingProxyType({"bos_token_id": "<|endoftext|>"}),
    adjust=_adjust,
)

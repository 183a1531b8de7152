"""HunyuanOCR: a small table of positions, and axes that share out a shorter head."""

from types import MappingProxyType
from typing import Final

from validate.twin.family import CHAT_TOKENS, Family, Json

IMAGE, START, END, NEWLINE = "<img>", "<img_start>", "<img_end>", "<img_newline>"
SIDE: Final = 6
"""Patches per side of the tower's table."""


def _adjust(config: Json, source: Json) -> Json:
    del source
    half = config["head_dim"] // 2
    config["attention_head_dim"] = config["head_dim"]
    config["org_vocab_size"] = config["vocab_size"]
    config["pad_id"], config["eod_token_id"] = config["pad_token_id"], config["eos_token_id"]
    config["rope_scaling"] |= {"alpha": 30.0, "xdrope_section": [half // 4] * 4}
    vision = config["vision_config"]
    vision.update(out_hidden_size=config["hidden_size"], max_image_size=SIDE * vision["patch_size"])
    return config


FAMILY: Final = Family(
    specials=(*CHAT_TOKENS, IMAGE, START, END, NEWLINE),
    tokens=MappingProxyType(
        {
            "image_token_id": IMAGE,
            "image_start_token_id": START,
            "image_end_token_id": END,
            "image_newline_token_id": NEWLINE,
        }
    ),
    adjust=_adjust,
)

"""Falcon-OCR: sizes and token ids under names of their own."""

from types import MappingProxyType
from typing import Final

from validate.twin.family import CHAT_TOKENS, Family, Json

IMAGE: Final = "<|image|>"
END: Final = "<|image_end|>"
NAMED: Final = {"image_cls_token_id": "<|image_cls|>"} | {
    f"image_reg_{i}_token_id": f"<|image_reg_{i}|>" for i in range(1, 5)
}
SPECIALS: Final = (*CHAT_TOKENS, IMAGE, END, "<|OCR_PLAIN|>", *NAMED.values())
LAYERS: Final = 3


def _adjust(config: Json, source: Json) -> Json:
    del source
    first = config["vocab_size"] - len(SPECIALS)
    config.update(
        n_layers=LAYERS,
        n_kv_heads=config["n_heads"] // 2,
        img_id=first + SPECIALS.index(IMAGE),
        img_end_id=first + SPECIALS.index(END),
        eos_id=first + SPECIALS.index("<|endoftext|>"),
    )
    return config


FAMILY: Final = Family(
    specials=SPECIALS,
    tokens=MappingProxyType(NAMED),
    template="",
    image_markup=IMAGE,
    adjust=_adjust,
)

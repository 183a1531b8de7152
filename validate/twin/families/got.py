"""GOT-OCR: token ids under names of their own, and a tower that the release has in its code."""

from typing import Final

from validate.twin.family import CHAT_TOKENS, Family, Json

MARKS: Final = {"im_start_token": "<img>", "im_end_token": "</img>", "im_patch_token": "<imgpad>"}
SPECIALS: Final = (*CHAT_TOKENS, *MARKS.values())


def _adjust(config: Json, source: Json) -> Json:
    """The runtime reads a vision section, where the release has none."""
    del source
    first = config["vocab_size"] - len(SPECIALS)
    config.update({name: first + SPECIALS.index(token) for name, token in MARKS.items()})
    config["vision_config"] = {"embed_dim": 64, "depth": 3, "num_heads": 4, "out_dim": 128}
    return config


FAMILY: Final = Family(
    specials=SPECIALS,
    tokens={"bos_token_id": "<|endoftext|>", "eos_token_id": "<|endoftext|>"},
    template="",
    image_markup="<img>",
    adjust=_adjust,
)

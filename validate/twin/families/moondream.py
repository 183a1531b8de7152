"""Moondream 2 and 3: a picture is 729 tokens after the first, whatever its size."""

from validate.twin.family import Family, Files, Json

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def _adjust(config: Json, source: Json) -> Json:
    """Crops keep their size: the runtime's processor has the number of tokens in its code."""
    del source
    text, vision = config["text_config"], config["vision_config"]
    if "rope_dim" in text:
        text["rope_dim"] = text["head_dim"] // 2
    if "moe_start_layer" in text:
        text["moe_start_layer"] = 1
        text["moe_intermediate_size"] = 64
    vision["proj_inner_dim"] = 128
    vision["proj_out_dim"] = text["hidden_size"]
    return config


def _processor(config: Json) -> Files:
    vision = config["vision_config"]
    names = ("crop_size", "max_crops", "overlap_margin")
    return {"preprocessor_config.json": {name: vision[name] for name in names}}


PLAIN = (
    "{% if messages | length > 1 %}{% for turn in messages %}User: {{ turn.content }}\n{% endfor %}"
    "Assistant:{% elif messages[0].content is string %}{{ messages[0].content }}{% else %}"
    "{% for part in messages[0].content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    "{% endif %}"
)
"""Releases bring no template; this one writes what the runtime's helper writes without one."""
FAMILY = Family(
    specials=SPECIALS,
    image_markup="",
    template=PLAIN,
    adjust=_adjust,
    processor=_processor,
)

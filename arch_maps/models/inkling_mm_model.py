"""Inkling: text, pictures and sounds, with relative positions and short convolutions."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from arch_maps import config as spell
from arch_maps.audio import dmel
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import inkling, moe
from arch_maps.vision import inkling_hmlp

_TOKENS: Final = {
    **{"image_token_id": 200054, "audio_token_id": 200053},
    **{"image_bos_token_id": 200005, "audio_bos_token_id": 200020},
}
"""Token ids that the reference has in code."""


def _further(facts: Facts, text: Facts) -> list[bool]:
    """The layers for further tokens, and which of them see a window only."""
    listed = facts.data.get("mtp_config") or {}
    count = text.data.get("num_mtp_layers") or listed.get("num_nextn_predict_layers") or 0
    local = text.data.get("mtp_local_layer_ids") or listed.get("local_layer_ids") or ()
    found = Facts({"num_nextn_predict_layers": count}, path="mtp_config.", parent=facts)
    layers = found.count("num_nextn_predict_layers") if count else 0
    return [index in local for index in range(layers)]


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    text = inkling.released(facts.section("text_config"))
    hidden = text.size("hidden_size")
    head = root.at(source="", target="language_model")
    stack = root.at(source=layout["text"], target="language_model.model")
    inkling.stack(stack, head, text)
    tower = root.at(source=layout["vision"], target="vision_tower", part="vision")
    inkling_hmlp.tower(tower, facts.section("vision_config"), hidden)
    ear = root.at(source=layout["audio"], target="audio_tower", part="audio")
    dmel.tower(ear, facts.section("audio_config"), hidden)
    for index, local in enumerate(_further(facts, text)):
        place = f"{layout['further']}.{index}"
        moe.drop_block(root, place, partial(inkling.further, facts=text, local=local), inkling.MTP)
        (root / place).bind_drops("input_proj.weight")


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text = inkling.released(facts.section("text_config"))
    hidden = int(text.size("hidden_size"))
    inkling.spell_config(out["text_config"], text)
    inkling_hmlp.spell_config(out["vision_config"], facts.section("vision_config"), hidden)
    dmel.spell_config(out["audio_config"], facts.section("audio_config"), hidden)
    for name, default in _TOKENS.items():
        out.setdefault(name, default)
    out.update(tie_word_embeddings=False, vocab_size=int(text.size("vocab_size")))
    return out


MAP = ArchMap(
    model_type="inkling_mm_model",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout(
            "published",
            {
                **{"text": "model.llm", "vision": "model.visual", "audio": "model.audio"},
                "further": "model.mtp.layers",
            },
        ),
    ),
    runtimes=("mlx-vlm",),
    parts=("text.inkling", "vision.inkling_hmlp", "audio.dmel"),
    modalities=("text", "image", "audio"),
    pipeline_tag="image-text-to-text",
)

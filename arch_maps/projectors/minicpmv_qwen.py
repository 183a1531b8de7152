"""MiniCPM-V 4.6 and 4.7 as a whole: a SigLIP tower, the mergers and the Qwen3.5 text stack."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.projectors import minicpmv
from arch_maps.rules import Layout, Mount
from arch_maps.text import qwen3_5
from arch_maps.vision import siglip

LAYOUTS: Final = (
    Layout(
        "transformers",
        {
            "text": "model.language_model",
            "vision": "model.vision_tower",
            "merger": "model.merger",
        },
    ),
)


def tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    """Text stack, tower and both mergers."""
    text, vision = facts.section("text_config"), facts.section("vision_config")
    s = qwen3_5.sizes(text)
    qwen3_5.stack(root.at(source=layout["text"], target="language_model.model"), s)
    tied = f"{layout['text']}.embed_tokens.weight" if qwen3_5.tied(facts) else None
    head = root.at(source="", target="language_model")
    head.head("lm_head", s.vocab, s.hidden, tied_to=tied)
    if text.data.get("mtp_num_hidden_layers"):
        qwen3_5.drop_mtp(root, s, text.count("mtp_num_hidden_layers"))
    siglip.tower(root.at(source=layout["vision"], target="vision_tower", part="vision"), vision)
    window = f"{layout['vision']}.vit_merger"
    minicpmv.window_merger(root.at(source=window, target="vit_merger", part="projector"), vision)
    merger = root.at(source=layout["merger"], target="merger", part="projector")
    minicpmv.merger(merger, facts, vision, s.hidden)


def spell_config(config: dict[str, Any], facts: Facts, *, vision_type: str) -> dict[str, Any]:
    """The config that the runtime reads."""
    out = spell.start(config)
    text, vision = facts.section("text_config"), facts.section("vision_config")
    qwen3_5.spell_config(out["text_config"], text, tied=qwen3_5.tied(facts))
    vision.expect(
        "hidden_act",
        "gelu_pytorch_tanh",
        default="gelu_pytorch_tanh",
        why="the tower is checked with this activation only",
    )
    facts.expect(
        "drop_vision_last_layer", False, default=False, why="the runtime keeps the last layer"
    )
    out["vision_config"].update(
        model_type=vision_type,
        num_channels=int(vision.size("num_channels", 3)),
        layer_norm_eps=vision.number("layer_norm_eps", 1e-6),
        window_kernel_size=list(vision.pair("window_kernel_size", (2, 2))),
    )
    out.update(
        tie_word_embeddings=qwen3_5.tied(facts),
        patch_size=int(vision.size("patch_size")),
        image_size=int(facts.size("image_size", 448)),
        insert_layer_id=facts.data.get("insert_layer_id", 6),
        downsample_mode=facts.data.get("downsample_mode", "16x"),
        merge_kernel_size=list(facts.pair("merge_kernel_size", (2, 2))),
        merger_times=facts.count("merger_times", 1),
    )
    return out

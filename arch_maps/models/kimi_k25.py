"""Kimi K2.5 and K2.6: the MoonViT tower over Kimi K2's experts."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.models import deepseek_v3
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import deepseek, moe
from arch_maps.vision import moonvit

_SAVED: Final = {
    "layers": "blocks",
    "tower": "encoder",
    "patches": "encoder",
    "norm": "model.mm_projector",
}


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    text, vision = facts.section("text_config"), facts.section("vision_config")
    sparse = moe.dense_prefix(text, text.count("num_hidden_layers"))
    name = "language_model"
    stack = root.at(source=name, target=name)
    deepseek.latent_lm(stack, text, sparse, fused=layout.fused_experts, called=layout["layers"])
    tower = root.at(source="vision_tower", target="vision_tower", part="vision")
    moonvit.tower(tower, vision, inner=layout["tower"], patches=layout["patches"])
    hidden, joined = text.size("hidden_size"), moonvit.joined(vision)
    width = moonvit.facts_of(vision).size("hidden_size")
    projector = root.at(source="mm_projector", target="mm_projector", part="projector")
    before = root.at(source=layout["norm"], target="mm_projector", part="projector")
    before.norm("pre_norm", width, bias=True)
    projector.linear("proj.0", joined, joined, bias=True)
    projector.linear("proj.2", hidden, joined, bias=True)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text, vision = facts.section("text_config"), facts.section("vision_config")
    text.expect(
        "model_type",
        *("deepseek_v3", "kimi_k2"),
        default="deepseek_v3",
        why="the runtimes compute no other stack",
    )
    # Both levels may say it; the reference asks the outer one, whose default no release has.
    facts.expect("tie_word_embeddings", False, None, default=False, why="the head is no table")
    out["text_config"] = deepseek_v3.MAP.config(dict(text.data), text)
    out["text_config"]["model_type"] = "deepseek_v3"
    eps = facts.data.get("projection_layer_norm_eps", vision.data.get("projector_ln_eps", 1e-5))
    if eps != 1e-5:
        facts.problem("config.json: projection_layer_norm_eps must be 1e-5; the runtime takes it")
    moonvit.spell_config(out["vision_config"], vision)
    given = facts.data.get("image_token_id", facts.data.get("media_placeholder_token_id"))
    image = 163605 if given is None else given
    out.update(
        image_token_id=image,
        image_token_index=image,
        media_placeholder_token_id=image,
        tie_word_embeddings=False,
        vocab_size=int(text.size("vocab_size")),
    )
    return out


MAP = ArchMap(
    model_type="kimi_k25",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout(
            "published",
            {"layers": "layers", "tower": "encoder", "patches": "", "norm": "mm_projector"},
        ),
        Layout("as transformers 5 saves it", _SAVED),
        Layout("as transformers 5 saves it, experts fused", _SAVED, fused_experts=True),
    ),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.deepseek", "text.mla", "text.moe", "vision.moonvit"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
    remarks=(
        "mlx-vlm 0.7.10 computes exact GELU in the tower for its tanh form, and gives its norms "
        "an epsilon of 1e-6 for 1e-5.",
    ),
)

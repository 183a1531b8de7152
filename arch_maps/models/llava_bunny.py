"""nanoLLaVA (Bunny on Qwen1.5): SigLIP's tower, a two-layer projector and Qwen2's stack."""

from __future__ import annotations

import copy
from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama
from arch_maps.vision import siglip

_TOWER: Final = {
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}
"""google/siglip-so400m-patch14-384, which releases name instead of stating its facts."""


def _vision(facts: Facts) -> Facts:
    return facts.filled({"vision_config": {}}).section("vision_config").filled(_TOWER)


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts, qkv_bias=True)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    s, vision = _sizes(facts), _vision(facts)
    body = root.at(source="model", target="language_model.model")
    llama.stack(body, s)
    head = root.at(source="", target="language_model.model")
    if s.tied:  # the runtime keeps a head of its own
        head.copied_head("lm_head", s.vocab, s.hidden, tied_to="model.embed_tokens.weight")
    else:
        head.head("lm_head", s.vocab, s.hidden, tied_to=None)
    place = "vision_tower.vision_tower.vision_model"
    tower = root.at(source=f"model.{place}", target=place, part="vision")
    siglip.tower(tower, vision)
    siglip.pooling_head(tower / "head", vision)
    width = vision.size("hidden_size")
    for source, target, inp in (("0", "linear_1", width), ("2", "linear_2", s.hidden)):
        layer = root.at(
            source=f"model.mm_projector.{source}", target=f"mm_projector.{target}", part="projector"
        )
        layer.tensor("weight", s.hidden, inp, kind=Kind.LINEAR)
        layer.tensor("bias", s.hidden, kind=Kind.BIAS)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out, s, vision = spell.start(config), _sizes(facts), _vision(facts)
    kind = "mlp2x_gelu"
    facts.expect("mm_projector_type", kind, default=kind, why="the runtime has no other")
    facts.expect("use_s2", False, default=False, why="the runtime takes pictures at one size")
    facts.expect("use_sliding_window", False, default=False, why="the runtime has no window")
    section = copy.deepcopy(dict(facts.data))
    for name in ("vision_config", "text_config", "auto_map", "architectures"):
        section.pop(name, None)
    llama.spell_config(section, facts, s, max_positions=32768, theta=1e6, rope_types=("default",))
    section.update(attention_bias=True, rope_traditional=False, vocab_size=int(s.vocab))
    tower = {name: int(vision.size(name)) for name in _TOWER}
    if (tower["image_size"] // tower["patch_size"]) ** 2 != 729:
        facts.problem("config.json: image_size: the runtime takes pictures of 27 by 27 patches")
    tower |= {"num_channels": 3}
    out.update(
        text_config=section,
        vision_config={
            **tower,
            "layer_norm_eps": vision.number("layer_norm_eps", 1e-6),
            "model_type": "siglip_vision_model",
        },
        mm_hidden_size=tower["hidden_size"],
        image_token_index=facts.data.get("image_token_index", -200),
        auto_map=facts.data.get("auto_map") or {},
        tie_word_embeddings=s.tied,
    )
    return out


MAP = ArchMap(
    model_type="llava-qwen2",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm",),
    parts=("text.llama", "vision.siglip"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
)

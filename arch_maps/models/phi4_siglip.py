"""Phi-4 Reasoning Vision: a SigLIP 2 tower over patches of any grid, and Phi-3's stack."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama, phi3
from arch_maps.vision import siglip

_VISION: Final = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_channels": 3,
    "patch_size": 16,
    "num_patches": 256,
    "layer_norm_eps": 1e-6,
}
"""Sizes of siglip2-so400m-patch16-naflex, which the release names instead of stating them."""
_TEXT: Final = (
    *("vocab_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"),
    *("rms_norm_eps", "hidden_size", "num_key_value_heads", "rope_theta", "rope_traditional"),
    *("partial_rotary_factor", "rope_scaling", "model_type"),
)
"""What the runtime reads of the text, and refuses more than."""


def _vision(facts: Facts) -> Facts:
    stated = facts.data.get("vision_config")
    found = facts.section("vision_config") if stated else Facts({}, parent=facts)
    return found.filled(_VISION)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    s, vision = llama.sizes(facts), _vision(facts)
    phi3.stack(root.at(source="model", target="language_model.model"), s)
    head = root.at(source="", target="language_model")
    if s.tied:
        table = "model.embed_tokens.weight"
        head.copied_head("lm_head", s.vocab, s.hidden, tied_to=table)
    else:
        head.head("lm_head", s.vocab, s.hidden, tied_to=None)
    inner = "vision_tower.vision_tower.vision_model"
    tower = root.at(source=f"model.{inner}", target=inner, part="vision")
    siglip.dense_patch_tower(tower, vision, vision.size("num_patches"))
    siglip.drop_pooling_head(tower / "head", vision)
    projector = root.at(source="model.mm_projector", target="mm_projector", part="projector")
    for index, inp in enumerate((vision.size("hidden_size"), s.hidden)):
        layer = projector.at(source=str(2 * index), target=f"linear_{index + 1}")
        layer.tensor("weight", s.hidden, inp, kind=Kind.LINEAR)
        layer.tensor("bias", s.hidden, kind=Kind.BIAS)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    s, vision = llama.sizes(facts), _vision(facts)
    facts.expect(
        "mm_projector_type",
        "mlp2x_gelu",
        default="mlp2x_gelu",
        why="the runtime has two layers with GELU between them",
    )
    facts.expect("attention_bias", False, default=False, why="the runtime has no such biases")
    if int(s.head_dim) * int(s.heads) != int(s.hidden):
        facts.problem("config.json: head_dim must be hidden_size / num_attention_heads here")
    llama.spell_config(
        out, facts, s, max_positions=32768, eps=("rms_norm_eps", 1e-5), theta=500000.0, partial=1.0
    )
    if out["rope_parameters"]["rope_type"] not in ("default", "linear"):
        facts.problem("config.json: the runtime computes unscaled or linear positions only")
    width = int(facts.size("mm_hidden_size", int(vision.size("hidden_size"))))
    if width != int(vision.size("hidden_size")):
        facts.problem("config.json: mm_hidden_size must be the tower's hidden_size")
    out.update(
        rope_traditional=False,
        mm_hidden_size=width,
        mm_vision_select_layer=facts.data.get("mm_vision_select_layer", -2),
        min_num_patches=int(facts.size("min_num_patches", 256)),
        max_num_patches=int(facts.size("max_num_patches", 3600)),
    )
    out["text_config"] = {name: out[name] for name in _TEXT}
    out["vision_config"] = {
        **{name: vision.data[name] for name in _VISION},
        "model_type": "siglip2_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
    }
    return out


MAP = ArchMap(
    model_type="phi4-siglip",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm",),
    parts=("text.phi3", "vision.siglip"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
)

"""PaddleOCR-VL: SigLIP with rotary positions, and the ERNIE 4.5 text stack, written flat."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama
from arch_maps.vision import paddleocr_vit

_SECTION: Final = [16, 24, 24]
_NAMES: Final = {"text": "model", "vision": "visual.vision_model", "projector": "mlp_AR"}
_IN_MEMORY: Final = {
    "text": "model.language_model",
    "vision": "model.visual.vision_model",
    "projector": "model.projector",
}
# The reference ties the head whatever the flat config says; releases may have one all the same.
_LAYOUTS: Final = (
    Layout("published", {**_NAMES, "head": "lm_head"}),
    Layout("tied", {**_NAMES, "head": ""}),
    Layout("transformers 5", {**_IN_MEMORY, "head": ""}),
)


def _sizes(facts: Facts) -> llama.Sizes:
    text = facts.nested("text_config")
    return replace(llama.sizes(text, kv_heads=2, head_dim=128), tied=False)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    s = _sizes(facts)
    llama.stack(root.at(source=layout["text"], target="language_model.model"), s)
    head = root.at(source="", target="language_model")
    if layout["head"]:
        head.head(layout["head"], s.vocab, s.hidden, tied_to=None)
    else:
        table = f"{layout['text']}.embed_tokens.weight"
        head.copied_head("lm_head", s.vocab, s.hidden, tied_to=table)
    vision = facts.section("vision_config")
    paddleocr_vit.tower(root.at(source=layout["vision"], target="visual", part="vision"), vision)
    joint = root.at(source=layout["projector"], target="visual.projector", part="projector")
    paddleocr_vit.projector(joint, vision)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text = facts.nested("text_config")
    s = _sizes(facts)
    text.expect("use_bias", False, default=False, why="the runtime's MLP has no biases")
    text.expect(
        "hidden_size",
        paddleocr_vit.TEXT_WIDTH,
        default=None,
        why="the runtime's projector has this width in its code",
    )
    settings = spell.rope(text, default_theta=500000.0)
    if settings["rope_type"] == "mrope":
        settings["rope_type"] = "default"
    spell.require_rope_type(text, settings, allowed=("default",))
    settings.setdefault("mrope_section", _SECTION)
    llama.expect_silu(text)
    # The runtime reads the text stack from the top level alone.
    out.update({k: v for k, v in (out.pop("text_config", None) or {}).items() if k not in out})
    spelled = spell.spell_rope(settings)
    out.update(
        **{**spelled, "rope_scaling": dict(spelled["rope_parameters"])},
        model_type="paddleocr_vl",
        vocab_size=int(s.vocab),
        hidden_size=int(s.hidden),
        intermediate_size=int(s.intermediate),
        num_hidden_layers=s.layers,
        num_attention_heads=int(s.heads),
        num_key_value_heads=int(s.kv_heads),
        head_dim=int(s.head_dim),
        rms_norm_eps=text.number("rms_norm_eps", 1e-5),
        max_position_embeddings=int(text.size("max_position_embeddings", 131072)),
        hidden_act="silu",
        use_bias=False,
        rope_traditional=False,
        tie_word_embeddings=False,
    )
    paddleocr_vit.spell_config(out["vision_config"], facts.section("vision_config"))
    for name, value in {"image": 100295, "video": 100296, "vision_start": 101305}.items():
        out.setdefault(f"{name}_token_id", value)
    out.setdefault("vision_end_token_id", 101306)
    return out


MAP = ArchMap(
    model_type="paddleocr_vl",
    tensors=_tensors,
    config=_config,
    layouts=_LAYOUTS,
    runtimes=("mlx-vlm",),
    parts=("text.llama", "vision.paddleocr_vit"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
)

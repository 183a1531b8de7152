"""What DeepSeek-OCR releases share: the text stack, the projector, and the page's separators."""

from __future__ import annotations

import copy
from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import deepseek, llama, moe

LAYOUTS: Final = (Layout("published", {}),)


def text_facts(facts: Facts) -> Facts:
    """The text stack's settings: a section of their own, or the top level."""
    return facts.nested("language_config" if "language_config" in facts.data else "text_config")


def text(root: Mount, facts: Facts, *, source: str = "") -> None:
    """DeepSeek V2's experts over plain attention, and the head, below ``source``."""
    settings = text_facts(facts)
    s, e = llama.sizes(settings), deepseek.routed(settings, fused=False)
    dense = deepseek.dense_first(settings, 1)

    def feed_forward(index: int, layer: Mount) -> None:
        if index < dense:
            llama.gated_mlp(layer / "mlp", s.hidden, s.intermediate)
        else:
            deepseek.experts(layer / "mlp", settings, e, correction=False)

    at = root.at(source=source, target="language_model")
    moe.stack(at / "model", s, feed_forward)
    at.head("lm_head", s.vocab, s.hidden, tied_to=None)


def _joint(facts: Facts) -> Facts:
    """The projector's settings; transformers 5 derives them from the parts."""
    stated = facts.section("projector_config") if "projector_config" in facts.data else facts
    derived = {"n_embed": text_facts(facts).data.get("hidden_size"), "input_dim": 2048}
    return Facts(
        {**derived, **(stated.data if stated is not facts else {})},
        path="projector_config.",
        parent=facts,
    )


def projector(root: Mount, facts: Facts, *, newline: bool) -> None:
    """The linear projector and the learned separators of pages and rows."""
    given = _joint(facts)
    size = given.size("n_embed")
    at = root.at(source="model", target="", part="projector")
    at.linear("projector.layers", size, given.size("input_dim"), bias=True)
    # The releases misspell it, the runtime does not.
    separator = at.input("view_seperator", size)
    at.rule("view_separator", separator, Kind.POSITION)
    if newline:
        at.tensor("image_newline", size, kind=Kind.POSITION)


def spell_text(config: dict[str, Any], facts: Facts, *, model_type: str) -> dict[str, Any]:
    """The config that the runtime reads, vision and projector sections left to the caller."""
    out = spell.start(config)
    settings = text_facts(facts)
    s = llama.sizes(settings)
    settings.expect("use_mla", False, default=False, why="the map has plain attention only")
    settings.expect("qk_nope_head_dim", 0, None, default=0, why="the map has plain attention only")
    settings.expect("topk_method", "greedy", default="greedy", why="the map has no groups")
    settings.expect("scoring_func", "softmax", default="softmax", why="the map has no correction")
    settings.expect(
        "norm_topk_prob", False, None, default=False, why="the runtime does not normalise them"
    )
    settings.expect("head_dim", s.hidden // s.heads, None, default=None, why="the runtime's size")
    moe.untied(settings)
    positions = spell.rope(settings)
    spell.require_rope_type(settings, positions, allowed=("default",))
    section = copy.deepcopy(dict(settings.data)) if settings is not facts else {}
    for name in ("text_config", "language_config", "vision_config", "projector_config"):
        section.pop(name, None)
    moe.spell_config(section, settings, s, max_positions=8192)
    deepseek.spell_routing(
        section, settings, dense=deepseek.dense_first(settings, 1), normalised=False
    )
    section.update(
        model_type="deepseek_v2",
        vocab_size=int(s.vocab),
        hidden_size=int(s.hidden),
        intermediate_size=int(s.intermediate),
        num_hidden_layers=s.layers,
        num_attention_heads=int(s.heads),
        attention_bias=s.attention_bias,
        topk_method="greedy",
        scoring_func="softmax",
        qk_nope_head_dim=0,
        qk_rope_head_dim=0,
        v_head_dim=0,
        kv_lora_rank=None,
        q_lora_rank=None,
        use_mla=False,
        rope_traditional=False,
    )
    facts.expect("tile_tag", "2D", default="2D", why="the runtime knows no other")
    facts.expect("global_view_pos", "head", default="head", why="the runtime knows no other")
    out.update(
        model_type=model_type,
        text_config=section,
        language_config=copy.deepcopy(section),
        tile_tag="2D",
        global_view_pos="head",
        vocab_size=int(s.vocab),
    )
    return out


def spell_config(config: dict[str, Any], facts: Facts, *, model_type: str) -> dict[str, Any]:
    """As ``spell_text``, with the linear projector that the OCR releases have."""
    out = spell_text(config, facts, model_type=model_type)
    given = _joint(facts)
    given.expect("projector_type", "linear", default="linear", why="the map has this one only")
    out["projector_config"] = {
        **out.get("projector_config", {}),
        "model_type": "mlp_projector",
        "projector_type": "linear",
        "input_dim": int(given.size("input_dim")),
        "n_embed": int(given.size("n_embed")),
    }
    return out

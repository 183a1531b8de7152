"""Qwen3-VL mixtures of experts: Qwen3-VL's vision tower over Qwen3's experts."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.ops import Permute, Slice
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama, moe, qwen_vl
from arch_maps.vision import qwen_vit

_PLACES = {"text": "model.language_model", "vision": "model.visual"}


def _sizes(text: Facts) -> llama.Sizes:
    return llama.sizes(text, kv_heads=16, qk_norm=True)


def _input_first(at: Mount, e: moe.Experts) -> None:
    """Experts as the release stacks them: [experts, in, out], gates before ups."""
    width = int(e.intermediate)
    twice = at.input("experts.gate_up_proj", e.count, e.hidden, 2 * e.intermediate)
    for name, start in (("gate_proj", 0), ("up_proj", width)):
        half = Slice(twice, 2, start, start + width)
        at.rule(f"switch_mlp.{name}.weight", Permute(half, (0, 2, 1)), Kind.LINEAR)
    down = at.input("experts.down_proj", e.count, e.intermediate, e.hidden)
    at.rule("switch_mlp.down_proj.weight", Permute(down, (0, 2, 1)), Kind.LINEAR)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    text = facts.section("text_config")
    text.expect("attention_bias", False, default=False, why="the runtimes have no such biases")
    s = _sizes(text)
    routed = moe.Experts(
        count=moe.expert_count(text, 60),
        hidden=s.hidden,
        intermediate=text.size("moe_intermediate_size", 1408),
        fused=True,
    )
    sparse = moe.sparse_layers(text, s.layers)

    def feed_forward(index: int, layer: Mount) -> None:
        if not sparse[index]:
            llama.gated_mlp(layer / "mlp", s.hidden, s.intermediate)
            return
        layer.linear("mlp.gate", routed.count, s.hidden, kind=Kind.GATE)
        if layout.fused_experts:
            moe.experts(layer / "mlp", routed)
        else:
            _input_first(layer / "mlp", routed)

    moe.stack(root.at(source=layout["text"], target="language_model.model"), s, feed_forward)
    moe.untied(facts)
    root.at(source="", target="language_model").head("lm_head", s.vocab, s.hidden, tied_to=None)
    tower = root.at(source=layout["vision"], target="vision_tower", part="vision")
    qwen_vit.tower(tower, facts.section("vision_config"))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text = facts.section("text_config")
    text.expect("norm_topk_prob", True, default=True, why="the reference always normalises")
    spelled = qwen_vl.spell_config(
        text,
        _sizes(text),
        theta=5e5,
        eps=1e-6,
        max_positions=128000,
        is_tied=False,
        section=(24, 20, 20),
    )
    section = out["text_config"]
    section.update(
        spelled,
        model_type="qwen3_vl_moe_text",
        attention_bias=False,
        num_experts_per_tok=int(text.size("num_experts_per_tok", 4)),
        moe_intermediate_size=int(text.size("moe_intermediate_size", 1408)),
        decoder_sparse_step=int(text.size("decoder_sparse_step", 1)),
        mlp_only_layers=text.data.get("mlp_only_layers") or [],
        norm_topk_prob=True,
    )
    moe.spell_expert_count(section, moe.expert_count(text, 60))
    out.update(tie_word_embeddings=False, vocab_size=int(text.size("vocab_size")))
    qwen_vl.spell_tokens(out)
    qwen_vit.spell_config(
        out["vision_config"],
        facts.section("vision_config"),
        model_type="qwen3_vl_moe",
        deepstack=True,
    )
    return out


MAP = ArchMap(
    model_type="qwen3_vl_moe",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout("published", _PLACES),
        Layout("as transformers 5 saves it", _PLACES, fused_experts=True),
    ),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "text.moe", "text.qwen_vl", "vision.qwen_vit"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
)

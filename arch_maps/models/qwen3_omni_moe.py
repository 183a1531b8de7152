"""Qwen3-Omni's thinker: it sees, hears and reads, and answers in text."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.audio import qwen3_omni as audio
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama, moe, qwen_vl
from arch_maps.vision import qwen_vit

_TALKER: Final = {
    "text_config": {
        "num_hidden_layers": 1,
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 384,
        "rms_norm_eps": 1e-6,
        "vocab_size": 3072,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
    }
}
"""What the runtime wants stated of a talker even where there is none."""
_VISION: Final = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "out_hidden_size": 3584,
    "deepstack_visual_indexes": [8, 16, 24],
}
"""The reference's values."""


def _thinker(facts: Facts) -> Facts:
    facts.expect(
        "enable_audio_output", False, default=True, why="there is no map of the talker's weights"
    )
    return facts.section("thinker_config")


def _sizes(text: Facts) -> llama.Sizes:
    return llama.sizes(text, kv_heads=4, qk_norm=True)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    thinker = _thinker(facts)
    text = thinker.section("text_config")
    text.expect("attention_bias", False, default=False, why="the runtime has no such biases")
    s = _sizes(text)
    routed = moe.Experts(
        count=moe.expert_count(text, 128),
        hidden=s.hidden,
        intermediate=text.size("moe_intermediate_size", 768),
        fused=layout.fused_experts,
    )
    sparse = moe.sparse_layers(text, s.layers)

    def feed_forward(index: int, layer: Mount) -> None:
        if sparse[index]:
            layer.linear("mlp.gate", routed.count, s.hidden, kind=Kind.GATE)
            moe.experts(layer / "mlp", routed)
        else:
            llama.gated_mlp(layer / "mlp", s.hidden, s.intermediate)

    at = root / "thinker"
    moe.stack(at.at(source="model", target="language_model.model"), s, feed_forward)
    moe.untied(text)
    head = at.at(source="", target="language_model")
    head.head("lm_head", s.vocab, s.hidden, tied_to=None)
    tower = at.at(source="visual", target="vision_tower", part="vision")
    seeing = thinker.section("vision_config").filled(_VISION)
    qwen_vit.tower(tower, seeing, names=qwen_vit.QWEN2_MERGER)
    hearing = thinker.section("audio_config").filled(audio.DEFAULTS)
    audio.tower(at.at(source="audio_tower", target="audio_tower", part="audio"), hearing)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    thinker = _thinker(facts)
    text = thinker.section("text_config")
    spelled = qwen_vl.spell_config(
        text,
        _sizes(text),
        theta=1e6,
        eps=1e-6,
        max_positions=32768,
        is_tied=False,
        section=(24, 20, 20),
    )
    section = out["thinker_config"]
    section["text_config"].update(
        spelled,
        model_type="qwen3_omni_moe_text",
        attention_bias=False,
        num_experts_per_tok=int(text.size("num_experts_per_tok", 8)),
        moe_intermediate_size=int(text.size("moe_intermediate_size", 768)),
        decoder_sparse_step=int(text.size("decoder_sparse_step", 1)),
        mlp_only_layers=text.data.get("mlp_only_layers") or [],
        norm_topk_prob=text.flag("norm_topk_prob", True),
    )
    moe.spell_expert_count(section["text_config"], moe.expert_count(text, 128))
    seeing = thinker.section("vision_config").filled(_VISION)
    section["vision_config"] = dict(seeing.data)
    qwen_vit.spell_config(
        section["vision_config"],
        seeing,
        model_type="qwen3_omni_moe_vision_encoder",
        deepstack=True,
    )
    hearing = thinker.section("audio_config").filled(audio.DEFAULTS)
    section["audio_config"] = audio.spell_config(hearing)
    section["audio_token_id"] = int(thinker.size("audio_token_id", 151646))
    section["audio_start_token_id"] = int(thinker.size("audio_start_token_id", 151647))
    qwen_vl.spell_tokens(section)
    out.update(enable_audio_output=False, talker_config=_TALKER, code2wav_config={})
    return out


MAP = ArchMap(
    model_type="qwen3_omni_moe",
    tensors=_tensors,
    config=_config,
    layouts=moe.LAYOUTS,
    runtimes=("mlx-vlm",),
    parts=("text.llama", "text.moe", "text.qwen_vl", "vision.qwen_vit", "audio.qwen3_omni"),
    modalities=("text", "image", "audio"),
    pipeline_tag="any-to-any",
    remarks=("Releases that also speak are refused: the talker's weights have no map.",),
)

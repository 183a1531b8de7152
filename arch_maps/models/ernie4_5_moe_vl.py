"""ERNIE 4.5 VL: experts for text and others for pictures, rotary positions of three axes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.ops import Permute, Reshape, Slice
from arch_maps.projectors import ernie_resampler
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama, moe
from arch_maps.vision import ernie_vit

_KINDS: Final = (("gate.weight", "gate"), ("gate.weight_1", "gate_1"))
"""The release's routers of text and of pictures, and the runtime's."""
_SECTION: Final = [22, 22, 20]
TOKENS: Final = {
    **{"im_patch_id": 100295, "image_start_token_id": 101304, "image_end_token_id": 101305},
    **{"video_start_token_id": 101306, "video_end_token_id": 101307},
}
"""Token ids that the reference has in code."""


def _sizes(facts: Facts) -> llama.Sizes:
    found = llama.sizes(facts, kv_heads=4, tied=True)
    if found.head_dim * found.heads != found.hidden:
        facts.problem(
            f"config.json: head_dim ({found.head_dim}) times num_attention_heads ({found.heads}) "
            f"must be hidden_size ({found.hidden}), as the runtime divides it"
        )
    return replace(found, attention_bias=False, mlp_bias=False)


def sparse_layers(facts: Facts, layers: int) -> tuple[int, int, list[bool]]:
    """First and last layer that may have experts, and which layers have them."""
    first = min(facts.pair("moe_layer_start_index", (1, 1)))
    last = layers - 1
    if facts.data.get("moe_layer_end_index") not in (None, -1):
        last = min(last, max(facts.pair("moe_layer_end_index", (last, last))))
    every = int(facts.size("moe_layer_interval", 1))
    return first, last, [first <= i <= last and (i + 1) % every == 0 for i in range(layers)]


def _experts(block: Mount, facts: Facts, s: llama.Sizes) -> None:
    counts, widths = experts_of(facts)
    block_bias = block.input("moe_statics.e_score_correction_bias", 2, counts[0])
    for kind, (source, target) in enumerate(_KINDS):
        turned = Permute(block.input(source, s.hidden, counts[kind]), (1, 0))
        block.rule(f"{target}.weight", turned, Kind.GATE)
        end = target.removeprefix("gate")
        one = Reshape(Slice(block_bias, 0, kind, kind + 1), (counts[0],))
        block.rule(f"e_score_correction_bias{end}", one, Kind.STATE)
        e = moe.Experts(count=counts[kind], hidden=s.hidden, intermediate=widths[kind], fused=False)
        moe.experts(block, e, target=f"switch_mlp{end}", first=kind * counts[0])
    shared = facts.data.get("moe_num_shared_experts", 2)
    if shared:
        width = facts.size("moe_num_shared_experts", 2) * widths[0]
        llama.gated_mlp(block / "shared_experts", s.hidden, width)


def experts_of(facts: Facts) -> tuple[tuple[int, int], tuple[int, int]]:
    """How many experts text and pictures have, and their widths."""
    counts = facts.pair("moe_num_experts", (64, 64))
    if counts[0] != counts[1]:
        facts.problem(
            f"config.json: moe_num_experts is {list(counts)}; the reference has as many experts "
            "for pictures as for text"
        )
    return counts, facts.pair("moe_intermediate_size", (1536, 512))


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    facts.expect("use_bias", False, default=False, why="the reference's experts have no biases")
    s = _sizes(facts)
    _, _, sparse = sparse_layers(facts, s.layers)

    def feed_forward(index: int, layer: Mount) -> None:
        if sparse[index]:
            _experts(layer / "mlp", facts, s)
        else:
            llama.gated_mlp(layer / "mlp", s.hidden, s.intermediate)

    moe.stack(root.at(source=layout["text"], target="language_model.model"), s, feed_forward)
    table = f"{layout['text']}.embed_tokens.weight" if s.tied else None
    root.at(source="", target="language_model").head("lm_head", s.vocab, s.hidden, tied_to=table)
    vision = facts.section("vision_config")
    ernie_vit.tower(root.at(source=layout["vision"], target="vision_tower", part="vision"), vision)
    joint = root.at(source=layout["projector"], target="resampler_model", part="projector")
    seen = vision.size("hidden_size", ernie_vit.WIDTH)
    ernie_resampler.resampler(joint, facts, patch=seen, hidden=s.hidden)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    why = "the runtime computes it so for this type"
    facts.expect("moe_norm_min", 1e-12, None, default=1e-12, why=why)
    facts.expect("moe_gate_act", "softmax", None, default="softmax", why=why)
    facts.expect("use_temporal_conv", True, default=True, why="the reference always joins frames")
    facts.expect("temporal_conv_size", ernie_resampler.FRAMES, default=2, why=why)
    facts.expect("rms_norm_eps", 1e-5, default=1e-5, why="the runtime's resampler has it in code")
    out = spell.start(config)
    s, vision = _sizes(facts), facts.section("vision_config")
    counts, widths = experts_of(facts)
    first, last, _ = sparse_layers(facts, s.layers)
    settings = spell.rope(facts, default_theta=5e5)
    section = settings.setdefault("mrope_section", _SECTION)
    if len(section) != 3 or section[0] != section[1] or 2 * sum(section) != int(s.head_dim):
        facts.problem(
            f"config.json: mrope_section is {section}; rows and columns turn by turns, so that "
            f"theirs are equal, and the three make half of a head ({s.head_dim})"
        )
    moe.spell_config(out, facts, s, max_positions=131072, eps=1e-5, theta=5e5)
    for name in ("rope_parameters", "rope_scaling"):
        out[name] = {**out["rope_parameters"], "mrope_section": list(section)}
    ernie_vit.spell_config(out["vision_config"], vision)
    facts.expect(
        "spatial_conv_size",
        out["vision_config"]["spatial_merge_size"],
        default=out["vision_config"]["spatial_merge_size"],
        why="patches are in the order of those that are joined",
    )
    for name, default in TOKENS.items():
        out.setdefault(name, default)
    out.update(
        model_type="ernie4_5_moe_vl",
        hidden_act="silu",
        use_bias=False,
        moe_num_experts=list(counts),
        moe_k=int(facts.size("moe_k", 6)),
        moe_intermediate_size=list(widths),
        moe_num_shared_experts=int(facts.data.get("moe_num_shared_experts", 2) or 0),
        moe_layer_start_index=first,
        moe_layer_end_index=last,
        moe_layer_interval=int(facts.size("moe_layer_interval", 1)),
        moe_gate_act="softmax",
        moe_norm_min=1e-12,
        freq_allocation=int(section[2]),
        mrope_section=list(section),
        pixel_hidden_size=int(vision.size("hidden_size", ernie_vit.WIDTH)),
        spatial_conv_size=int(facts.size("spatial_conv_size", 2)),
        temporal_conv_size=ernie_resampler.FRAMES,
        use_temporal_conv=True,
        image_token_id=out["im_patch_id"],
    )
    return out


MAP = ArchMap(
    model_type="ernie4_5_moe_vl",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout(
            "published",
            {"text": "model", "vision": "vision_model", "projector": "model.resampler_model"},
        ),
    ),
    runtimes=("mlx-vlm",),
    parts=("text.llama", "text.moe", "vision.ernie_vit", "projectors.ernie_resampler"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
    remarks=(
        "mlx-vlm 0.7.10 never tells its generation which tokens are a picture's, so that the "
        "experts for pictures are stored but not used.",
        "mlx-vlm 0.7.10 lets the patches of the third picture of a prompt and of those after it "
        "see each other.",
    ),
)

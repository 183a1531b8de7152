"""GOT-OCR 2.0: a SAM tower in front of Qwen 0.5B, written flat."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama
from arch_maps.vision import deepencoder

_TOWER: Final = {"embed_dim": 768, "depth": 12, "num_heads": 12, "out_dim": 1024}
"""What the release has in its code, and the runtime by default."""
_NECK: Final = ("conv1", "norm1", "conv2", "norm2")
_HERE: Final = "vision_tower_high."
_LEAVES: Final = {
    f"{_HERE}{name}.{leaf}": f"{_HERE}neck.{index}.{leaf}"
    for index, name in enumerate(_NECK)
    for leaf in ("weight", "bias")
}


def _vision(facts: Facts) -> Facts:
    stated = facts.section("vision_config") if "vision_config" in facts.data else Facts({})
    return Facts(stated.data, path="vision_config.", parent=facts).filled(_TOWER)


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts, qkv_bias=True, tied=True)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    s, vision = _sizes(facts), _vision(facts)
    text = root.at(source="", target="language_model")
    llama.stack(text / "model", s)
    text.head("lm_head", s.vocab, s.hidden, tied_to="model.embed_tokens.weight" if s.tied else None)
    out = vision.size("out_dim")
    tower = root.at(source=f"model.{_HERE[:-1]}", target="vision_tower", part="vision")
    sizes = {**deepencoder.SAM, "width": int(vision.size("embed_dim"))}
    sizes.update(layers=vision.count("depth"), heads=int(vision.size("num_heads")))
    deepencoder.sam(tower, out, sizes=sizes, neck=_NECK)
    joint = root.at(source="model", target="", part="projector")
    dense = joint.at(source="mm_projector_vary", target="multi_modal_projector")
    dense.tensor("weight", s.hidden, out, kind=Kind.LINEAR)
    dense.tensor("bias", s.hidden, kind=Kind.BIAS)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    s, vision = _sizes(facts), _vision(facts)
    facts.expect("use_sliding_window", False, default=False, why="the runtime has no window")
    llama.spell_config(out, facts, s, max_positions=32768)
    tower = {name: int(vision.size(name)) for name in _TOWER}
    fixed = {"img_size": 1024, "patch_size": 16, "window_size": 14, "out_chans": 256}
    windows = deepencoder.SAM["global_attn_indexes"]
    out["vision_config"] = {**tower, **fixed, "model_type": "got", "global_attn_indexes": windows}
    for name, value in {"im_patch_token": 151859, "im_start_token": 151857}.items():
        out.setdefault(name, value)
    out.setdefault("im_end_token", 151858)
    out.update(model_type="got", rope_traditional=False)
    return out


MAP = ArchMap(
    model_type="got",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}, _LEAVES),),
    runtimes=("mlx-vlm",),
    parts=("text.llama", "vision.deepencoder"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
)

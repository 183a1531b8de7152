"""Granite Vision 3.1 to 3.3: LLaVA-NeXT with SigLIP, read at several depths, and Granite."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.projectors import llava as parts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import granite, llama
from arch_maps.vision import siglip

_TEXT = {**llama.DEFAULTS, "tie_word_embeddings": False}


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts.section("text_config").filled(_TEXT))


def _tied(facts: Facts) -> bool:
    return facts.flag("tie_word_embeddings", False) or _sizes(facts).tied


def _depths(facts: Facts) -> int | list[int]:
    """The layers whose outputs the projector reads, side by side."""
    found = facts.data.get("vision_feature_layer", -2)
    listed = found if isinstance(found, list) else [found]
    if not listed or not all(type(item) is int for item in listed):
        facts.problem("config.json: vision_feature_layer must be a layer or a list of layers")
        return -2
    return listed if isinstance(found, list) else listed[0]


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    s = _sizes(facts)
    llama.stack(parts.text(root, layout), s)
    head = root.at(source=layout["head"], target="language_model")
    if _tied(facts):
        table = f"{layout['text']}.embed_tokens.weight"
        head.copied_head("lm_head", s.vocab, s.hidden, tied_to=table)
    else:
        head.head("lm_head", s.vocab, s.hidden, tied_to=None)
    vision = facts.section("vision_config").filled(siglip.DEFAULTS)
    tower = parts.vision(root, layout)
    siglip.tower(tower, vision)
    siglip.pooling_head(tower / "head", vision)
    depths = _depths(facts)
    read = 1 if isinstance(depths, int) else len(depths)
    parts.two_layers(parts.projector(root, layout), vision.size("hidden_size") * read, s.hidden)
    newline = root.at(source=layout["root"], target="", part="projector")
    newline.tensor("image_newline", s.hidden, kind=Kind.POSITION)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text, vision = facts.section("text_config").filled(_TEXT), facts.section("vision_config")
    facts.expect("projector_hidden_act", "gelu", default="gelu", why="the runtime computes GELU")
    facts.expect("multimodal_projector_bias", True, default=True, why="the runtime has biases")
    vision.expect("vision_use_head", True, default=True, why="the runtime has a pooling head")
    s = _sizes(facts)
    section = out["text_config"] = {**text.data}
    llama.spell_config(section, text, s, max_positions=2048)
    if int(s.head_dim) * int(s.heads) != int(s.hidden):
        facts.problem("config.json: head_dim must be hidden_size / num_attention_heads here")
    section.update(
        granite.scales(text),
        model_type="granite",
        attention_bias=s.attention_bias,
        mlp_bias=s.mlp_bias,
        rope_traditional=False,
        tie_word_embeddings=_tied(facts),
    )
    siglip.spell_config(out["vision_config"], vision)
    image = int(facts.size("image_token_index", int(facts.data.get("image_token_id", 32000))))
    out.update(
        model_type="granite_vision",
        tie_word_embeddings=_tied(facts),
        vocab_size=int(s.vocab),
        image_token_index=image,
        vision_feature_layer=_depths(facts),
        vision_feature_select_strategy=facts.data.get("vision_feature_select_strategy", "default"),
    )
    return out


MAP = ArchMap(
    model_type="granite_vision",
    tensors=_tensors,
    config=_config,
    layouts=parts.LAYOUTS,
    runtimes=("mlx-vlm",),
    parts=("text.llama", "vision.siglip", "projectors.llava"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
    remarks=(
        "Released as llava_next; its runtime is granite_vision, which config.json names.",
        "mlx-vlm 0.7.10 puts whole tiles where single picture tokens belong, without the order "
        "and the line ends that the release gives them: pictures come out wrong.",
        "transformers' class leaves out Granite's logits_scaling; the comparison puts it back.",
    ),
)

"""Idefics2: SigLIP over pictures of any shape, a perceiver, and the Mistral stack."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.projectors import idefics2 as parts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama
from arch_maps.vision import siglip

_TEXT: Final = {
    **llama.DEFAULTS,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
}
_VISION: Final = {**siglip.DEFAULTS, "patch_size": 32}


def _text(facts: Facts) -> Facts:
    return facts.section("text_config").filled(_TEXT)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    s = llama.sizes(_text(facts))
    llama.stack(root.at(source=layout["text"], target="language_model"), s)
    head = root.at(source="", target="language_model")
    if facts.flag("tie_word_embeddings", False):
        table = f"{layout['text']}.embed_tokens.weight"
        head.copied_head("lm_head", s.vocab, s.hidden, tied_to=table)
    else:
        head.head("lm_head", s.vocab, s.hidden, tied_to=None)
    vision = facts.section("vision_config").filled(_VISION)
    siglip.tower(root.at(source="model.vision_model", target="vision_model", part="vision"), vision)
    parts.connector(
        root.at(source="model.connector", target="connector", part="projector"),
        facts.section("perceiver_config"),
        vision=vision.size("hidden_size"),
        hidden=s.hidden,
        intermediate=s.intermediate,
    )


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text = _text(facts)
    text.expect("model_type", "mistral", default="mistral", why="the runtime has no other stack")
    s = llama.sizes(text)
    if int(s.head_dim) * int(s.heads) != int(s.hidden):
        facts.problem("config.json: head_dim must be hidden_size / num_attention_heads here")
    section = out["text_config"] = {**text.data}
    llama.spell_config(section, text, s, max_positions=4096 * 32)
    if section["rope_parameters"]["rope_type"] != "default":
        facts.problem("config.json: the runtime computes unscaled positions only")
    if facts.section("text_config").data.get("sliding_window", 4096) is not None:
        facts.note(
            f"the release attends to the last {text.size('sliding_window')} tokens; the runtime "
            "attends to all of them, so results agree up to that length only"
        )
    section.update(
        model_type="mistral",
        sliding_window=None,
        rope_traditional=False,
        tie_word_embeddings=False,
    )
    siglip.spell_config(
        out["vision_config"],
        facts.section("vision_config"),
        model_type="idefics2",
        defaults=_VISION,
    )
    parts.spell_config(out["perceiver_config"], facts.section("perceiver_config"), text)
    image = int(facts.size("image_token_id", 32001))
    out.update(
        tie_word_embeddings=False,
        vocab_size=int(s.vocab),
        image_token_id=image,
        image_token_index=image,
    )
    return out


MAP = ArchMap(
    model_type="idefics2",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {"text": "model.text_model"}),),
    runtimes=("mlx-vlm",),
    parts=("text.llama", "vision.siglip", "projectors.idefics2"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
    remarks=(
        "mlx-vlm 0.7.10 places patches one bucket off, lets padding take part, computes "
        "x*sigmoid(1.7x) in the tower for tanh GELU, and has epsilons of its own: pictures come "
        "out wrong.",
    ),
)

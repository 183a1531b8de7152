"""Gemma 3 with vision: a SigLIP tower pooled to a few tokens, and the Gemma 3 text stack."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.projectors import llava as parts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import gemma3, llama
from arch_maps.vision import siglip


def _text(facts: Facts) -> Facts:
    return facts.section("text_config").filled(gemma3.DEFAULTS)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    facts.expect(
        "tie_word_embeddings", True, default=True, why="the runtimes reuse the input embedding"
    )
    s = gemma3.sizes(_text(facts))
    llama.stack(parts.text(root, layout), s)
    # mlx-vlm has a head of its own and fills it with the table, codes without their scales.
    table = f"{layout['text']}.embed_tokens.weight"
    head = root.at(source=layout["head"], target="language_model")
    head.copied_head("lm_head", s.vocab, s.hidden, tied_to=table)
    vision = facts.section("vision_config").filled(siglip.DEFAULTS)
    siglip.tower(parts.vision(root, layout), vision)
    projector = parts.projector(root, layout)
    width = vision.size("hidden_size")
    projector.tensor("mm_input_projection_weight", width, s.hidden, kind=Kind.LINEAR)
    projector.norm("mm_soft_emb_norm", width)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text = _text(facts)
    tokens = int(facts.size("mm_tokens_per_image", 256))
    out["text_config"] = {
        **gemma3.spell_config(text),
        "model_type": "gemma3_text",
        "mm_tokens_per_image": tokens,
    }
    facts.section("vision_config").expect(
        "vision_use_head", False, default=None, why="the runtime has no pooling head"
    )
    siglip.spell_config(out["vision_config"], facts.section("vision_config"))
    out.update(
        mm_tokens_per_image=tokens,
        # The runtime divides picture features by its square root before it scales everything.
        hidden_size=int(text.size("hidden_size")),
        vocab_size=int(text.size("vocab_size")),
        image_token_index=int(facts.size("image_token_index", 262144)),
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    return out


MAP = ArchMap(
    model_type="gemma3",
    tensors=_tensors,
    config=_config,
    layouts=parts.LAYOUTS,
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.gemma3", "vision.siglip", "projectors.llava"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
    remarks=(
        "The tied table is stored a second time as the head, which mlx-vlm expects in the files.",
        "Both runtimes round the embedding scale to bfloat16 in every precision.",
    ),
)

"""LLaVA-NeXT (1.6): LLaVA over tiles of a picture, each row of patches ended by a newline."""

from __future__ import annotations

from typing import Any

from arch_maps.facts import Facts
from arch_maps.projectors import llava as parts
from arch_maps.projectors import llava_clip
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    llava_clip.tensors(root, facts, layout)
    text = llava_clip.text(facts)
    vocab, hidden = text.size("vocab_size"), text.size("hidden_size")
    head = root.at(source=layout["head"], target="language_model")
    if llava_clip.tied(facts):
        table = f"{layout['text']}.embed_tokens.weight"
        head.copied_head("lm_head", vocab, hidden, tied_to=table)
    else:
        head.head("lm_head", vocab, hidden, tied_to=None)
    newline = root.at(source=layout["root"], target="", part="projector")
    newline.tensor("image_newline", hidden, kind=Kind.POSITION)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    text = facts.section("text_config").data
    if text.get("model_type") == "mistral" and text.get("sliding_window", 4096) is not None:
        facts.problem("config.json: text_config.sliding_window: the runtime attends to everything")
    return llava_clip.spell_config(config, facts, stacks=("llama", "mistral"))


MAP = ArchMap(
    model_type="llava_next",
    tensors=_tensors,
    config=_config,
    layouts=parts.LAYOUTS,
    runtimes=("mlx-vlm",),
    parts=("text.llama", "vision.clip", "projectors.llava_clip"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
    remarks=(
        "mlx-vlm 0.7.10 puts whole tiles where single picture tokens belong, without the order "
        "and the line ends that the release gives them: pictures come out wrong.",
    ),
)

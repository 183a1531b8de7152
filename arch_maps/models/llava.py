"""LLaVA 1.5: a CLIP tower, a two-layer projector and the Llama stack."""

from __future__ import annotations

from arch_maps.facts import Facts
from arch_maps.projectors import llava as parts
from arch_maps.projectors import llava_clip
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    llava_clip.tensors(root, facts, layout)
    text = llava_clip.text(facts)
    vocab, hidden = text.size("vocab_size"), text.size("hidden_size")
    parts.head(root, layout, vocab, hidden, tied=llava_clip.tied(facts))


MAP = ArchMap(
    model_type="llava",
    tensors=_tensors,
    config=llava_clip.spell_config,
    layouts=parts.LAYOUTS,
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "vision.clip", "projectors.llava_clip"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
    remarks=(
        "mlx-vlm 0.7.10's processor for this type passes the image processor text settings, which "
        "transformers 5 refuses; with pictures prepared by the release's own, outputs agree.",
    ),
)

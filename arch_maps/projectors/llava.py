"""LLaVA's shape: a vision tower, a small projector and a text stack beside each other."""

from __future__ import annotations

from typing import Final

from arch_maps.rules import Layout, Mount

LAYOUTS: Final = (
    Layout(
        "published",
        {
            "text": "language_model.model",
            "head": "language_model",
            "vision": "vision_tower.vision_model",
            "projector": "multi_modal_projector",
            "root": "",
        },
    ),
    Layout(
        "as transformers 5 saves it",
        {
            "text": "language_model.model",
            "head": "language_model",
            "vision": "vision_tower",
            "projector": "multi_modal_projector",
            "root": "",
        },
    ),
    Layout(
        "transformers",
        {
            "text": "model.language_model",
            "head": "",
            "vision": "model.vision_tower.vision_model",
            "projector": "model.multi_modal_projector",
            "root": "model",
        },
    ),
    Layout(
        "transformers, with a bare tower",
        {
            "text": "model.language_model",
            "head": "",
            "vision": "model.vision_tower",
            "projector": "model.multi_modal_projector",
            "root": "model",
        },
    ),
)
"""Where the parts live in the source; their targets are the published ones."""

PIXTRAL_LAYOUTS: Final = tuple(
    layout for layout in LAYOUTS if not layout["vision"].endswith(".vision_model")
)
"""The same, for a tower that never had a ``vision_model`` inside."""

NESTED_LAYOUTS: Final = (LAYOUTS[3], LAYOUTS[2])
"""Of types that came after transformers put all parts below ``model``."""


def text(root: Mount, layout: Layout) -> Mount:
    """Where the text stack goes."""
    return root.at(source=layout["text"], target="language_model.model")


def head(root: Mount, layout: Layout, vocab: int, hidden: int, *, tied: bool) -> None:
    """The output projection beside the text stack."""
    at = root.at(source=layout["head"], target="language_model")
    table = f"{layout['text']}.embed_tokens.weight"
    at.head("lm_head", vocab, hidden, tied_to=table if tied else None)


def vision(root: Mount, layout: Layout, target: str = "vision_tower.vision_model") -> Mount:
    """Where the vision tower goes."""
    return root.at(source=layout["vision"], target=target, part="vision")


def projector(root: Mount, layout: Layout) -> Mount:
    """Where the projector goes."""
    return root.at(source=layout["projector"], target="multi_modal_projector", part="projector")


def two_layers(at: Mount, inp: int, out: int, *, bias: bool = True) -> None:
    """Two dense layers, the first one widening to the text's width."""
    at.linear("linear_1", out, inp, bias=bias)
    at.linear("linear_2", out, out, bias=bias)

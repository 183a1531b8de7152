"""Florence-2: a DaViT tower whose picture an encoder reads before a task, and a decoder answers."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.ops import Permute
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import bart
from arch_maps.vision import davit

_NATIVE = "transformers"


def _text(facts: Facts) -> Facts:
    return facts.section("text_config").filled(bart.DEFAULTS)


def _positions(vision: Facts) -> tuple[int, int]:
    """Rows of the picture's position table and of its table of times, from either spelling."""
    place = vision.data.get("image_pos_embed")
    time = vision.data.get("visual_temporal_embedding")
    if isinstance(place, dict) and isinstance(time, dict):
        return (
            int(Facts(place, parent=vision).size("max_pos_embeddings")),
            int(Facts(time, parent=vision).size("max_temporal_embeddings")),
        )
    return (
        int(vision.size("max_position_embeddings", 50)),
        int(vision.size("max_temporal_embeddings", 100)),
    )


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    text, vision = _text(facts), davit.facts_of(facts.section("vision_config"))
    vocab, width = text.size("vocab_size"), text.size("d_model")
    body = root.at(source=layout["text"], target="language_model.model")
    bart.model(body, text)
    head = root.at(source=layout["head"], target="language_model")
    head.copied_head("lm_head", vocab, width, tied_to=f"{layout['text']}.shared.weight")
    reason = "zeros, which the runtime does not add"
    head.drop("final_logits_bias", reason, 1, vocab)
    tower = root.at(source=layout["vision"], target="vision_tower", part="vision")
    davit.tower(tower, vision)
    deep, (rows, times) = davit.stages(vision, "embed_dim")[-1], _positions(vision)
    projector = root.at(source=layout["projector"], target="", part="projector")
    if layout.name == _NATIVE:
        dense = Permute(projector.input("image_projection.weight", width, deep), (1, 0))
        projector.rule("image_projection", dense, Kind.POSITION)
    else:
        projector.tensor("image_projection", deep, width, kind=Kind.POSITION)
    projector.norm("image_proj_norm", width, bias=True)
    for name, size in (("row", deep // 2), ("column", deep - deep // 2)):
        table = f"image_pos_embed.{name}_embeddings"
        projector.embedding(table, rows, size, kind=Kind.POSITION)
    projector.tensor("visual_temporal_embed.pos_idx_to_embed", times, deep, kind=Kind.POSITION)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text, vision = _text(facts), davit.facts_of(facts.section("vision_config"))
    bart.spell_config(out["text_config"], text)
    davit.spell_config(out["vision_config"], vision)
    rows, times = _positions(vision)
    both = {
        "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
        "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": rows},
        "visual_temporal_embedding": {"type": "COSINE", "max_temporal_embeddings": times},
    }
    source = vision.data.get("image_feature_source", both["image_feature_source"])
    if source != both["image_feature_source"]:
        facts.problem("config.json: image_feature_source must be the spatial, then the temporal")
    out["vision_config"].update(both)
    image = facts.data.get("image_token_id", 51289)
    out.update(
        both,
        image_token_id=image,
        image_token_index=image,
        vocab_size=int(text.size("vocab_size")),
        is_encoder_decoder=True,
        tie_word_embeddings=True,
    )
    return out


MAP = ArchMap(
    model_type="florence2",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout(
            _NATIVE,
            {
                "text": "model.language_model",
                "head": "",
                "vision": "model.vision_tower",
                "projector": "model.multi_modal_projector",
            },
            davit.TRANSFORMERS
            | {
                f"image_pos_embed.{name}_embeddings.weight": (
                    f"image_position_embed.{name}_embeddings.weight"
                )
                for name in ("row", "column")
            },
        ),
        Layout(
            "the first release's own code",
            {
                "text": "language_model.model",
                "head": "language_model",
                "vision": "vision_tower",
                "projector": "",
            },
        ),
    ),
    runtimes=("mlx-vlm",),
    parts=("text.bart", "vision.davit"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
    remarks=(
        "The reference reads weights under transformers' names; under those of the first release "
        "they are converted, and judged only where its own code may run.",
    ),
)

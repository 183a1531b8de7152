"""NVIDIA's omni releases: Nemotron-H reads, C-RADIO sees, and Parakeet hears where there is one.

Nemotron 3 Nano Omni names itself and its parts otherwise than transformers does; Nemotron 3.5
Super VL has transformers' own model_type and no ears.
"""

from __future__ import annotations

import copy
from typing import Any, Final

from arch_maps import config as spell
from arch_maps.audio import parakeet
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import nemotron_h
from arch_maps.vision import radio

_OLDER: Final = {
    "text_config": "llm_config",
    "audio_config": "sound_config",
    "vision_hidden_size": "vit_hidden_size",
    "image_token_id": "img_context_token_id",
    "video_token_id": "video_context_token_id",
    "audio_token_id": "sound_context_token_id",
}
"""Names of transformers' config, and what releases call them; transformers reads both."""
_HEARING: Final = {**parakeet.DEFAULTS, "attention_bias": False, "scale_input": False}
"""The encoder's defaults in this type: its releases leave out that two of them are off."""
_PUBLISHED: Final = "published"
_FOLD: Final = 2
"""Patches of a row and of a column that become one token."""


def _named(facts: Facts, name: str) -> str:
    """What the release calls ``name``: the newer spelling where it has both."""
    older = _OLDER[name]
    return older if facts.data.get(name) is None and facts.data.get(older) is not None else name


def _text(facts: Facts) -> Facts:
    return facts.section(_named(facts, "text_config"))


def _audio(facts: Facts) -> Facts | None:
    name = _named(facts, "audio_config")
    return None if facts.data.get(name) is None else facts.section(name).filled(_HEARING)


def _normed(text: Facts) -> bool:
    """Whether the tower's features are normed: in releases trained to predict further tokens."""
    return bool(text.data.get("num_nextn_predict_layers"))


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    text = _text(facts)
    width, hidden = text.size("hidden_size"), facts.size("projector_hidden_size", 4096)
    nemotron_h.causal_lm(
        root / "language_model", text, model=layout["model"], fused=layout.fused_experts
    )
    tower = root.at(
        source="vision_model.radio_model", target="vision_model.radio_model", part="vision"
    )
    released = layout.name == _PUBLISHED
    radio.tower(tower, facts.section("vision_config"), released=released)
    for at in (tower, root / "vision_model"):
        at.drop("summary_idxs", "which tokens sum up a picture; nothing reads them here")
    seen = facts.size(_named(facts, "vision_hidden_size"), 1280)
    if _normed(text):
        norm = root.at(source="vision_projector", target="", part="projector")
        norm.norm("vision_final_layernorm", seen, bias=True)
    joined = _FOLD * _FOLD * seen
    projector = root.at(source="mlp1", target="mlp1.layers", part="projector")
    projector.norm("0", joined)
    projector.linear("1", hidden, joined)
    projector.linear("3", width, hidden)
    hearing = _audio(facts)
    if hearing is None:
        return
    encoder = root.at(source="sound_encoder.encoder", target="sound_encoder.encoder", part="audio")
    parakeet.encoder(encoder, hearing)
    parakeet.drop_features(encoder, hearing, required=released)
    inner, biased = hearing.size("projection_hidden_size"), hearing.flag("projection_bias", False)
    heard = root.at(source="sound_projection", target="sound_projection", part="projector")
    heard.norm("norm", hearing.size("hidden_size"))
    heard.linear("linear1", inner, hearing.size("hidden_size"), bias=biased)
    heard.linear("linear2", width, inner, bias=biased)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    facts.expect("downsample_ratio", 0.5, default=0.5, why="the reference folds two by two patches")
    facts.expect("ps_version", "v2", default="v2", why="the reference folds as version 2 does")
    out, text = spell.start(config), _text(facts)
    reading = copy.deepcopy(dict(text.data))
    reading = spell.start(reading)
    nemotron_h.spell_config(reading, text)
    reading.update(
        model_type="nemotron_h",
        num_nextn_predict_layers=int(text.data.get("num_nextn_predict_layers") or 0),
    )
    seeing = facts.section("vision_config")
    radio.spell_config(out["vision_config"], seeing)
    frames = int(radio.filled(seeing).size("video_temporal_patch_size"))
    facts.expect(
        "video_temporal_patch_size", frames, default=frames, why="the tower takes so many frames"
    )
    hearing = _audio(facts)
    named = {
        "text_config": reading,
        "audio_config": None if hearing is None else parakeet.spell_config(hearing),
        "vision_hidden_size": int(facts.size(_named(facts, "vision_hidden_size"), 1280)),
    }
    for token in ("image_token_id", "video_token_id", "audio_token_id"):
        named[token] = facts.data.get(_named(facts, token))
    for name, value in named.items():
        out[name], out[_OLDER[name]] = copy.deepcopy(value), copy.deepcopy(value)
    if hearing is not None:
        # transformers takes the name of an encoder's type, the runtime and the release another.
        out["audio_config"]["model_type"] = "parakeet_encoder"
        out["sound_config"]["model_type"] = "parakeet"
    out.update(
        model_type="nemotron_h_omni",
        image_token_index=named["image_token_id"],
        downsample_ratio=0.5,
        ps_version="v2",
        projector_hidden_size=int(facts.size("projector_hidden_size", 4096)),
        vision_final_layernorm=_normed(text),
        video_pruning_rate=facts.number("video_pruning_rate", 0.0),
        video_temporal_patch_size=frames,
        tie_word_embeddings=False,
    )
    return out


MAP = ArchMap(
    model_type="nemotron_h_omni",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout(_PUBLISHED, {"model": "backbone"}),
        Layout("as transformers saves it", {"model": "backbone"}),
    ),
    runtimes=("mlx-vlm",),
    parts=(
        *("text.nemotron_h", "text.mamba2", "text.llama", "text.moe"),
        *("vision.radio", "audio.parakeet"),
    ),
    modalities=("text", "image", "audio", "video"),
    pipeline_tag="any-to-any",
    remarks=(
        "mlx-vlm 0.7.10 reads how many tokens and registers the tower has from the names of the "
        "first release alone: by its own converter it does not load a release that states them by "
        "transformers' names (Nemotron 3.5 Super VL).",
        "mlx-vlm's converter tells a torch checkpoint by its stored mel filters: one that "
        "transformers saved has none, and its convolutions stay as torch has them.",
    ),
)

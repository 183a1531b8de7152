"""Phi-4 Multimodal: Phi-3's stack with two adapters, a SigLIP tower and a speech encoder."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.audio import cascades_conformer
from arch_maps.facts import Facts
from arch_maps.ops import LowRank
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama, phi3
from arch_maps.vision import siglip

_EXTENDED: Final = "model.embed_tokens_extend"
_VISION: Final = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_channels": 3,
    "patch_size": 14,
    "image_size": 448,
    "layer_norm_eps": 1e-6,
}
"""Sizes of the tower, which the release's code has and its config leaves out."""
IMAGE_TOKEN: Final = 200010
AUDIO_TOKEN: Final = 200011
"""Ids of <|endoftext10|> and <|endoftext11|>, which stand for pictures and sounds, from the
release's code; its config leaves them out."""
_ROPE_FIELDS: Final = ("type", "short_factor", "long_factor")
_SPEECH: Final = "the runtime's weights hold one adapter, that for pictures"
_SEPARATOR: Final = "marks between tiles and lines of a picture, which the runtime does not set"


def seeing(facts: Facts) -> Facts:
    """What the config says of the tower, with the release's sizes where it says nothing."""
    stated = facts.data.get("vision_config")
    found = facts.section("vision_config") if stated else Facts({}, parent=facts)
    return found.filled(_VISION)


def hearing(facts: Facts) -> Facts:
    """What the config says of the speech encoder."""
    return facts.section("audio_processor").section("config")


def _adapted(facts: Facts) -> phi3.Dense:
    """A matrix with the adapter for pictures added; the one for speech is left out."""
    lora, speech = facts.section("vision_lora"), facts.section("speech_lora")
    rank, spoken = lora.size("r"), speech.size("r")
    scale = lora.number("lora_alpha") / int(rank)

    def dense(at: Mount, name: str, out: int, inp: int) -> None:
        here = at / name
        weight, up, down = (
            here.input("base_layer.weight", out, inp),
            here.input("lora_B.vision.weight", out, rank),
            here.input("lora_A.vision.weight", rank, inp),
        )
        here.rule("weight", LowRank(weight, up, down, scale), Kind.LINEAR)
        here.drop("lora_B.speech.weight", _SPEECH, out, spoken, required=True)
        here.drop("lora_A.speech.weight", _SPEECH, spoken, inp, required=True)

    return dense


def _pictures(root: Mount, vision: Facts, hidden: int) -> None:
    extended = root.at(source=f"{_EXTENDED}.image_embed", target="")
    tower = extended.at(source="img_processor", target="vision_tower.vision_tower", part="vision")
    _tower(tower, vision)
    width = vision.size("hidden_size")
    projector = extended.at(source="img_projection", target="mm_projector", part="projector")
    projector.linear("0", hidden, width, bias=True)
    projector.linear("2", hidden, hidden, bias=True)
    for name, shape in (("glb_GN", (1, 1, width)), ("sub_GN", (1, 1, 1, width))):
        extended.drop(name, _SEPARATOR, *shape, required=True)


def _tower(at: Mount, vision: Facts) -> None:
    positions = vision.size("image_size") // vision.size("patch_size")
    siglip.dense_patch_tower(at, vision, positions * positions, conv=True)
    siglip.drop_pooling_head(at / "head", vision, required=True)


def _sounds(root: Mount, facts: Facts, hidden: int) -> None:
    extended = root.at(source=f"{_EXTENDED}.audio_embed", target="")
    audio = hearing(facts)
    encoder = extended.at(source="encoder", target="audio_encoder", part="audio")
    cascades_conformer.encoder(encoder, audio)
    width = audio.size("attention_dim", 1024)
    for mode in ("speech", "vision"):
        branch = extended.at(
            source=f"audio_projection.{mode}", target=f"audio_projection.{mode}", part="projector"
        )
        for index, inp in ((0, width), (2, hidden)):
            layer = branch.at(source=str(index), target=f"proj_{index}")
            layer.tensor("weight", hidden, inp, kind=Kind.LINEAR)
            layer.tensor("bias", hidden, kind=Kind.BIAS)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
        facts.expect(name, False, default=False, why="the runtime has no such biases")
    s = llama.sizes(facts)
    text = root.at(source="", target="language_model")
    phi3.stack(text / "model", s, dense=_adapted(facts))
    text.head("lm_head", s.vocab, s.hidden, tied_to="model.embed_tokens.weight" if s.tied else None)
    _pictures(root, seeing(facts), s.hidden)
    _sounds(root, facts, s.hidden)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    s, vision = llama.sizes(facts), seeing(facts)
    if int(s.head_dim) * int(s.heads) != int(s.hidden):
        facts.problem("config.json: head_dim must be hidden_size / num_attention_heads here")
    llama.spell_config(
        out,
        facts,
        s,
        max_positions=131072,
        eps=("rms_norm_eps", 1e-5),
        partial=1.0,
        rope_types=("default", "longrope"),
    )
    # The release's own configuration class, through which transformers finds the tokenizer, refuses
    # more than these three fields, and transformers the standard spelling beside them.
    if out.pop("rope_parameters")["rope_type"] == "longrope":
        out["rope_scaling"] = {name: out["rope_scaling"].get(name) for name in _ROPE_FIELDS}
        for name in _ROPE_FIELDS[1:]:
            if not isinstance(out["rope_scaling"][name], list):
                facts.problem(f"config.json: rope_scaling.{name} must be a list of numbers")
    cascades_conformer.spell_config(out["audio_processor"]["config"], hearing(facts))
    out.update(
        rope_traditional=False,
        original_max_position_embeddings=int(facts.size("original_max_position_embeddings", 4096)),
        mm_hidden_size=int(vision.size("hidden_size")),
        mm_projector_type="mlp2x_gelu",
        image_token_index=-200,
        audio_token_index=int(facts.size("audio_token_index", AUDIO_TOKEN)),
        min_num_patches=int(facts.size("min_num_patches", 256)),
        max_num_patches=int(facts.size("max_num_patches", 3600)),
    )
    out["vision_config"] = {
        **{name: vision.data[name] for name in _VISION},
        "model_type": "siglip2_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
    }
    window = facts.data.get("sliding_window")
    if isinstance(window, int) and window < out["max_position_embeddings"]:
        facts.note(
            f"the release attends to the last {window} tokens; the runtime attends to all of "
            "them, so results agree up to that length only"
        )
    return out


MAP = ArchMap(
    model_type="phi4mm",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm",),
    parts=("text.phi3", "vision.siglip", "audio.cascades_conformer"),
    modalities=("text", "image", "audio"),
    pipeline_tag="image-text-to-text",
    remarks=(
        "A checkpoint holds one set of text weights: with the adapter for pictures folded in, as "
        "mlx-vlm's loader leaves them. The release adds that adapter to prompts with pictures "
        "only, the one for speech to sounds, and none to text alone, so text and sounds come out "
        "off. mlx-vlm's converter adds both adapters at once, which the release never does.",
        "mlx-vlm 0.7.10 gives the text every patch of a picture; the release cuts tiles, averages "
        "two by two patches and marks line ends: pictures are off.",
    ),
)

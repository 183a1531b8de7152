"""MiniCPM-o 4.5: a SigLIP tower, a Whisper encoder and Qwen3's stack; speech is left out."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.audio import whisper
from arch_maps.facts import Facts
from arch_maps.ops import sources
from arch_maps.projectors.minicpm_resampler import resampler
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount, Tensors
from arch_maps.text import llama
from arch_maps.vision import siglip

_SPEECH: Final = "the speech decoder stores its heads by direction and length, not as matrices"


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts, kv_heads=8, head_dim=128, qk_norm=True)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    facts.expect("attention_bias", False, default=False, why="the runtime has no such biases")
    s = _sizes(facts)
    llama.stack(root.at(source="llm.model", target="language_model.model"), s)
    tied = "llm.model.embed_tokens.weight" if s.tied else None
    root.at(source="llm", target="language_model").head("lm_head", s.vocab, s.hidden, tied_to=tied)
    vision = facts.section("vision_config").filled(siglip.DEFAULTS)
    siglip.tower(root.at(source="vpm", target="vision_tower", part="vision"), vision)
    resampler(
        root.at(source="resampler", target="resampler", part="projector"),
        queries=facts.size("query_num", 64),
        hidden=s.hidden,
        patches=vision.size("hidden_size"),
    )
    audio = facts.section("audio_config")
    whisper.encoder(root.at(source="apm", target="audio_tower", part="audio"), audio)
    name = "audio_projection_layer"
    projector = root.at(source=name, target=name, part="projector")
    projector.linear("linear1", s.hidden, audio.size("encoder_ffn_dim", 4096) // 4, bias=True)
    projector.linear("linear2", s.hidden, s.hidden, bias=True)
    if facts.data.get("tts_config"):
        _drop_speech(root.at(source="tts", target=""), facts.section("tts_config"))


def _drop_speech(at: Mount, facts: Facts) -> None:
    inner = Tensors()
    s = llama.sizes(facts.filled({"vocab_size": facts.data.get("backbone_vocab_size", 32000)}))
    llama.stack(Mount(inner, source="model"), s)
    names = [leaf.name for rule in inner.rules for leaf in sources(rule.expr)]
    names.append("emb_text.weight")
    for part in ("projector_spk", "projector_semantic"):
        names += [
            f"{part}.{n}.{leaf}" for n in ("linear1", "linear2") for leaf in ("weight", "bias")
        ]
    for index in range(facts.count("num_vq", 1)):
        head = f"head_code.{index}.parametrizations.weight"
        names += [f"emb_code.{index}.weight", f"{head}.original0", f"{head}.original1"]
    for name in names:
        at.drop(name, _SPEECH)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    s = _sizes(facts)
    facts.expect(
        "drop_vision_last_layer", False, default=False, why="the runtime keeps the last layer"
    )
    audio = facts.section("audio_config")
    audio.expect("activation_function", "gelu", default="gelu", why="the runtime computes GELU")
    llama.spell_config(out, facts, s, max_positions=40960, theta=1000000.0)
    if out["rope_parameters"]["rope_type"] != "default":
        facts.problem("config.json: the runtime computes unscaled positions only")
    # The runtime's stack wants positions on three axes; text has the same on each.
    half = int(s.head_dim) // 2
    section = [half - 2 * (half * 5 // 16), half * 5 // 16, half * 5 // 16]
    scaling = {"type": "default", "rope_type": "default", "mrope_section": section}
    shared = ("rms_norm_eps", "rope_theta", "max_position_embeddings", "head_dim")
    out["rope_scaling"] = scaling
    out["text_config"] = {
        **{name: out[name] for name in (*shared, "num_key_value_heads", "tie_word_embeddings")},
        "model_type": "qwen3",
        "hidden_size": int(s.hidden),
        "intermediate_size": int(s.intermediate),
        "num_hidden_layers": s.layers,
        "num_attention_heads": int(s.heads),
        "vocab_size": int(s.vocab),
        "rope_scaling": scaling,
        "attention_bias": False,
        "hidden_act": "silu",
    }
    siglip.spell_config(out["vision_config"], facts.section("vision_config"))
    out["audio_config"].update(
        d_model=int(audio.size("d_model", 1024)),
        encoder_layers=audio.count("encoder_layers", 24),
        encoder_attention_heads=int(audio.size("encoder_attention_heads", 16)),
        encoder_ffn_dim=int(audio.size("encoder_ffn_dim", 4096)),
        num_mel_bins=int(audio.size("num_mel_bins", 80)),
        max_source_positions=int(audio.size("max_source_positions", 1500)),
        layer_norm_eps=audio.number("layer_norm_eps", 1e-5),
    )
    out.update(
        query_num=int(facts.size("query_num", 64)),
        patch_size=int(facts.section("vision_config").size("patch_size", 14)),
        audio_pool_step=int(facts.size("audio_pool_step", 5)),
        init_vision=True,
        init_audio=True,
        init_tts=False,
    )
    out.pop("tts_config", None)
    return out


MAP = ArchMap(
    model_type="minicpmo",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm",),
    parts=("text.llama", "vision.siglip", "audio.whisper", "projectors.minicpm_resampler"),
    modalities=("text", "image", "audio"),
    pipeline_tag="any-to-any",
    remarks=("It listens and sees; the decoder that speaks is left out, and init_tts is false.",),
)

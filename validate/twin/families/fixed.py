"""Text decoders whose runtimes fix in code what a config could say."""

from types import MappingProxyType

from validate.twin.family import CHAT_TOKENS, Family, Json

_FIXED = "the runtimes fix it in code"

NANOCHAT = Family(
    pinned=MappingProxyType({"rms_norm_eps": _FIXED, "final_logit_softcapping": _FIXED})
)


def _half_rotated(config: Json, source: Json) -> Json:
    del source
    config["rotary_dim"] = config["n_embd"] // config["n_head"] // 2
    return config


GPTJ = Family(adjust=_half_rotated)


def _minicpm3(config: Json, source: Json) -> Json:
    """Ranks that differ from each other, and positions that were trained at every length."""
    del source
    ranks = {"q_lora_rank": 192, "kv_lora_rank": 128, "qk_nope_head_dim": 64}
    config["rope_scaling"]["original_max_position_embeddings"] = config["max_position_embeddings"]
    return config | ranks | {"scale_emb": 9, "dim_model_base": 32}


MINICPM3 = Family(adjust=_minicpm3)


def _hrm_text(config: Json, source: Json) -> Json:
    """Few layers a stack, which every turn of the recurrence multiplies."""
    del source
    return config | {"num_hidden_layers": 2, "embedding_scale": 7.5}


_DIRECT, _REASONED = "<|object_ref_start|>", ("<|quad_end|>", "<|object_ref_end|>")
HRM_TEXT = Family(
    adjust=_hrm_text,
    specials=(*CHAT_TOKENS, _DIRECT, *_REASONED),
    # mlx-vlm has this template in code.
    template="{{- '<|im_start|>" + _DIRECT + "' -}}{%- for message in messages -%}"
    "{{- message['content'] -}}{%- if not loop.last -%}{{- '\n' -}}{%- endif -%}"
    "{%- endfor -%}{{- '<|im_end|>' -}}",
)


def _youtu(config: Json, source: Json) -> Json:
    """Ranks and widths that differ from each other."""
    del source
    ranks = {"q_lora_rank": 192, "kv_lora_rank": 128, "qk_nope_head_dim": 64}
    return config | ranks | {"qk_rope_head_dim": 32, "v_head_dim": 96}


YOUTU_LLM = Family(adjust=_youtu, pinned=MappingProxyType({"rms_norm_eps": _FIXED}))


def _mimo(config: Json, source: Json) -> Json:
    """A drafter's layer, which the release has and the checkpoint leaves out."""
    config["num_nextn_predict_layers"] = source["num_nextn_predict_layers"]
    return config


MIMO = Family(adjust=_mimo)

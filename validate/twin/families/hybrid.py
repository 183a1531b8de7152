"""Mixtures of experts whose layers differ by kind of attention, in settings of their own."""

from types import MappingProxyType

from validate.twin.families.moe import FAMILY, GROUPS, KEPT_GROUPS, LATENT
from validate.twin.family import CHAT_TOKENS, Family, Json


def _kimi_linear(config: Json, source: Json) -> Json:
    """Two layers without positions; transformers deprecates a scaling of none."""
    del source
    config.pop("rope_scaling", None)
    config["linear_attn_config"] |= {"kda_layers": [1, 2, 3, 5], "full_attn_layers": [4, 6]}
    config |= {"num_hidden_layers": 6, "num_experts_per_token": 2}
    return config | {name: size for name, size in LATENT.items() if config.get(name)}


KIMI_LINEAR = Family(adjust=_kimi_linear)


def _mimo(config: Json, source: Json) -> Json:
    """The first layers: the reference takes its own pattern of kinds whatever the config lists."""
    count = 7
    config |= {"num_hidden_layers": count, "num_key_value_heads": 1, "v_head_dim": 32}
    config |= {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_v_head_dim": 32}
    # A third of a head rotates, and that third must be even.
    config |= {"head_dim": 96, "swa_head_dim": 96, "sliding_window_size": 15}
    for name in ("hybrid_layer_pattern", "moe_layer_freq"):
        config[name] = source[name][:count]
    return config


_UNREAD = "transformers reads it under another name only, and takes its own default"
MIMO = Family(
    adjust=_mimo,
    pinned=MappingProxyType(
        {
            name: _UNREAD
            for name in (
                "rope_theta",
                "swa_rope_theta",
                "partial_rotary_factor",
                "layernorm_epsilon",
            )
        }
    ),
)


def _longcat(config: Json, source: Json) -> Json:
    """Half as many idle experts as working ones, as in the source."""
    del source
    config |= {"zero_expert_num": 4, "moe_topk": 3}
    config |= {"ffn_hidden_size": 192, "expert_ffn_hidden_size": 128}
    # transformers rotates its default head_dim of 64, which the release does not state.
    latent = LATENT | {"qk_rope_head_dim": 64}
    return config | {name: size for name, size in latent.items() if config.get(name)}


LONGCAT = Family(adjust=_longcat)


def _dbrx(config: Json, source: Json) -> Json:
    """Values that are clipped, and a base that both sides read."""
    del source
    config["attn_config"] |= {"kv_n_heads": 2, "clip_qkv": 1.0}
    config["ffn_config"] |= {"ffn_hidden_size": 128, "moe_num_experts": 6, "moe_top_k": 2}
    # transformers reads it here only.
    return config | {"n_layers": 3, "rope_theta": config["attn_config"]["rope_theta"]}


DBRX = Family(adjust=_dbrx)


def _hunyuan(config: Json, source: Json) -> Json:
    """Lists by layer that say what the twin's sizes are."""
    del source
    layers = config["num_hidden_layers"]
    return config | {
        "moe_intermediate_size": [config["intermediate_size"]] * layers,
        "moe_topk": [2] * layers,
    }


HUNYUAN = Family(adjust=_hunyuan)


def _bailing(config: Json, source: Json) -> Json:
    """Two groups, in which one layer of four attends to everything."""
    del source
    config |= {"num_hidden_layers": 8, "layer_group_size": 4, "first_k_dense_replace": 1}
    config |= {"n_group": GROUPS, "topk_group": KEPT_GROUPS}
    return config | {name: size for name, size in LATENT.items() if config.get(name)}


_LATENT_NORM = "the reference fixes it in the latent norm"
BAILING = Family(adjust=_bailing, pinned=MappingProxyType({"rms_norm_eps": _LATENT_NORM}))

_ONCE = "the runtime leaves it out of one of two sums, where the release's 1e-6 is below rounding"
HY_V4 = Family(adjust=FAMILY.adjust, pinned=MappingProxyType({"hc_eps": _ONCE}))


def _laguna(config: Json, source: Json) -> Json:
    """More heads in the windows than outside them, as in the source."""
    config = FAMILY.adjust(config, source)
    heads = {"full_attention": 4, "sliding_attention": 6}
    return config | {"num_attention_heads_per_layer": [heads[k] for k in config["layer_types"]]}


_ROTATED = "shrinking would make it a whole head, which hides a runtime that rotates whole heads"
LAGUNA = Family(
    adjust=_laguna,
    pinned=MappingProxyType({"rope_parameters.full_attention.partial_rotary_factor": _ROTATED}),
)


def _deepseek_v4(config: Json, source: Json) -> Json:
    """Every kind of compression, and so few tokens chosen that every prompt has more."""
    del source
    config |= {"num_hidden_layers": 6, "compress_ratios": [0, 128, 4, 128, 4, 0]}
    config |= {"num_hash_layers": 2, "head_dim": 64, "qk_rope_head_dim": 32, "q_lora_rank": 192}
    config |= {"o_groups": 2, "o_lora_rank": 64}
    return config | {"index_n_heads": 32, "index_head_dim": 64, "index_topk": 4}


DEEPSEEK_V4 = Family(adjust=_deepseek_v4)


def _ring_linear(config: Json, source: Json) -> Json:
    """Two groups of three layers."""
    config = FAMILY.adjust(config, source)
    return config | {"num_hidden_layers": 6, "layer_group_size": 3, "group_norm_size": 2}


RING_LINEAR = Family(adjust=_ring_linear)


def _minimax_m3(config: Json, source: Json) -> Json:
    """A dense layer, and so few blocks chosen that every prompt has more."""
    del source
    text = config["text_config"]
    text |= {"num_hidden_layers": 4, "moe_layer_freq": [0, 1, 1, 1], "index_block_size": 4}
    text |= {"layer_types": ["full_attention", *2 * ["minimax_m3_sparse"], "full_attention"]}
    text |= {"index_n_heads": 2, "index_head_dim": 64, "index_topk_blocks": 3}
    text |= {"rotary_dim": text["head_dim"] // 2, "dense_intermediate_size": 256}
    text |= {"shared_intermediate_size": 128}
    text["rope_parameters"]["partial_rotary_factor"] = 0.5
    return config | {"projector_hidden_size": text["hidden_size"]}


_MEDIA = {"image_token_index": "<image>", "video_token_index": "<video>"}
MINIMAX_M3 = Family(
    adjust=_minimax_m3,
    specials=(*CHAT_TOKENS, *_MEDIA.values()),
    tokens=MappingProxyType(_MEDIA),
)

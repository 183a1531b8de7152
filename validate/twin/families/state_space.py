"""State-space decoders: heads, groups and states that are as many as the widths ask for."""

from types import MappingProxyType

from validate.twin.family import Family, Json


def _falcon_h1(config: Json, source: Json) -> Json:
    groups = 1 if source["mamba_n_groups"] == 1 else 2
    return config | {
        **{"mamba_d_ssm": 192, "mamba_n_heads": 6, "mamba_d_head": 32},
        **{"mamba_d_state": 16, "mamba_n_groups": groups, "num_hidden_layers": 4},
    }


FALCON_H1 = Family(adjust=_falcon_h1)


def _mamba2(config: Json, source: Json) -> Json:
    groups = 1 if source["n_groups"] == 1 else 2
    inner = source["expand"] * config["hidden_size"]
    sizes = {"num_heads": inner // 32, "head_dim": 32, "state_size": 16, "n_groups": groups}
    return config | sizes | {"intermediate_size": inner, "num_hidden_layers": 4}


MAMBA2 = Family(
    adjust=_mamba2,
    pinned=MappingProxyType({"layer_norm_epsilon": "the runtimes fix it in code"}),
)


def _recurrent_gemma(config: Json, source: Json) -> Json:
    """Two periods of layers, and recurrences as wide as the residual stream."""
    kinds = source.get("block_types") or source["_block_types"]
    config["lru_width"] = config["hidden_size"]
    config["attention_window_size"] = 16
    return config | {"num_hidden_layers": 2 * len(kinds), "intermediate_size": 384}


_IN_CODE = "the runtimes fix it in code"
RECURRENT_GEMMA = Family(
    adjust=_recurrent_gemma,
    pinned=MappingProxyType(
        dict.fromkeys(("rms_norm_eps", "rope_theta", "partial_rotary_factor"), _IN_CODE)
    ),
)


def _olmo_hybrid(config: Json, source: Json) -> Json:
    """Two periods of layers, and values as wide as keys.

    transformers 5.23.0 saves the convolution over queries, keys and values in three equal parts.
    """
    del source
    kinds = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
    sizes = {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
    return config | sizes | {"num_hidden_layers": len(kinds), "layer_types": kinds}


OLMO_HYBRID = Family(adjust=_olmo_hybrid)

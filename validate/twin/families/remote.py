"""Decoders that bring their own code and whose configs state sizes in ways of their own."""

from types import MappingProxyType

from validate.twin.family import Family, Json

_FIXED = "the runtimes fix it in code"


def _nemotron_nas(config: Json, source: Json) -> Json:
    """One layer of each kind, unscaled positions, and narrow MLPs.

    transformers 5.23.0 cannot read scaled positions of a type that it does not know.
    """
    flags = ("no_op", "replace_with_linear")
    kinds = {
        tuple(block[half][flag] for half in ("attention", "ffn") for flag in flags): block
        for block in source["block_configs"]
    }
    blocks = [
        {
            "attention": block["attention"]
            | ({"n_heads_in_group": 2} if block["attention"]["n_heads_in_group"] else {}),
            "ffn": block["ffn"] | ({"ffn_mult": 3.0} if block["ffn"]["ffn_mult"] else {}),
        }
        for block in kinds.values()
    ]
    return config | {
        **{"block_configs": blocks, "num_hidden_layers": len(blocks)},
        "rope_scaling": None,
    }


NEMOTRON_NAS = Family(adjust=_nemotron_nas)


def _openelm(config: Json, source: Json) -> Json:
    del source
    return config | {
        **{"num_transformer_layers": 3, "model_dim": 128, "head_dim": 32, "ffn_dim_divisor": 64},
        **{"num_query_heads": [2, 4, 4], "num_kv_heads": [1, 2, 2]},
        "ffn_multipliers": [0.5, 1.0, 2.0],
    }


OPENELM = Family(adjust=_openelm)


def _lille(config: Json, source: Json) -> Json:
    del source
    return config | {"n_kv_heads": 2}


LILLE = Family(adjust=_lille)


def _qwen1(config: Json, source: Json) -> Json:
    del source
    return config | {"kv_channels": config["hidden_size"] // config["num_attention_heads"]}


QWEN1 = Family(adjust=_qwen1, pinned=MappingProxyType({"rotary_emb_base": _FIXED}))


def _plamo(config: Json, source: Json) -> Json:
    del source
    return config | {"n_shared_head": 2}


PLAMO = Family(adjust=_plamo)


def _plamo2(config: Json, source: Json) -> Json:
    del source
    return config | {
        **{"hidden_size_per_head": 32, "mamba_num_heads": 4, "mamba_d_state": 16},
        **{"num_hidden_layers": 4, "attention_window_size": config["max_position_embeddings"]},
    }


PLAMO2 = Family(adjust=_plamo2)


def _rwkv7(config: Json, source: Json) -> Json:
    """Ranks that differ from each other."""
    del source
    ranks = {"a_low_rank_dim": 16, "decay_low_rank_dim": 24, "v_low_rank_dim": 8}
    return config | ranks | {"gate_low_rank_dim": 32, "head_dim": 32, "num_heads": 4}


RWKV7 = Family(adjust=_rwkv7)

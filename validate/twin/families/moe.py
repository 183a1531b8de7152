"""Mixtures of experts: groups that hold several experts, and small latent ranks."""

from validate.twin.family import Family, Json

TYPES = (
    *("deepseek_v2", "deepseek_v3", "exaone_moe", "glm4_moe_lite", "kimi_k2", "ernie4_5_moe"),
    *("Klear", "bailing_moe", "deepseek"),
    *("cohere2_moe", "deepseek_v32", "flint", "glm_moe_dsa", "kolibri1", "mistral4"),
    *("afmoe", "granitemoehybrid", "jamba", "minimax_m2", "nemotron_h"),
)
LAYERS = 8
JAMBA = {
    **{"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 1},
    "mamba_dt_rank": 16,
}
SHARED = 256
GROUPS, KEPT_GROUPS = 4, 2
# Ranks and widths that differ from each other, so that no two of them can be confused.
LATENT = {
    "q_lora_rank": 192,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 96,
}
# So few tokens are chosen that every prompt has more.
INDEXER = {"index_n_heads": 32, "index_head_dim": 64, "index_topk": 12}
# A quarter of the state's width, and heads that are as many as expand * hidden asks for.
MAMBA = {
    **{"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16},
    **{"mamba_num_heads": 8, "mamba_head_dim": 32, "n_groups": 2, "ssm_state_size": 16},
}


def _adjust(config: Json, source: Json) -> Json:
    del source
    if "moe_shared_expert_intermediate_size" in config:
        config["moe_shared_expert_intermediate_size"] = SHARED
    depth = config["num_hidden_layers"]
    if depth > LAYERS:  # a dense first layer hides the period of the others
        config["num_hidden_layers"] = LAYERS
        for name, value in config.items():
            if isinstance(value, list) and len(value) == depth:
                config[name] = value[:LAYERS]
    if "moe_layer_end_index" in config:  # ERNIE names its experts in its own way
        config |= {"moe_num_experts": 8, "moe_k": 2, "moe_layer_end_index": depth - 1}
    config |= {name: size for name, size in INDEXER.items() if name in config}
    if "attn_layer_period" in config:
        config |= JAMBA
    if "rotary_dim" in config:
        config["rotary_dim"] = config["head_dim"] // 2
    if "hybrid_override_pattern" in config:
        kinds = "".join(dict.fromkeys(config["hybrid_override_pattern"]))
        config["hybrid_override_pattern"] = 2 * kinds
        config["num_hidden_layers"] = len(2 * kinds)
        # The reference bounds step sizes from below in a prompt, but not in single steps.
        config["time_step_min"] = 1e-12
    if "mamba_n_heads" in config or "mamba_num_heads" in config:
        config |= {name: size for name, size in MAMBA.items() if name in config}
    if (config.get("n_group") or 1) > 1:
        config["n_group"], config["topk_group"] = GROUPS, KEPT_GROUPS
    config |= {name: size for name, size in LATENT.items() if config.get(name)}
    return config


FAMILY = Family(adjust=_adjust)

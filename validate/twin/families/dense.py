"""Dense text decoders whose twins must keep a setting that a runtime is known to ignore."""

from types import MappingProxyType

from validate.twin.family import Family, Json

_ROTATED = "shrinking would make it a whole head, which hides a runtime that rotates whole heads"

PARTIAL = Family(pinned=MappingProxyType({"partial_rotary_factor": _ROTATED}))
OLMO3 = Family(
    pinned=MappingProxyType(
        {"rope_theta": "transformers reads it for full layers only, the runtimes for all of them"}
    )
)
MAMBA = Family(pinned=MappingProxyType({"layer_norm_epsilon": "the runtimes fix it in code"}))


def _four_times(config: Json, source: Json) -> Json:
    del source
    config["intermediate_size"] = 4 * config["hidden_size"]
    return config


GPT_NEOX = Family(adjust=_four_times)


def _block_widths(config: Json, source: Json) -> Json:
    del source
    for name in ("block_dim", "conv_dim", "conv_dim_out"):
        if name in config:
            config[name] = config["hidden_size"]
    if "block_ff_dim" in config:
        config["block_ff_dim"] = 256
    config["block_multiple_of"] = 64
    full = [0, 0, 1, 0, 0, 1, 0, 1]
    config["num_hidden_layers"] = len(full)
    config["full_attn_idxs"] = [index for index, kind in enumerate(full) if kind]
    return config


LFM2 = Family(adjust=_block_widths)


def _phi3(config: Json, source: Json) -> Json:
    """One LongRoPE factor per rotated pair; a window beyond all positions stays beyond them."""
    if (source.get("sliding_window") or 0) >= source["max_position_embeddings"]:
        config["sliding_window"] = source["sliding_window"]
    fraction = config.get("partial_rotary_factor", 1.0)
    pairs = int(config["hidden_size"] // config["num_attention_heads"] * fraction) // 2
    for section in (config.get("rope_scaling"), config.get("rope_parameters")):
        for name in ("long_factor", "short_factor"):
            if section and name in section:
                listed = section[name]
                section[name] = [listed[len(listed) * i // pairs] for i in range(pairs)]
    return config


PHI3 = Family(adjust=_phi3)

"""Twins as GGUF files, written with llama.cpp's own Python package.

Names come from its table of tensor names, blocks from its quantizers, and what its converter does
to values is written out here; nothing is shared with what reads the files.
"""

import json
import re
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize
from safetensors.torch import load_file

ARCHITECTURES = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "starcoder2": "starcoder2",
}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")


def interleave(rows, heads):
    """The rows of every head, first half and second half in turn, as llama.cpp rotates them."""
    size = len(rows) // heads
    out = np.empty_like(rows)
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = rows[head * size + i]
            out[head * size + 2 * i + 1] = rows[head * size + size // 2 + i]
    return out


def altered(name, values, config):
    """What the converter makes of a tensor's values."""
    kind = config["model_type"]
    if ARCHITECTURES[kind] == "llama" and re.search(r"\.[qk]_proj\.", name):
        key = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
        return interleave(values, config[key])
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return values + np.float32(1)
    return values


def stacked(tensors, config):
    """Every expert's matrix of a kind in one tensor, under the names that the table knows."""
    out = {}
    groups = {}
    for name, values in tensors.items():
        if match := _EXPERT.fullmatch(name):
            groups.setdefault(f"{match[1]}.{match[3]}.weight", {})[int(match[2])] = values
        elif match := _FUSED.fullmatch(name):
            if match[2] == "down_proj":
                out[f"{match[1]}.down_proj.weight"] = values
            else:
                half = values.shape[1] // 2
                out[f"{match[1]}.gate_proj.weight"] = values[:, :half]
                out[f"{match[1]}.up_proj.weight"] = values[:, half:]
        else:
            out[name] = values
    for name, parts in groups.items():
        out[name] = np.stack([parts[i] for i in range(len(parts))])
    return out


def write_settings(writer, config):
    """The settings as the converter writes them for these architectures."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head = config.get("head_dim") or hidden // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_freq_base(float(config.get("rope_theta", 10000.0)))
    if "rms_norm_eps" in config:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "norm_epsilon" in config:
        writer.add_layer_norm_eps(config["norm_epsilon"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    for key, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ("num_experts", writer.add_expert_count),
        ("num_local_experts", writer.add_expert_count),
        ("num_experts_per_tok", writer.add_expert_used_count),
        ("moe_intermediate_size", writer.add_expert_feed_forward_length),
        ("shared_expert_intermediate_size", writer.add_expert_shared_feed_forward_length),
    ):
        if config.get(key) is not None:
            add(config[key])
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    if scaling.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])


def write_vocabulary(writer, folder, config):
    """A byte-level vocabulary with its merges and special tokens."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = dict(tokenizer["model"]["vocab"])
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted({**vocab, **special}.items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([3 if token in special else 1 for token, _ in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    if config.get("bos_token_id") is not None:
        writer.add_bos_token_id(config["bos_token_id"])
    template = folder / "chat_template.jinja"
    if template.exists():
        writer.add_chat_template(template.read_text())


def write_gguf(folder: Path, file: Path, matrices="Q8_0", *, parts=None) -> dict[str, np.ndarray]:
    """The release in ``folder`` as a GGUF file; the values it stands for, by the release's names.

    ``matrices`` names the type of tensors with two axes or more; what has one is F32.
    """
    config = json.loads((folder / "config.json").read_text())
    kind = getattr(gguf.GGMLQuantizationType, matrices)
    writer = gguf.GGUFWriter(file, ARCHITECTURES[config["model_type"]])
    write_settings(writer, config)
    write_vocabulary(writer, folder, config)
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == writer.arch)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    source = {n: t.float().numpy() for n, t in load_file(folder / "model.safetensors").items()}
    for name, values in stacked(source, config).items():
        inside = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert inside is not None, name
        values = np.ascontiguousarray(altered(name, values, config))
        gate = name.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))
        gate = gate or name.endswith("block_sparse_moe.gate.weight")
        if name.endswith("shared_expert_gate.weight"):
            values = values.reshape(-1)  # ggml counts no axes of 1 at the end
        if values.ndim == 1 or gate or matrices == "F32":
            writer.add_tensor(inside, values)
        else:
            stored = quantize(values, kind)
            writer.add_tensor(inside, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return source

"""What GGUF files call things: tensors, settings, and what llama.cpp's converter did to values.

Keyed by ``general.architecture``. Names follow ``gguf.tensor_mapping`` and settings
``gguf.constants.Keys`` of llama.cpp; what its ``convert_hf_to_gguf.py`` changes on the way is
declared here and undone when the file is read: rotary rows interleaved per head, norms stored as
1 + weight, experts stacked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

LLAMA3_FACTORS: Final = "rope_freqs.weight"
_LAYER: Final = re.compile(r"blk\.(\d{1,5})\.(.+)")
_TOP: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_ATTENTION: Final = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_QK_NORM: Final = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP: Final = {
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PRE_NORM: Final = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_SANDWICH: Final = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LLAMA: Final = {**_PRE_NORM, **_ATTENTION, **_MLP}
_EXPERTS: Final = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_PLAIN: Final = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Types of plain numbers; where a file has several, the first is that of its matrices."""
_FACTORS: Final = "factors of the rotary frequencies, which follow from rope_scaling in config.json"


class Filler(int):
    """Stands for a setting that the file does not have, or has as something else."""


class Keys:
    """Typed look-ups in a file's settings; what is wrong is collected in ``problems``."""

    def __init__(self, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> None:
        """``tensors`` are the shapes of the file's tensors by their names there."""
        self.metadata = metadata
        self.tensors = tensors
        self.prefix = str(metadata.get("general.architecture"))
        self.problems: list[str] = []

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number; an array that repeats one counts as that."""
        name = f"{self.prefix}.{key}"
        value = self.metadata.get(name, default)
        if isinstance(value, Filler):  # the default is itself missing, which has been told
            return value
        if isinstance(value, list) and value and value == [value[0]] * len(value):
            value = value[0]
        if type(value) is not int or not 0 < value < 1 << 31:
            self.problems.append(
                f"{name} is missing"
                if value is None
                else f"{name} must be one positive whole number, not {_short(value)}"
            )
            return Filler(1)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number, as its shortest spelling in float32 has it."""
        name = f"{self.prefix}.{key}"
        value = self.metadata.get(name, default)
        single = np.float32("nan")
        if type(value) in (int, float):
            with np.errstate(over="ignore"):
                single = np.float32(value)
        if not np.isfinite(single):
            what = "is missing" if value is None else f"must be a number, not {_short(value)}"
            self.problems.append(f"{name} {what}")
            return Filler(1)
        return float(str(single))

    def has(self, key: str) -> bool:
        """Whether a setting of this architecture is stated."""
        return f"{self.prefix}.{key}" in self.metadata

    def holds(self, leaf: str) -> bool:
        """Whether the first layer has a tensor."""
        return f"blk.0.{leaf}" in self.tensors


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufArch:
    """An architecture in GGUF's terms."""

    model_types: tuple[str, ...]
    """The types whose releases are converted to it; the first is written where none is stated."""
    config: Callable[[Keys], dict[str, Any]]
    """config.json from the settings, in the spelling of published releases."""
    layer: Mapping[str, str]
    """A layer's tensors, without ``.weight`` and ``.bias``: their name here and the release's."""
    experts: Mapping[str, str] = field(default_factory=dict)
    """Stacked experts, with a place for the number of one."""
    rotary: Mapping[str, str] = field(default_factory=dict)
    """Tensors whose rows come in pairs of the rotated halves, and the setting that counts heads."""
    norm_offset: float = 0.0
    """What is added to every norm's weight."""
    drops: Mapping[str, str] = field(default_factory=dict)
    """Tensors that nothing needs beside config.json, and why."""
    dtype: str = "float16"
    """The dtype of a release that states none: float16 holds the scales of most types exactly."""

    def name(self, tensor: str) -> str | None:
        """The release's name of a tensor, ``{}`` in it for an expert; None where it has none."""
        stem, dot, kind = tensor.rpartition(".")
        if kind not in ("weight", "bias"):
            return None
        match = _LAYER.fullmatch(stem)
        if match is None:
            top = _TOP.get(stem)
            return None if top is None else f"{top}{dot}{kind}"
        leaf = self.layer.get(match[2]) or self.experts.get(match[2])
        return None if leaf is None else f"model.layers.{int(match[1])}.{leaf}{dot}{kind}"

    def heads_of(self, tensor: str) -> str | None:
        """The setting that counts the heads whose rows are to be put in order, if any are."""
        match = _LAYER.fullmatch(tensor.rpartition(".")[0])
        return None if match is None else self.rotary.get(match[2])

    def offset_of(self, tensor: str) -> float:
        """What was added to a tensor's values."""
        return self.norm_offset if tensor.endswith("norm.weight") else 0.0


def read_config(
    arch: GgufArch, keys: Keys, types: Collection[str], factors: Sequence[float] = ()
) -> dict[str, Any]:
    """config.json of a file that has none beside it; problems are left with ``keys``.

    ``types`` are those of the file's tensors, which decide the dtype where all are plain;
    ``factors`` are the values of its ``rope_freqs.weight``.
    """
    config = arch.config(keys)
    if factors:
        config["rope_scaling"] = llama3_scaling(factors, config["rope_theta"])
    for name, why in arch.drops.items():
        if name in keys.tensors and not (name == LLAMA3_FACTORS and config["rope_scaling"]):
            keys.problems.append(f"{name}: {why}; put the release's config.json beside the file")
    plain = [name for code, name in _PLAIN.items() if code in types]
    dtype = plain[0] if set(types) <= _PLAIN.keys() and plain else arch.dtype
    return config | {"dtype": dtype}


def llama3_scaling(factors: Sequence[float], theta: float) -> dict[str, Any] | None:
    """The position scaling of Llama 3.1 to 3.3 whose ``factors`` these are, if any's.

    As transformers' ``_compute_llama3_parameters`` scales each frequency.
    """
    count = len(factors)
    if theta <= 0:
        return None
    for factor in (8.0, 32.0):
        low, high, trained = 1.0, 4.0, 8192
        expected = []
        for i in range(count):
            wavelength = 2 * math.pi * theta ** (i / count)
            smooth = (trained / wavelength - low) / (high - low)
            smooth = min(max(smooth, 0.0), 1.0)
            expected.append(1 / ((1 - smooth) / factor + smooth))
        pairs = zip(factors, expected, strict=True)
        if all(math.isclose(*pair, rel_tol=1e-4) for pair in pairs):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": trained,
            }
    return None


def _decoder(
    keys: Keys, model_type: str, architecture: str, *, eps: str = "rms_norm_eps"
) -> dict[str, Any]:
    """What every decoder's config has."""
    hidden, heads = keys.size("embedding_length"), keys.size("attention.head_count")
    embedding = keys.tensors.get("token_embd.weight", ())
    if len(embedding) != 2:
        keys.problems.append("token_embd.weight is missing or no matrix")
    norm = f"attention.layer_norm{'_rms' if eps == 'rms_norm_eps' else ''}_epsilon"
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": keys.size("feed_forward_length"),
        "num_hidden_layers": keys.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.size("attention.head_count_kv", heads),
        "head_dim": keys.size("attention.key_length", max(1, hidden // heads)),
        "max_position_embeddings": keys.size("context_length"),
        eps: keys.number(norm),
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(keys),
        "vocab_size": embedding[0] if embedding else 1,
        "tie_word_embeddings": "output.weight" not in keys.tensors,
        "hidden_act": "silu",
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = keys.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        config[f"{ours}_token_id"] = value if type(value) is int else None
    return config


def _rope_scaling(keys: Keys) -> dict[str, Any] | None:
    kind = keys.metadata.get(f"{keys.prefix}.rope.scaling.type", "none")
    if kind == "none" or not keys.has("rope.scaling.factor"):
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": keys.number("rope.scaling.factor")}
    if kind == "yarn":
        stated = keys.size("rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = stated
    elif kind != "linear":
        keys.problems.append(
            f"{keys.prefix}.rope.scaling.type is {_short(kind)}, whose settings are in config.json "
            "alone; put the release's config.json beside the file"
        )
    return scaling


def _llama(keys: Keys) -> dict[str, Any]:
    if keys.has("expert_count") and keys.metadata[f"{keys.prefix}.expert_count"] != 0:
        return _decoder(keys, "mixtral", "MixtralForCausalLM") | {
            "num_local_experts": keys.size("expert_count"),
            "num_experts_per_tok": keys.size("expert_used_count"),
        }
    return _decoder(keys, "llama", "LlamaForCausalLM") | {
        "attention_bias": keys.holds("attn_output.bias"),
        "mlp_bias": keys.holds("ffn_up.bias"),
    }


def _qwen2(keys: Keys) -> dict[str, Any]:
    config = _decoder(keys, "qwen2", "Qwen2ForCausalLM") | {"use_sliding_window": False}
    del config["head_dim"]  # which this type does not have
    return config


def _qwen2_moe(keys: Keys) -> dict[str, Any]:
    config = _decoder(keys, "qwen2_moe", "Qwen2MoeForCausalLM") | {
        **_routed(keys),
        "shared_expert_intermediate_size": keys.size("expert_shared_feed_forward_length"),
        "norm_topk_prob": False,
        "use_sliding_window": False,
    }
    del config["head_dim"]
    return config


def _qwen3(keys: Keys) -> dict[str, Any]:
    return _decoder(keys, "qwen3", "Qwen3ForCausalLM") | {
        "attention_bias": keys.holds("attn_output.bias"),
        "use_sliding_window": False,
    }


def _qwen3_moe(keys: Keys) -> dict[str, Any]:
    # llama.cpp's graph of this type normalises the routing weights, whatever was stated
    return _decoder(keys, "qwen3_moe", "Qwen3MoeForCausalLM") | {
        **_routed(keys),
        "norm_topk_prob": True,
        "use_sliding_window": False,
    }


def _routed(keys: Keys) -> dict[str, Any]:
    return {
        "num_experts": keys.size("expert_count"),
        "num_experts_per_tok": keys.size("expert_used_count"),
        "moe_intermediate_size": keys.size("expert_feed_forward_length"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma(keys: Keys) -> dict[str, Any]:
    return _gelu(_decoder(keys, "gemma", "GemmaForCausalLM"))


def _gelu(config: dict[str, Any]) -> dict[str, Any]:
    gelu = "gelu_pytorch_tanh"
    return config | {"hidden_act": gelu, "hidden_activation": gelu}


def _query_scale(keys: Keys, largest: int) -> int:
    """The scalar of queries as llama.cpp has it: of the hidden size in the largest model alone."""
    hidden, heads = keys.size("embedding_length"), keys.size("attention.head_count")
    own = keys.size("attention.key_length")
    return hidden // heads if keys.size("block_count") == largest else own


def _gemma2(keys: Keys) -> dict[str, Any]:
    return _gelu(_decoder(keys, "gemma2", "Gemma2ForCausalLM")) | {
        "attn_logit_softcapping": keys.number("attn_logit_softcapping"),
        "final_logit_softcapping": keys.number("final_logit_softcapping"),
        "sliding_window": keys.size("attention.sliding_window"),
        "query_pre_attn_scalar": _query_scale(keys, 46),
    }


def _gemma3(keys: Keys) -> dict[str, Any]:
    return _gelu(_decoder(keys, "gemma3_text", "Gemma3ForCausalLM")) | {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "sliding_window": keys.size("attention.sliding_window"),
        "sliding_window_pattern": 6,
        "rope_local_base_freq": keys.number("rope.freq_base_swa", 10000.0),
        "query_pre_attn_scalar": _query_scale(keys, 62),
    }


def _phi3(keys: Keys) -> dict[str, Any]:
    config = _decoder(keys, "phi3", "Phi3ForCausalLM")
    head = config.pop("head_dim")
    longest = config["max_position_embeddings"]
    trained = keys.size("rope.scaling.original_context_length", longest)
    rotated = keys.size("rope.dimension_count", head)
    return config | {
        "original_max_position_embeddings": trained,
        "partial_rotary_factor": rotated / head,
        "sliding_window": _window(keys),
    }


def _window(keys: Keys) -> int | None:
    return keys.size("attention.sliding_window") if keys.has("attention.sliding_window") else None


def _starcoder2(keys: Keys) -> dict[str, Any]:
    config = _decoder(keys, "starcoder2", "Starcoder2ForCausalLM", eps="norm_epsilon")
    del config["head_dim"]
    return config | {
        "hidden_act": "gelu_pytorch_tanh",
        "use_bias": keys.holds("attn_q.bias"),
        "sliding_window": _window(keys),
    }


_ROTARY: Final = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}

ARCHITECTURES: Final[dict[str, GgufArch]] = {
    "gemma": GgufArch(
        model_types=("gemma",), config=_gemma, layer=_LLAMA, norm_offset=1.0, dtype="bfloat16"
    ),
    "gemma2": GgufArch(
        model_types=("gemma2",),
        config=_gemma2,
        layer={**_SANDWICH, **_ATTENTION, **_MLP},
        norm_offset=1.0,
        dtype="bfloat16",
    ),
    "gemma3": GgufArch(
        model_types=("gemma3_text",),
        config=_gemma3,
        layer={**_SANDWICH, **_ATTENTION, **_QK_NORM, **_MLP},
        norm_offset=1.0,
        dtype="bfloat16",  # hidden states leave the range of float16
    ),
    "llama": GgufArch(
        model_types=("llama", "mistral", "mixtral"),
        config=_llama,
        layer={**_LLAMA, "ffn_gate_inp": "block_sparse_moe.gate"},
        experts={
            "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
            "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
            "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
        },
        rotary=_ROTARY,
        drops={LLAMA3_FACTORS: _FACTORS},
    ),
    "phi3": GgufArch(
        model_types=("phi3",),
        config=_phi3,
        layer={
            **_PRE_NORM,
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        drops={"rope_factors_long.weight": _FACTORS, "rope_factors_short.weight": _FACTORS},
    ),
    "qwen2": GgufArch(model_types=("qwen2",), config=_qwen2, layer=_LLAMA),
    "qwen2moe": GgufArch(
        model_types=("qwen2_moe",),
        config=_qwen2_moe,
        layer={
            **_PRE_NORM,
            **_ATTENTION,
            "ffn_gate_inp": "mlp.gate",
            "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
            "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
            "ffn_up_shexp": "mlp.shared_expert.up_proj",
            "ffn_down_shexp": "mlp.shared_expert.down_proj",
        },
        experts=_EXPERTS,
    ),
    "qwen3": GgufArch(model_types=("qwen3",), config=_qwen3, layer={**_LLAMA, **_QK_NORM}),
    "qwen3moe": GgufArch(
        model_types=("qwen3_moe",),
        config=_qwen3_moe,
        layer={**_PRE_NORM, **_ATTENTION, **_QK_NORM, "ffn_gate_inp": "mlp.gate"},
        experts=_EXPERTS,
    ),
    "starcoder2": GgufArch(
        model_types=("starcoder2",),
        config=_starcoder2,
        layer={**_PRE_NORM, **_ATTENTION, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
    ),
}
"""Every architecture that is read, by ``general.architecture``."""


def contradictions(stated: Mapping[str, Any], read: Mapping[str, Any]) -> list[str]:
    """Where the numbers of a config.json and those of the file beside it differ."""
    compared: Collection[str] = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "num_experts", "num_local_experts", "num_experts_per_tok"),
        *("moe_intermediate_size", "rms_norm_eps", "norm_epsilon", "rope_theta"),
    )
    stated = {**(stated.get("rope_parameters") or {}), **stated}
    return [
        f"config.json says {name} = {stated[name]!r}, the GGUF file {read[name]!r}"
        for name in compared
        if _number(stated.get(name))
        and _number(read.get(name))
        and not isinstance(read[name], Filler)
        and not math.isclose(stated[name], read[name], rel_tol=1e-6)
    ]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

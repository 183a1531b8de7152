"""GPT-J 6B: attention and MLP side by side, positions rotated in neighbouring pairs."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import gptj


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    gptj.causal_lm(root, facts)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    hidden = int(facts.size("n_embd"))
    tanh = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
    why = "the runtime computes the tanh form of GELU"
    facts.expect("activation_function", *tanh, default="gelu_new", why=why)
    facts.expect("n_inner", None, 4 * hidden, default=None, why="the runtime widens by four")
    why = "the runtime has a head of its own"
    facts.expect("tie_word_embeddings", False, default=False, why=why)
    out = spell.start(config)
    out.update(
        n_positions=int(facts.size("n_positions", 2048)),
        rotary_dim=int(facts.size("rotary_dim", 64)),
        layer_norm_epsilon=facts.number("layer_norm_epsilon", 1e-5),
        tie_word_embeddings=False,
    )
    return out


MAP = ArchMap(
    model_type="gptj",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-lm",),
    parts=("text.gptj",),
)

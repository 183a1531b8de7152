"""GPT-2, DistilGPT2 and what shares their code."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import gpt2


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    s = gpt2.sizes(facts)
    if int(s.inner) != 4 * int(s.hidden):
        facts.problem("config.json: n_inner must be 4 * n_embd; the runtimes assume it")
    base = root.at(source=layout["text"], target="model")
    gpt2.stack(base, s, fused=3 * s.hidden, transposed=True)
    root.head("lm_head", s.vocab, s.hidden, tied_to=f"{base.source}.wte.weight".lstrip("."))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    why = "the runtimes compute the tanh form of GELU whatever it says"
    tanh = ("gelu_new", "gelu_pytorch_tanh")
    facts.expect("activation_function", *tanh, default="gelu_new", why=why)
    plain = "the runtimes scale attention by the head's size alone"
    facts.expect("scale_attn_weights", True, default=True, why=plain)
    facts.expect("scale_attn_by_inverse_layer_idx", False, default=False, why=plain)
    why = "the runtimes reuse the input embedding"
    facts.expect("tie_word_embeddings", True, default=True, why=why)
    facts.expect("add_cross_attention", False, default=False, why="the runtimes have none")
    out = spell.start(config)
    positions = int(facts.size("n_positions", 1024))
    out.update(
        n_positions=positions,
        n_ctx=positions,
        layer_norm_epsilon=facts.number("layer_norm_epsilon", 1e-5),
        tie_word_embeddings=True,
    )
    return out


MAP = ArchMap(
    model_type="gpt2",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {"text": "transformer"}), Layout("bare", {"text": ""})),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.gpt2",),
)

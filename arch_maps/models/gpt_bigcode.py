"""StarCoder and SantaCoder: GPT-2's stack with one key and value head."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import gpt2


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    s = gpt2.sizes(facts)
    head = s.hidden // int(facts.size("n_head"))
    gpt2.stack(root / "transformer", s, fused=s.hidden + 2 * head, transposed=False)
    root.head("lm_head", s.vocab, s.hidden, tied_to="transformer.wte.weight")


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    tanh = "gelu_pytorch_tanh"
    why = "the runtimes compute exact GELU"
    facts.expect("activation_function", "gelu", tanh, default=tanh, why=why)
    why = "with several heads the release interleaves what the runtimes read as blocks"
    facts.expect("multi_query", True, default=True, why=why)
    why = "the runtimes reuse the input embedding"
    facts.expect("tie_word_embeddings", True, default=True, why=why)
    why = "the runtimes scale attention by the head's size"
    facts.expect("scale_attn_weights", True, default=True, why=why)
    out = spell.start(config)
    s = gpt2.sizes(facts)
    out.update(
        n_inner=int(s.inner),
        n_positions=int(s.positions),
        layer_norm_epsilon=facts.number("layer_norm_epsilon", 1e-5),
        multi_query=True,
        num_key_value_heads=1,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    )
    return out


MAP = ArchMap(
    model_type="gpt_bigcode",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.gpt2",),
    remarks=("Both runtimes compute exact GELU, also where a release means its tanh form.",),
)

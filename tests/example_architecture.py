"""The architecture that docs/adding-an-architecture.md builds up; the text quotes this file."""

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.ops import Reshape, Slice
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount


def block(at: Mount, facts: Facts) -> None:
    """Attention whose query, key and value rows are stored head by head, and a gated MLP."""
    hidden, inner = facts.size("hidden_size"), facts.size("intermediate_size")
    heads = facts.size("num_attention_heads")
    dim = facts.size("head_dim")
    fused = at.input("attn.qkv.weight", heads * 3 * dim, hidden)
    by_head = Reshape(fused, (heads, 3, dim, hidden))
    for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
        one = Reshape(Slice(by_head, 1, index, index + 1), (heads * dim, hidden))
        at.rule(f"self_attn.{name}.weight", one, Kind.LINEAR)
    at.at(source="attn", target="self_attn").linear("o_proj", hidden, heads * dim)
    at.drop("attn.rope.inv_freq", "position frequencies follow from the config", dim // 2)
    for name in ("gate_proj", "up_proj"):
        at.linear(f"mlp.{name}", inner, hidden)
    at.linear("mlp.down_proj", hidden, inner)
    at.norm("input_layernorm", hidden, offset=1.0)
    at.norm("post_attention_layernorm", hidden, offset=1.0)


def tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    vocab, hidden = facts.size("vocab_size"), facts.size("hidden_size")
    body = root.at(source=layout["text"], target="model")
    body.embedding("embed_tokens", vocab, hidden)
    for _, layer in body.layers("layers", facts.count("num_hidden_layers")):
        block(layer, facts)
    body.norm("norm", hidden, offset=1.0)
    tied = facts.flag("tie_word_embeddings", False)
    table = f"{layout['text']}.embed_tokens.weight"
    root.head("lm_head", vocab, hidden, tied_to=table if tied else None)


def config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    facts.expect("hidden_act", "silu", default="silu", why="the runtimes compute SiLU only")
    settings = spell.rope(facts)
    spell.require_rope_type(facts, settings)
    out = spell.start(config)
    out.update(
        head_dim=int(facts.size("head_dim")),
        rms_norm_eps=facts.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=facts.flag("tie_word_embeddings", False),
        **spell.spell_rope(settings),
    )
    return out


MAP = ArchMap(
    model_type="example",
    tensors=tensors,
    config=config,
    layouts=(
        Layout("first release", {"text": "model"}),
        Layout("old names", {"text": "transformer"}, {"embed_tokens.weight": "wte.weight"}),
    ),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.example",),
)

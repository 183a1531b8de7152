"""Moondream's text stacks: one norm feeds attention and MLP side by side in each block."""

from __future__ import annotations

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount


def dense(root: Mount, text: Facts) -> None:
    """Moondream 2: every block as Phi has it, below the runtime's ``text``."""
    hidden, inner = text.size("hidden_size"), text.size("intermediate_size")
    heads = text.size("num_attention_heads")
    head_dim = int(hidden) // int(heads) or 1
    at = root.at(source="model.text", target="text.model")
    _table(at, "embed_tokens", text)
    for index in range(text.count("num_hidden_layers")):
        block = at.at(source=f"blocks.{index}", target=f"layers.{index}")
        block.norm("ln", hidden, bias=True)
        width = hidden + 2 * text.size("num_key_value_heads") * head_dim
        block.linear("attn.qkv", width, hidden, bias=True)
        block.linear("attn.proj", hidden, hidden, bias=True)
        block.linear("mlp.fc1", inner, hidden, bias=True)
        block.linear("mlp.fc2", hidden, inner, bias=True)
    _end(root, at, text)


def experts(root: Mount, text: Facts) -> None:
    """Moondream 3: attention with learned temperatures, and experts from a layer on."""
    hidden, inner = text.size("hidden_size"), text.size("intermediate_size")
    at = root.at(source="model.text", target="text.model")
    _table(at, "wte", text)
    for index, block in at.layers("blocks", text.count("num_hidden_layers")):
        block.norm("ln", hidden, bias=True)
        _attention(block / "attn", text)
        if index < text.count("moe_start_layer"):
            block.linear("mlp.fc1", inner, hidden, bias=True)
            block.linear("mlp.fc2", hidden, inner, bias=True)
        else:
            _experts(block / "mlp", text)
    _end(root, at, text)


def _table(at: Mount, name: str, text: Facts) -> None:
    table = at.input("wte", text.size("vocab_size"), text.size("hidden_size"))
    at.rule(f"{name}.weight", table, Kind.EMBEDDING)


def _end(root: Mount, at: Mount, text: Facts) -> None:
    hidden = text.size("hidden_size")
    at.norm("post_ln", hidden, bias=True)
    head = root.at(source="model.text", target="text")
    head.linear("lm_head", text.size("vocab_size"), hidden, bias=True, kind=Kind.HEAD)


def _attention(at: Mount, text: Facts) -> None:
    hidden, heads = text.size("hidden_size"), text.size("num_attention_heads")
    width = (heads + 2 * text.size("num_key_value_heads")) * text.size("head_dim")
    at.linear("qkv", width, hidden, bias=True)
    at.linear("proj", hidden, heads * text.size("head_dim"), bias=True)
    at.tensor("tau.wq", heads, width, kind=Kind.GATE)
    at.tensor("tau.wv", heads, width, kind=Kind.GATE)
    at.tensor("tau.alpha", heads, kind=Kind.GATE)


def _experts(at: Mount, text: Facts) -> None:
    hidden, count = text.size("hidden_size"), text.size("num_experts")
    inner = text.size("moe_intermediate_size")
    at.linear("router", count, hidden, bias=True, kind=Kind.GATE)
    at.tensor("fc1.weight", count, 2 * inner, hidden, kind=Kind.LINEAR)
    at.tensor("fc2.weight", count, hidden, inner, kind=Kind.LINEAR)

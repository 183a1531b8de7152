"""Mixtures of experts: routed experts in both source layouts, and a decoder that takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Dim, Facts
from arch_maps.ops import Slice, Stack, sources
from arch_maps.rules import Drop, Kind, Layout, Mount, Tensors
from arch_maps.text import llama

COUNTS: Final = ("n_routed_experts", "num_experts", "num_local_experts")
FeedForward = Callable[[int, Mount], None]
"""Adds what follows the attention of a layer, given its index and the layer's mount."""

Attention = Callable[[Mount, llama.Sizes], None]
"""Adds an attention below its own mount."""
Block = Callable[[Mount], None]
"""Adds the rules of one block below a mount."""
YARN_UNREAD: Final = frozenset({"attention_factor", "truncate"})
LAYOUTS: Final = (
    Layout("published", {}),
    Layout("fused experts", {}, fused_experts=True),
)
"""A tensor per expert, as releases have them; and stacked, as transformers 5 computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Routed experts: how many, their sizes, and how the source calls and holds them."""

    count: int
    hidden: int
    intermediate: int
    fused: bool
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """The source's gate, up and down in its list of experts."""


def experts(
    at: Mount,
    e: Experts,
    *,
    source: str = "experts",
    target: str = "switch_mlp",
    first: int = 0,
) -> None:
    """``down(act(gate(x)) * up(x))`` of every expert, stacked to [experts, out, in].

    ``first`` is the number of the first in the source's list.
    """
    gate, up, down = (f"{target}.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj"))
    if e.fused:
        twice = at.input(f"{source}.gate_up_proj", e.count, 2 * e.intermediate, e.hidden)
        at.rule(gate, Slice(twice, 1, 0, int(e.intermediate)), Kind.LINEAR)
        at.rule(up, Slice(twice, 1, int(e.intermediate), 2 * int(e.intermediate)), Kind.LINEAR)
        out = at.input(f"{source}.down_proj", e.count, e.hidden, e.intermediate)
        at.rule(down, out, Kind.LINEAR)
        return
    inward, outward = (e.intermediate, e.hidden), (e.hidden, e.intermediate)
    for name, leaf, shape in zip((gate, up, down), e.names, (inward, inward, outward), strict=True):
        each = (at.input(f"{source}.{first + i}.{leaf}.weight", *shape) for i in range(e.count))
        at.rule(name, Stack(tuple(each)), Kind.LINEAR)


def expert_count(facts: Facts, default: int | None = None) -> Dim:
    """Routed experts under whichever name the config has, published or transformers 5's."""
    name = next((name for name in COUNTS if name in facts.data), COUNTS[0])
    return facts.size(name, default)


def spell_expert_count(config: dict[str, Any], count: int) -> None:
    """Write the number of routed experts under every name, in place."""
    config.update(dict.fromkeys(COUNTS, int(count)))


def gated_shared(at: Mount, e: Experts, shared: int) -> None:
    """Routed experts and one shared expert, whose output a sigmoid gate weighs."""
    at.linear("gate", e.count, e.hidden, kind=Kind.GATE)
    experts(at, e)
    llama.gated_mlp(at / "shared_expert", e.hidden, shared)
    at.linear("shared_expert_gate", 1, e.hidden, kind=Kind.GATE)


def sparse_layers(facts: Facts, layers: int) -> list[bool]:
    """Which layers have experts, as ``decoder_sparse_step`` and ``mlp_only_layers`` say."""
    step = int(facts.size("decoder_sparse_step", 1))
    dense = facts.data.get("mlp_only_layers") or []
    return [(index + 1) % step == 0 and index not in dense for index in range(layers)]


def dense_prefix(facts: Facts, layers: int, *, name: str = "first_k_dense_replace") -> list[bool]:
    """Which layers have experts where the first few are dense."""
    value = facts.data.get(name) or 0
    dense = int(facts.size(name)) if value else 0
    return [index >= dense for index in range(layers)]


def layer(
    at: Mount, s: llama.Sizes, feed_forward: Block, attention: Attention = llama.attention
) -> None:
    """A pre-norm decoder layer; ``feed_forward`` names its own module below the layer."""
    attention(at / "self_attn", s)
    feed_forward(at)
    at.norm("input_layernorm", s.hidden, bias=s.norm_bias)
    at.norm("post_attention_layernorm", s.hidden, bias=s.norm_bias)
    at.drop("self_attn.rotary_emb.inv_freq", "position frequencies follow from the config")


def stack(
    at: Mount,
    s: llama.Sizes,
    feed_forward: FeedForward,
    *,
    attention: Attention = llama.attention,
    called: str = "layers",
) -> None:
    """Embedding, decoder layers with ``feed_forward``, and final norm, below ``at``.

    ``called`` is the source's name for the layers.
    """
    at.embedding("embed_tokens", s.vocab, s.hidden)
    for index in range(s.layers):
        place = at.at(source=f"{called}.{index}", target=f"layers.{index}")
        layer(place, s, partial(feed_forward, index), attention)
    at.norm("norm", s.hidden, bias=s.norm_bias)


def causal_lm(
    root: Mount,
    s: llama.Sizes,
    feed_forward: FeedForward,
    *,
    attention: Attention = llama.attention,
    called: str = "layers",
) -> None:
    """A text-only release: the stack under ``model`` and the head beside it."""
    stack(root / "model", s, feed_forward, attention=attention, called=called)
    root.head("lm_head", s.vocab, s.hidden, tied_to="model.embed_tokens.weight" if s.tied else None)


def untied(facts: Facts) -> None:
    """Require a head of its own, where the runtimes always have one."""
    why = "the runtimes have an output projection of their own for this type"
    facts.expect("tie_word_embeddings", False, None, default=False, why=why)


def drop_block(at: Mount, source: str, block: Block, why: str) -> None:
    """Drop every source tensor that ``block`` reads when it is mounted at ``source``."""
    scratch = Mount(Tensors(), leaves=at.leaves).at(source=source, target="")
    block(scratch)
    read = (leaf for rule in scratch.out.rules for leaf in sources(rule.expr))
    at.out.drops += [Drop(leaf.name, why, leaf.shape) for leaf in dict.fromkeys(read)]


def spell_config(
    config: dict[str, Any],
    facts: Facts,
    s: llama.Sizes,
    *,
    max_positions: int,
    eps: float = 1e-6,
    theta: float = 10000.0,
    rotary: float | None = None,
    rope_types: tuple[str, ...] = ("default",),
    unread: frozenset[str] = YARN_UNREAD,
) -> None:
    """Write the stack's facts under the names both runtimes read, in place.

    The arguments are the reference's defaults, ``rotary`` that of ``partial_rotary_factor``;
    ``rope_types`` is what both runtimes compute for the type, and ``unread`` as ``yarn`` has it.
    """
    facts.expect(
        "hidden_act", "silu", default="silu", why="the runtimes compute SiLU whatever it says"
    )
    settings = spell.rope(facts, default_theta=theta)
    if rotary is not None:
        settings.setdefault("partial_rotary_factor", rotary)
    require_rope(facts, settings, rope_types, unread=unread)
    config.update(
        head_dim=int(s.head_dim),
        num_key_value_heads=int(s.kv_heads),
        tie_word_embeddings=s.tied,
        rms_norm_eps=facts.number("rms_norm_eps", eps),
        max_position_embeddings=int(facts.size("max_position_embeddings", max_positions)),
        **spell.spell_rope(settings),
    )


def note_scaling(config: dict[str, Any], facts: Facts) -> None:
    """Say that mlx-lm ignores a position scaling that mlx-vlm computes."""
    if config["rope_scaling"] is not None:
        facts.note("mlx-lm ignores the position scaling of this type; mlx-vlm computes it")


def require_rope(
    facts: Facts,
    settings: dict[str, Any],
    rope_types: tuple[str, ...],
    *,
    unread: frozenset[str] = YARN_UNREAD,
) -> None:
    """Require one of ``rope_types``, and spell YaRN's defaults out, in place.

    ``unread`` names the YaRN settings that must have their default, as no runtime reads them.
    """
    if settings["rope_type"] not in rope_types:
        facts.problem(
            f"config.json: {facts.path}rope_type is {settings['rope_type']!r}; the runtimes "
            f"compute only {', '.join(rope_types)} for this type"
        )
    if settings["rope_type"] != "yarn":
        return
    limit = int(facts.size("max_position_embeddings"))
    settings.setdefault("original_max_position_embeddings", limit)
    settings.setdefault("beta_fast", 32)
    settings.setdefault("beta_slow", 1)
    for name in sorted(unread & set(settings)):
        if settings[name] not in (None, True):
            facts.problem(
                f"config.json: {facts.path}rope_parameters.{name} is {settings[name]!r}; "
                "the runtimes do not read it"
            )

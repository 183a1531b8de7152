"""Shrink a release's config to twin size: every ratio, flag and layer kind kept, scalars moved."""

import copy
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Final

from validate.twin.errors import TwinError
from validate.twin.family import Family, Json
from validate.twin.layers import select_layers
from validate.twin.tokens import TokenPlan, is_token_field, plan_tokens


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a twin: multiples of 64 where a linear layer reads them, so group 64 is legal."""

    hidden: int = 128
    intermediate: int = 192
    head_dim: int = 64
    tower_hidden: int = 64
    tower_intermediate: int = 128
    tower_layers: int = 3
    linear_head_dim: int = 32
    experts: int = 8
    vocab: int = 512
    positions: int = 2048
    window: int = 16


DEFAULT_SIZES: Final = Sizes()
HEADS: Final = ("num_attention_heads", "num_heads", "n_head", "n_heads")
KV_HEADS: Final = ("num_key_value_heads", "num_kv_heads")
DEPTHS: Final = ("num_hidden_layers", "depth", "n_layer", "num_layers")
HIDDEN: Final = ("hidden_size", "d_model", "n_embd", "dim")
INTERVALS: Final = ("full_attention_interval", "sliding_window_pattern")
DENSE_PREFIXES: Final = ("first_k_dense_replace", "num_dense_layers")
EXPERT_COUNTS: Final = ("num_experts", "n_routed_experts", "num_local_experts")
INTERMEDIATES: Final = (
    *("intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size"),
    "shared_expert_intermediate_size",
)
# Not part of the architecture, or not to be run: a twin is plain and made here.
DROPPED: Final = ("quantization_config", "quantization", "auto_map", "model_file", "_name_or_path")
NOT_SAVED: Final = ("mtp_num_hidden_layers", "num_nextn_predict_layers")
TOWERS: Final = ("vision", "audio", "visual")
# Large enough that a runtime which takes its own default instead is seen in float32.
EPS: Final = 2.3e-4
FACTORS: Final = {
    "rope_theta": 0.07,
    "rope_local_base_freq": 0.07,
    "rotary_emb_base": 0.07,
    "factor": 0.75,
    "low_freq_factor": 1.25,
    "high_freq_factor": 1.25,
    "partial_rotary_factor": 2.0,
    "rotary_pct": 2.0,
}
SCALED_SUFFIXES: Final = ("_multiplier", "_scaling", "_scalar", "softcapping", "scale", "_scale")
SCALE: Final = 0.8


@dataclass(frozen=True)
class Scope:
    """One config dict being shrunk, its place, and what its head and layer counts become."""

    source: Json
    path: str
    tower: bool
    sizes: Sizes
    layers: tuple[int, ...]
    depth: int

    def first(self, names: tuple[str, ...]) -> int | None:
        """The source's value of the first of ``names`` it has."""
        return next((self.source[n] for n in names if type(self.source.get(n)) is int), None)

    @property
    def heads(self) -> int:
        """Query heads: four, in groups of two where the source groups them."""
        return 4

    @property
    def kv_heads(self) -> int:
        """Key-value heads: all four, two groups, or one, as in the source."""
        heads, kv_heads = self.first(HEADS), self.first(KV_HEADS)
        if kv_heads is None or kv_heads == heads:
            return self.heads
        return 1 if kv_heads == 1 else self.heads // 2

    @property
    def hidden(self) -> int:
        """Residual width."""
        return self.sizes.tower_hidden if self.tower else self.sizes.hidden

    @property
    def head_dim(self) -> int:
        """``hidden / heads`` where the source has that ratio, else a width of its own."""
        heads, hidden, head_dim = (
            self.first(HEADS),
            self.first(HIDDEN),
            self.source.get("head_dim"),
        )
        if head_dim is None or (heads and hidden and heads * head_dim == hidden):
            return self.hidden // self.heads
        return self.sizes.head_dim


def shrink_config(
    config: Json, family: Family, sizes: Sizes = DEFAULT_SIZES
) -> tuple[Json, TokenPlan]:
    """The twin's config, in the source's own spelling, and its special tokens.

    TwinError when ``config`` names no model type or no architecture.
    """
    for name in ("model_type", "architectures"):
        if not config.get(name):
            raise TwinError(f"config.json has no {name!r}, so its twin cannot be built; add it")
    config = {**family.in_code, **config}
    plan = plan_tokens(config, family, vocab_size=sizes.vocab)
    shrunk = _shrink(config, "", sizes, plan)
    _move_mrope(shrunk, config)
    shrunk = family.adjust(shrunk, copy.deepcopy(config))
    for path in family.pinned:
        _copy_path(path.split("."), config, shrunk)
    return shrunk, plan


def _shrink(source: Json, path: str, sizes: Sizes, plan: TokenPlan) -> Json:
    tower = any(word in path for word in TOWERS)
    layers, depth = _layers(source, tower, sizes)
    scope = Scope(source, path, tower, sizes, layers, depth)
    result: Json = {}
    for name, value in source.items():
        if name in DROPPED:
            continue
        if isinstance(value, dict):
            result[name] = _shrink(value, f"{path}.{name}".lstrip("."), sizes, plan)
        elif is_token_field(name, value):
            result[name] = plan.renumber(value)
        elif isinstance(value, list) and depth and len(value) == depth:
            result[name] = [value[index] for index in layers]
        else:
            result[name] = _value(name, value, scope)
    return result


def _layers(source: Json, tower: bool, sizes: Sizes) -> tuple[tuple[int, ...], int]:
    depth = next((source[name] for name in DEPTHS if type(source.get(name)) is int), 0)
    if tower:
        return tuple(range(min(depth, sizes.tower_layers))), depth
    lists = [v for v in source.values() if isinstance(v, list) and depth and len(v) == depth]
    intervals = [source[name] for name in INTERVALS if type(source.get(name)) is int]
    prefixes = [source[name] for name in DENSE_PREFIXES if type(source.get(name)) is int]

    def kind(index: int) -> Hashable:
        return (
            *(repr(values[index]) for values in lists),
            *((index + 1) % interval == 0 for interval in intervals),
            *(index < prefix for prefix in prefixes),
        )

    return select_layers([kind(index) for index in range(depth)]), depth


def _value(name: str, value: Any, scope: Scope) -> Any:
    if type(value) is float or (type(value) is int and name in FACTORS):
        return _scalar(name, value)
    if type(value) is not int or isinstance(value, bool):
        return value
    rule = RULES.get(name)
    return value if rule is None else rule(value, scope)


def _scalar(name: str, value: float) -> float:
    if name.endswith(("eps", "epsilon")):
        return EPS
    if name in FACTORS:
        moved = round(value * FACTORS[name], 6)
        # A fraction of the head stays one; a full rotation stays full.
        limit = 1.0 if name in ("partial_rotary_factor", "rotary_pct") else moved
        return min(moved, limit)
    if name.endswith(SCALED_SUFFIXES):
        return round(value * SCALE, 6)
    return value


def _interval(value: int, scope: Scope) -> int:
    special = [rank for rank, index in enumerate(scope.layers) if (index + 1) % value == 0]
    return special[0] + 1 if special else value


def _window(value: int, scope: Scope) -> int:
    return min(value, scope.sizes.window)


def _intermediate(value: int, scope: Scope) -> int:
    del value
    return scope.sizes.tower_intermediate if scope.tower else scope.sizes.intermediate


def _linear_key_heads(value: int, scope: Scope) -> int:
    return 4 if value == scope.source.get("linear_num_value_heads") else 2


def _linear_value_heads(value: int, scope: Scope) -> int:
    """As many per key head as in the source, up to three."""
    key_heads = scope.source.get("linear_num_key_heads", value)
    return 4 if value == key_heads else 2 * min(max(value // key_heads, 2), 3)


Rule = Callable[[int, Scope], int]
RULES: Final[dict[str, Rule]] = {
    **dict.fromkeys(HEADS, lambda _, scope: scope.heads),
    **dict.fromkeys(KV_HEADS, lambda _, scope: scope.kv_heads),
    **dict.fromkeys(DEPTHS, lambda _, scope: len(scope.layers)),
    **dict.fromkeys(HIDDEN, lambda _, scope: scope.hidden),
    **dict.fromkeys(INTERMEDIATES, _intermediate),
    **dict.fromkeys(INTERVALS, _interval),
    **dict.fromkeys(DENSE_PREFIXES, lambda v, scope: sum(i < v for i in scope.layers)),
    **dict.fromkeys(EXPERT_COUNTS, lambda v, scope: min(v, scope.sizes.experts)),
    **dict.fromkeys(NOT_SAVED, lambda _, scope: 0),
    "head_dim": lambda _, scope: scope.head_dim,
    "linear_key_head_dim": lambda _, scope: scope.sizes.linear_head_dim,
    "linear_num_key_heads": _linear_key_heads,
    "linear_num_value_heads": _linear_value_heads,
    "linear_value_head_dim": lambda _, scope: scope.sizes.linear_head_dim,
    "max_position_embeddings": lambda v, scope: min(v, scope.sizes.positions),
    "max_window_layers": lambda _, scope: len(scope.layers),
    "num_experts_per_tok": lambda v, scope: min(v, 2),
    "original_max_position_embeddings": lambda v, scope: min(v, 4 * scope.sizes.window),
    "sliding_window": _window,
    "vocab_size": lambda _, scope: scope.sizes.vocab,
}


def _move_mrope(shrunk: Json, source: Json) -> None:
    """Share the twin's rotary frequencies over the position axes in the source's proportions."""
    for name, value in shrunk.items():
        if not isinstance(value, dict):
            continue
        _move_mrope(value, source.get(name, {}))
        section = value.get("mrope_section")
        if section and "head_dim" in shrunk:
            fraction = value.get("partial_rotary_factor", shrunk.get("partial_rotary_factor", 1.0))
            frequencies = int(shrunk["head_dim"] * fraction) // 2
            tail = [frequencies * part // sum(section) for part in section[1:]]
            value["mrope_section"] = [frequencies - sum(tail), *tail]


def _copy_path(parts: list[str], source: Json, target: Json) -> None:
    for part in parts[:-1]:
        source, target = source.get(part, {}), target.get(part, {})
    if parts[-1] in source and parts[-1] in target:
        target[parts[-1]] = source[parts[-1]]

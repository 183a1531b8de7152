"""Faults planted into a loaded MLX model, as a wrong conversion would bring them along."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from arch_maps.rules import Kind, Rule
from validate.loaded import file_names, written_tensors
from validate.runtime import MlxRuntime

PARTS: Final = {
    "text": ("text",),
    "image": ("vision", "projector"),
    "audio": ("audio", "projector"),
}
"""The parts of a release that a prompt of each kind brings in."""
_TRIED: Final = 6
"""Places tried for one sort of fault: a tower may have parts that the model does not use."""
_SCALES: Final = (
    *("layer_scalar", "layer_scale", "layer_scale1", "gamma", "ls1", "lambda1", "lambda_1"),
)
_QUERIES: Final = (
    (".q_proj.", ".k_proj."),
    (".wq.", ".wk."),
    (".query.", ".key."),
    (".linear_q.", ".linear_k."),
)
_FUSED: Final = ("qkv", "wqkv", "qkv_proj", "query_key_value", "c_attn", "in_proj", "att_proj")


@dataclass(frozen=True)
class Planted:
    """A fault: what it is called, the modules that it may rightly be blamed on, wrong values."""

    name: str
    modules: tuple[str, ...]
    values: dict[str, Any]
    """By their names in the files."""


class Site:
    """The parameters of a loaded model by their names in the files."""

    def __init__(self, runtime: MlxRuntime, folder: Path) -> None:
        self.model = runtime.model
        paths = list(runtime.parameters())
        name_of = file_names(written_tensors(folder), runtime.parameters())
        self.paths = {name_of(path): path for path in paths}
        self.values = dict(runtime.parameters())

    def module(self, target: str) -> str:
        return self.paths[target].rpartition(".")[0]

    def plant(self, fault: Planted) -> None:
        self._put(fault.values)

    def mend(self, fault: Planted) -> None:
        self._put({target: self.get(target) for target in fault.values})

    def _put(self, values: Mapping[str, Any]) -> None:
        from mlx.utils import tree_unflatten

        named = [(self.paths[target], value) for target, value in values.items()]
        self.model.update(tree_unflatten(named))

    def get(self, target: str) -> Any:
        return self.values[self.paths[target]]


def faults(site: Site, rules: Sequence[Rule], kind: str = "text") -> Iterator[Planted]:
    """Faults of each sort that the parts of a ``kind`` of prompt have a place for.

    Of each sort the one in the middle comes first, and then others, for when it has no effect.
    """
    own = [r for r in rules if r.part in PARTS[kind] and r.target in site.paths]
    tower = [r for r in own if r.part != "projector"]
    for plant in (_swapped, _norm, _flipped, _scale, _positions):
        yield from plant(site, tower or own)
    if kind == "text":
        yield from _expert(site, own)
    else:
        yield from _patches(site, tower)
        yield from _projector(site, [r for r in own if r.part == "projector"])
    if kind == "audio":
        yield from _convolution(site, tower)


def _from_the_middle(found: list[Rule]) -> list[Rule]:
    middle = len(found) // 2
    return sorted(found, key=lambda rule: abs(found.index(rule) - middle))[:_TRIED]


def _one(site: Site, name: str, rule: Rule, value: Any) -> Planted:
    return Planted(name, (site.module(rule.target),), {rule.target: value})


def _swapped(site: Site, rules: Sequence[Rule]) -> Iterator[Planted]:
    targets = {rule.target for rule in rules}
    keys = {
        rule.target: other
        for rule in rules
        for query, key in _QUERIES
        if query in rule.target
        and rule.target.endswith(".weight")
        and (other := rule.target.replace(query, key)) in targets
    }
    for rule in _from_the_middle([r for r in rules if r.target in keys]):
        other = keys[rule.target]
        q, k = site.get(rule.target), site.get(other)
        if q.shape[1:] != k.shape[1:]:
            continue
        rows = min(len(q), len(k))
        swapped = {
            rule.target: _joined([k[:rows], q[rows:]]),
            other: _joined([q[:rows], k[rows:]]),
        }
        yield Planted("swapped q/k", (site.module(rule.target), site.module(other)), swapped)
    fused = [r for r in rules if _is_fused(r.target)]
    for rule in _from_the_middle(fused):
        # Thirds are q and k where these are as large as v and lie one after another.
        value = site.get(rule.target)
        rows = len(value) // 3
        parts = [value[rows : 2 * rows], value[:rows], value[2 * rows :]]
        yield _one(site, "swapped thirds of q/k/v", rule, _joined(parts))


def _is_fused(target: str) -> bool:
    module, _, last = target.rpartition(".")
    return last == "weight" and module.rpartition(".")[2] in _FUSED and "att" in target


def _norm(site: Site, rules: Sequence[Rule]) -> Iterator[Planted]:
    norms = [r for r in rules if r.kind is Kind.NORM and r.target.endswith(".weight")]
    layers = [r for r in norms if r.target.endswith("layernorm.weight")]
    for rule in _from_the_middle(layers) + _from_the_middle(norms):
        yield _one(site, "norm off by one", rule, site.get(rule.target) + 1)


def _dense(rules: Sequence[Rule]) -> list[Rule]:
    return [
        r
        for r in rules
        if r.kind is Kind.LINEAR and len(r.expr.shape) == 2 and r.target.endswith(".weight")
    ]


def _flipped(site: Site, rules: Sequence[Rule]) -> Iterator[Planted]:
    for rule in _from_the_middle(_dense(rules)):
        value = site.get(rule.target)
        size = min(64, value.shape[1])
        group = value[:, :size]
        low, high = group.min(axis=1, keepdims=True), group.max(axis=1, keepdims=True)
        # Codes q of a group become 15 - q: every value is mirrored at the middle of its range.
        flipped = _joined([low + high - group, value[:, size:]], axis=1)
        yield _one(site, "flipped 4-bit block", rule, flipped)


def _expert(site: Site, rules: Sequence[Rule]) -> Iterator[Planted]:
    stacked = [
        r
        for r in rules
        if len(r.expr.shape) == 3 and r.kind is Kind.LINEAR and r.target.endswith(".weight")
    ]
    for rule in _from_the_middle(stacked)[:1]:
        value = site.get(rule.target)
        if value.shape[1] == 1 or value.shape[2] == 1:
            return
        for number, expert in enumerate(value):
            wrong = expert.T.reshape(expert.shape)[None]
            whole = _joined([value[:number], wrong, value[number + 1 :]])
            yield _one(site, "transposed expert", rule, whole)


def _scale(site: Site, rules: Sequence[Rule]) -> Iterator[Planted]:
    import mlx.core as mx

    scales = [r for r in rules if {*r.target.split(".")[-2:]} & {*_SCALES}]
    for rule in _from_the_middle(scales):
        yield _one(site, "missing layer scale", rule, mx.ones_like(site.get(rule.target)))


def _positions(site: Site, rules: Sequence[Rule]) -> Iterator[Planted]:
    """Every position gets what is learned for the one before it."""
    import mlx.core as mx

    tables = [r for r in rules if r.kind is Kind.POSITION and max(r.expr.shape[:-1], default=1) > 1]
    for rule in _from_the_middle([r for r in tables if "pos" in r.target] or tables):
        value = site.get(rule.target)
        rows = max(range(value.ndim - 1), key=lambda axis: value.shape[axis])
        yield _one(site, "shifted positions", rule, mx.roll(value, 1, rows))


def _patches(site: Site, rules: Sequence[Rule]) -> Iterator[Planted]:
    """Rows of a patch taken for columns, or its colours for places where patches lie flat."""
    for rule in [r for r in rules if "patch" in r.target or r.kind is Kind.CONV][:_TRIED]:
        value = site.get(rule.target)
        name = "transposed patches"
        if value.ndim >= 4 and value.shape[-2] == value.shape[-3] > 1:
            yield _one(site, name, rule, value.swapaxes(-2, -3))
        elif rule.kind is Kind.LINEAR and value.ndim == 2 and value.shape[1] % 3 == 0:
            columns = value.reshape(len(value), -1, 3).swapaxes(1, 2)
            yield _one(site, name, rule, columns.reshape(value.shape))


def _projector(site: Site, rules: Sequence[Rule]) -> Iterator[Planted]:
    """The two halves of what goes into a projector, as patches merged in another order."""
    dense = [r for r in rules if r.kind is Kind.LINEAR and len(r.expr.shape) == 2]
    for rule in dense[:_TRIED]:
        value = site.get(rule.target)
        half = value.shape[1] // 2
        swapped = _joined([value[:, half:], value[:, :half]], axis=1)
        yield _one(site, "swapped projector", rule, swapped)


def _convolution(site: Site, rules: Sequence[Rule]) -> Iterator[Planted]:
    """A kernel [out, rows, columns, in] transposed, or one [out, steps, in] run backwards."""
    for rule in [r for r in rules if r.kind is Kind.CONV][:_TRIED]:
        value = site.get(rule.target)
        if value.ndim == 4 and value.shape[1] == value.shape[2] > 1:
            yield _one(site, "transposed convolution", rule, value.swapaxes(1, 2))
        elif value.ndim == 3 and value.shape[1] > 1:
            yield _one(site, "transposed convolution", rule, value[:, ::-1])


def _joined(parts: Sequence[Any], axis: int = 0) -> Any:
    import mlx.core as mx

    return mx.concatenate([part for part in parts if part.shape[axis]], axis=axis)


def with_other_base(config: Any, kind: str) -> bool:
    """Make the rotary bases of a config's parts of this ``kind`` half as large again, in place.

    False where it states none.
    """
    parts = {"image": ("vision_config",), "audio": ("audio_config",)}
    if kind == "text":
        return _enlarged(config, skip=("vision_config", "audio_config"))
    return any([_enlarged(config.get(name), skip=()) for name in parts[kind]])


def _enlarged(config: Any, *, skip: tuple[str, ...]) -> bool:
    changed = False
    if isinstance(config, dict):
        for key, value in config.items():
            if key in skip:
                continue
            if key in ("rope_theta", "rope_local_base_freq", "rotary_emb_base") and isinstance(
                value, int | float
            ):
                config[key] = value * 1.5
                changed = True
            else:
                changed = _enlarged(value, skip=skip) or changed
    return changed

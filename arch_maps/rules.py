"""The rule language: what every tensor of a release becomes, stated through mounts.

A part is a function that takes a ``Mount`` and sizes and names its tensors relative to it; only
the model that mounts the part knows where it lives on either side. Names expand from the config,
so there are no patterns and no matching order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final, Literal

from arch_maps.ops import Affine, Expr, Permute, Shape, Source

Part = Literal["text", "vision", "audio", "projector"]
MAX_TENSORS: Final = 400_000
"""Source tensors of one release; the largest of today have a third."""


class Kind(StrEnum):
    """What a tensor is; it decides quantization and storage, not the computation."""

    __hash__ = str.__hash__  # an enum's own is interpreted, and large releases ask by the 100,000
    LINEAR = "linear"
    EMBEDDING = "embedding"
    HEAD = "head"
    GATE = "gate"
    """A routing or decay projection: small, sensitive, never quantized."""
    NORM = "norm"
    BIAS = "bias"
    CONV = "conv"
    POSITION = "position"
    """A learned table that is added, not looked up by token: never quantized."""
    STATE = "state"
    """Recurrence parameters that the runtimes keep in the precision of the release."""
    INDEX = "index"
    """Integers that a runtime looks things up by: stored as int32, as MLX indexes."""
    HASH = "hash"
    """Integers that a runtime computes hashes of 64 bits with: stored as they are."""


QUANTIZABLE = frozenset({Kind.LINEAR, Kind.EMBEDDING, Kind.HEAD})


@dataclass(frozen=True, slots=True)
class Rule:
    """One target parameter: its runtime name, how it is made, and what it is."""

    target: str
    expr: Expr
    kind: Kind
    part: Part
    tied: bool = False
    """Whether this is an embedding that the output projection multiplies by as well."""

    @property
    def module(self) -> str:
        """Path of the runtime module that owns the parameter."""
        return self.target.rpartition(".")[0]

    @property
    def quantizable(self) -> bool:
        """Whether the map lets this tensor be quantized (matrices of the text part)."""
        return (
            self.part == "text"
            and self.kind in QUANTIZABLE
            and self.target.endswith(".weight")
            and len(self.expr.shape) >= 2
        )


@dataclass(frozen=True, slots=True)
class Drop:
    """A source tensor that the target has no place for, and why."""

    name: str
    reason: str
    shape: Shape | None = None
    same_as: str | None = None
    """Source tensor that it must equal, bit for bit (a tied head)."""
    required: bool = False
    only_with: str | None = None
    """Source tensor without which this one is no such thing, but surplus."""
    filled_with: float | None = None
    """What each of its elements must be, so that leaving it out changes nothing."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One generation of source names: where each mounted part lives, and what it calls a leaf."""

    name: str
    prefixes: dict[str, str]
    leaves: Mapping[str, str] = field(default_factory=dict)
    """Ends of source names, whole dotted words, as this generation spells them: map's -> its."""
    fused_experts: bool = False
    """Experts as transformers 5 holds them in memory: stacked, gate and up in one tensor."""

    def __getitem__(self, part: str) -> str:
        """Source prefix of the part."""
        return self.prefixes[part]


@dataclass(frozen=True, slots=True)
class ValuePath:
    """What lies between an attention layer's value projection and its output projection.

    Without ``reason`` the layer's output is a sum of value vectors of ``head`` channels, weighted
    by numbers, and projected: a rotation of every head can be folded into both projections.
    """

    module: str
    """Target path of the attention module."""
    value: str = "v_proj"
    output: str = "o_proj"
    head: int = 0
    beside: tuple[str, ...] = ()
    """The module's other children, none of which touches values."""
    reason: str = ""
    """What stands in the way; empty where nothing does."""


@dataclass(slots=True)
class Tensors:
    """Rules and drops as a map writes them down, and what it knows of the values' paths."""

    rules: list[Rule] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)
    values: list[ValuePath] = field(default_factory=list)
    tied: set[str] = field(default_factory=set)
    """Source tensors of embeddings that the runtime's output projection multiplies by."""
    named: int = 0

    def name_one(self) -> None:
        """Count a source tensor; ValueError beyond what any release has.

        So a config with a hostile number of experts or blocks cannot exhaust memory.
        """
        self.named += 1
        if self.named > MAX_TENSORS:
            raise ValueError(f"it would make a release of more than {MAX_TENSORS:,} tensors")


@dataclass(frozen=True, slots=True)
class Mount:
    """A place in both trees; every method adds the rules of one module below it."""

    out: Tensors
    source: str = ""
    target: str = ""
    part: Part = "text"
    leaves: Mapping[str, str] = field(default_factory=dict)

    def __truediv__(self, name: str) -> Mount:
        """The child module ``name``, called the same on both sides."""
        return self.at(source=name, target=name)

    def at(self, *, source: str, target: str, part: Part | None = None) -> Mount:
        """The child that is called ``source`` there and ``target`` here."""
        return Mount(
            self.out,
            _join(self.source, source),
            _join(self.target, target),
            part or self.part,
            self.leaves,
        )

    def layers(self, name: str, count: int) -> Iterator[tuple[int, Mount]]:
        """The children ``name.0`` .. ``name.{count-1}`` with their indices."""
        for index in range(count):
            yield index, self / f"{name}.{index}"

    def input(self, name: str, *shape: int) -> Source:
        """The source tensor ``name`` below this mount."""
        self.out.name_one()
        return Source(self._source_name(name), shape)

    def rule(self, name: str, expr: Expr, kind: Kind) -> None:
        """Fill the target parameter ``name`` with ``expr``."""
        self.out.rules.append(Rule(_join(self.target, name), expr, kind, self.part))

    def tensor(self, name: str, *shape: int, kind: Kind) -> None:
        """A tensor with the same name and layout on both sides."""
        self.rule(name, self.input(name, *shape), kind)

    def linear(
        self, name: str, out: int, inp: int, *, bias: bool = False, kind: Kind = Kind.LINEAR
    ) -> None:
        """A dense layer: ``weight`` [out, inp] and optionally ``bias`` [out]."""
        self.tensor(f"{name}.weight", out, inp, kind=kind)
        if bias:
            self.tensor(f"{name}.bias", out, kind=Kind.BIAS)

    def embedding(self, name: str, count: int, size: int, kind: Kind = Kind.EMBEDDING) -> None:
        """A look-up table ``weight`` [count, size]."""
        self.tensor(f"{name}.weight", count, size, kind=kind)

    def norm(self, name: str, size: int, *, bias: bool = False, offset: float = 0.0) -> None:
        """A norm's ``weight`` [size]; ``offset`` where torch multiplies by (offset + weight)."""
        weight: Expr = self.input(f"{name}.weight", size)
        if offset:
            weight = Affine(weight, offset=offset)
        self.rule(f"{name}.weight", weight, Kind.NORM)
        if bias:
            self.tensor(f"{name}.bias", size, kind=Kind.BIAS)

    def conv(self, name: str, out: int, inp: int, *kernel: int, bias: bool = False) -> None:
        """A convolution: torch [out, in, *kernel] becomes channels-last [out, *kernel, in]."""
        weight = self.input(f"{name}.weight", out, inp, *kernel)
        axes = (0, *range(2, 2 + len(kernel)), 1)
        self.rule(f"{name}.weight", Permute(weight, axes), Kind.CONV)
        if bias:
            self.tensor(f"{name}.bias", out, kind=Kind.BIAS)

    def linear_values(self, value: str, output: str, *, head: int, beside: Sequence[str]) -> None:
        """State that this attention layer only adds up values: see :class:`ValuePath`."""
        path = ValuePath(self.target, value, output, int(head), tuple(beside))
        self.out.values.append(path)

    def changed_values(self, reason: str) -> None:
        """State what this attention layer does to values besides adding them up."""
        self.out.values.append(ValuePath(self.target, reason=reason))

    def drop(
        self,
        name: str,
        reason: str,
        *shape: int,
        same_as: str | None = None,
        required: bool = False,
        filled_with: float | None = None,
    ) -> None:
        """Leave out the source tensor ``name`` below this mount; it may be absent."""
        self.out.name_one()
        full, size = self._source_name(name), shape or None
        self.out.drops.append(Drop(full, reason, size, same_as, required, filled_with=filled_with))

    def bind_drops(self, witness: str) -> None:
        """Let the drops below this mount hold only where its tensor ``witness`` is present.

        Else a config that understates its layers would drop the last one as a drafter.
        """
        inside, sign = f"{self.source}.", self._source_name(witness)
        self.out.drops[:] = [
            replace(drop, only_with=sign) if drop.name.startswith(inside) else drop
            for drop in self.out.drops
        ]

    def head(self, name: str, vocab: int, size: int, *, tied_to: str | None) -> None:
        """The output projection, or its drop when it is tied to the embedding ``tied_to``."""
        if tied_to is None:
            self.linear(name, vocab, size, kind=Kind.HEAD)
        else:
            self.out.tied.add(tied_to)
            reason = "tied to the input embedding; the runtime reuses that table"
            self.drop(f"{name}.weight", reason, vocab, size, same_as=tied_to)

    def copied_head(self, name: str, vocab: int, size: int, *, tied_to: str) -> None:
        """The output projection of a runtime that stores a tied one apart from the embedding."""
        self.rule(f"{name}.weight", Source(tied_to, (vocab, size)), Kind.HEAD)
        self.drop(f"{name}.weight", "tied to the input embedding", vocab, size, same_as=tied_to)

    def _source_name(self, name: str) -> str:
        full = _join(self.source, name)
        if not self.leaves:
            return full
        for ours, theirs in self.leaves.items():
            if full == ours or full.endswith(f".{ours}"):
                return full.removesuffix(ours) + theirs
        return full


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def targets(rules: Sequence[Rule]) -> dict[str, Rule]:
    """Rules by target name; a target filled twice is a fault of the map."""
    by_name = {rule.target: rule for rule in rules}
    assert len(by_name) == len(rules), "a map fills a target parameter twice"
    return by_name

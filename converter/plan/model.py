"""The plan: frozen, hashed, and plain JSON; everything later only follows it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from arch_maps.ops import Expr, Shape, describe, element_count
from arch_maps.rules import Drop, Rule
from converter.plan.canonical import canonical
from converter.plan.options import Options
from converter.source.header import paused_gc
from quant.recipe import QuantSpec

FORMAT = 3
"""Version of the plan's JSON and of everything that decides output bytes."""


class StoredTensor(NamedTuple):
    """A tensor of an output file; ``start`` is its absolute byte offset there."""

    name: str
    dtype: str
    shape: Shape
    file: str
    start: int
    nbytes: int


class Output(NamedTuple):
    """One target parameter and the tensors that store it, by role.

    A plain parameter has the role ``""``; a quantized one has ``weight``, ``scales`` and, for
    affine, ``biases``.
    """

    rule: Rule
    dtype: str
    """Storage dtype of the plain tensor, or of scales and biases."""
    quant: QuantSpec | None
    stored: dict[str, StoredTensor]
    kept: str = ""
    """Why a quantizable tensor was left alone."""
    repacked: dict[str, Expr] | None = None
    """By role, how each stored tensor is made of the source's own codes and scales."""
    origin: str = ""
    """What became of the source's own quantization, in words; empty where it had none."""

    @property
    def expr(self) -> Expr:
        """How the parameter is made."""
        return self.rule.expr

    @property
    def elements(self) -> int:
        """Elements of the parameter, as a plain number: named sizes spell out every product."""
        return element_count(self.rule.expr.shape)

    def to_json(self) -> dict[str, Any]:
        """What the plan's JSON says of it; ``canonical`` writes the same as text."""
        entry: dict[str, Any] = {
            "target": self.rule.target,
            "from": describe(self.expr),
            "kind": str(self.rule.kind),
            "part": self.rule.part,
            "dtype": self.dtype,
            "stored": {
                role: [t.file, t.start, t.dtype, list(t.shape)] for role, t in self.stored.items()
            },
        }
        if self.quant is not None:
            entry["quantization"] = self.quant.to_config()
            if self.quant.method not in ("rtn", "mlx"):
                entry["method"] = self.quant.method
        if self.kept:
            entry["kept"] = self.kept
        if self.origin:
            entry["origin"] = self.origin
        return entry


@dataclass(frozen=True, slots=True)
class Shard:
    """An output file: its exact header bytes and its size."""

    file: str
    header: bytes
    size: int
    tensors: tuple[StoredTensor, ...]


def bits_per_weight(nbytes: int, parameters: int) -> float:
    """Bits of stored tensors per parameter, files' headers left out, as mlx-lm counts them."""
    return 8 * nbytes / max(1, parameters)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole conversion."""

    version: str
    model_type: str
    layout: str
    options: Options
    source: dict[str, Any]
    """Identity of the release: repo and commit where known, headers' digests, config's digest."""
    config: dict[str, Any]
    outputs: tuple[Output, ...]
    drops: tuple[Drop, ...]
    shards: tuple[Shard, ...]
    notes: tuple[str, ...]
    parameters: int
    source_bytes: int
    map: dict[str, Any] | None = None
    """How the map was come by, where it is none of the registry's."""
    decoding: dict[str, Any] | None = None
    """The source's own quantization: its settings, and how many tensors were in which form."""
    draft: str = ""
    """Hash of the plan before formats were chosen for a size: what was asked, and of what."""

    @property
    def output_bytes(self) -> int:
        """Size of the weight files."""
        return sum(shard.size for shard in self.shards)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per parameter, scales and everything else included."""
        tensors = sum(shard.size - len(shard.header) for shard in self.shards)
        return bits_per_weight(tensors, self.parameters)

    def origins(self) -> dict[str, str]:
        """By parameter, what became of the source's own quantization of it."""
        return {out.rule.target: out.origin for out in self.outputs if out.origin}

    @property
    def kept(self) -> str:
        """What the source's own quantization is called where it was kept: ``4bit``, ``mxfp4``."""
        spec = self.config.get("quantization")
        if self.options.quant is not None or not isinstance(spec, dict):
            return ""
        return f"{spec['bits']}bit" if spec["mode"] == "affine" else str(spec["mode"])

    @cached_property
    @paused_gc()
    def hash(self) -> str:
        """sha256 of the canonical JSON, 64 hex digits."""
        digest = hashlib.sha256()
        for text in canonical(self._content(), self.outputs):
            digest.update(text.encode())
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The whole plan as plain data, its hash included."""
        outputs = [out.to_json() for out in self.outputs]
        return {"hash": self.hash, **self._content(), "outputs": outputs}

    def index(self) -> dict[str, Any]:
        """The content of model.safetensors.index.json."""
        stored = sorted((t.name, t.file) for shard in self.shards for t in shard.tensors)
        total = sum(t.nbytes for shard in self.shards for t in shard.tensors)
        return {
            "metadata": {"total_size": total, "total_parameters": self.parameters},
            "weight_map": dict(stored),
        }

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": self.version,
            "model_type": self.model_type,
            **({"map": self.map} if self.map else {}),
            **({"decoding": self.decoding} if self.decoding else {}),
            "layout": self.layout,
            "recipe": self.options.to_json(),
            "source": self.source,
            "config": self.config,
            "parameters": self.parameters,
            "drops": [
                {"name": d.name, "reason": d.reason, "same_as": d.same_as} for d in self.drops
            ],
            "shards": [{"file": shard.file, "bytes": shard.size} for shard in self.shards],
            "notes": list(self.notes),
        }

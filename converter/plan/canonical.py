"""The canonical JSON of a plan: keys sorted, no spaces. Its sha256 is the plan's hash.

A plan of 100,000 tensors spells 30 MB of it, nearly all of that its outputs. So these are written
as text at once: making plain data of each and encoding that takes twice as long.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from json.encoder import encode_basestring_ascii
from typing import TYPE_CHECKING, Any, Final

from arch_maps.ops import Shape, Source, describe
from quant.recipe import QuantSpec

if TYPE_CHECKING:
    from converter.plan.model import Output

_LOT: Final = 1000
"""Outputs of one piece of text."""
quoted = encode_basestring_ascii
"""A string as JSON, quotes included, in ASCII."""


def canonical(content: Mapping[str, Any], outputs: Sequence[Output]) -> Iterator[str]:
    """``content`` with ``outputs`` as its member of that name, as json would write both.

    In pieces, for whoever needs no more than to see it go by.
    """
    before = "{"
    for key in sorted([*content, "outputs"]):
        yield f"{before}{quoted(key)}:"
        before = ","
        if key != "outputs":
            yield compact(content[key])
            continue
        yield "["
        for start in range(0, len(outputs), _LOT):
            yield f"{',' if start else ''}{','.join(map(_output, outputs[start : start + _LOT]))}"
        yield "]"
    yield "}"


def compact(value: Any) -> str:
    """Plain data as JSON, keys sorted, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


@lru_cache(maxsize=1024)  # layers repeat each other
def listed(shape: Shape) -> str:
    """A shape as JSON."""
    return f"[{','.join(map(str, shape))}]"


def _output(out: Output) -> str:
    """What ``Output.to_json`` says, as text."""
    rule, dtype, quant, tensors, kept, _, origin = out
    parts = [
        f'"{role}":["{file}",{start},"{code}",{listed(shape)}]'  # file names are plain ASCII
        for role, (_, code, shape, file, start, _) in (
            sorted(tensors.items()) if len(tensors) > 1 else tensors.items()
        )
    ]
    kept = f',"kept":{quoted(kept)}' if kept else ""
    origin = f',"origin":{quoted(origin)}' if origin else ""
    method, quantization = ("", "") if quant is None else _quantized(quant)
    expr = rule.expr
    made = expr.name if isinstance(expr, Source) else describe(expr)
    return (
        f'{{"dtype":"{dtype}","from":{quoted(made)}{kept},"kind":"{rule.kind}"'
        f'{method}{origin},"part":"{rule.part}"{quantization},"stored":{{{",".join(parts)}}},'
        f'"target":{quoted(rule.target)}}}'
    )


@lru_cache
def _quantized(spec: QuantSpec) -> tuple[str, str]:
    """What is said of a method, where it is no plain rounding, and of a format."""
    method = "" if spec.method in ("rtn", "mlx") else f',"method":"{spec.method}"'
    return method, f',"quantization":{compact(spec.to_config())}'

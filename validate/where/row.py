"""The report's row on where a runtime and the reference part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from arch_maps.facts import Facts
from arch_maps.ops import sources
from arch_maps.registry import ArchMap, find, map_name
from arch_maps.rules import Rule
from validate.checks import CaseResult, Check
from validate.loaded import file_names, written_tensors
from validate.metrics import relative_error
from validate.runtime import Steps
from validate.where.compare import FACTOR, Where, compare_traces
from validate.where.mlx_trace import trace_mlx
from validate.where.pairs import pair_modules
from validate.where.torch_trace import Reference

NAME: Final = "modules"
STEPS: Final = 3
"""Single-token steps that are traced behind a prompt."""
TOKENS: Final = 48
"""Tokens of a traced text: every value of every module is kept."""


@dataclass(frozen=True, slots=True)
class Traced:
    """A prompt that the reference was traced on, by the place of its question."""

    question: int
    prompt: int
    steps: int
    reference: Reference
    rows: int | None = None
    """Rows before those of the single tokens; None for the prompt's own.

    A decoder beside an encoder has one, the token that it starts with.
    """


def rules_of(folder: Path, config: Mapping[str, Any], arch: ArchMap | None) -> tuple[Rule, ...]:
    """The map's rules for the tensors in ``folder``, in the layout that has most of its names."""
    arch = arch or find(str(map_name(config)))
    if arch is None:
        return ()
    names = written_tensors(folder).keys()
    found = [tuple(arch.expand(Facts(dict(config)), layout).rules) for layout in arch.layouts]
    return max(found, key=lambda rules: _present(rules, names))


def _present(rules: Sequence[Rule], names: Any) -> int:
    return sum(leaf.name in names for rule in rules for leaf in sources(rule.expr))


def locate(
    model: Any, folder: Path, rules: Sequence[Rule], traced: Traced, run: Callable[[], Steps]
) -> Where:
    """Trace ``run`` of a loaded MLX model and hold it against the reference's trace."""
    from mlx.utils import tree_flatten

    parameters = dict(tree_flatten(model.parameters()))
    name_of = file_names(written_tensors(folder), parameters)
    loaded = {name_of(path): path for path in parameters}
    pairs = pair_modules(rules, traced.reference.held, loaded)
    most = traced.reference.trace.most
    with trace_mlx(model, [pair.mlx for pair in pairs], most=most) as trace:
        made = run()
    # The first row of the steps is the prompt's last.
    found = np.concatenate([made.prefill, made.steps[1:]])
    wanted = traced.reference.logits
    apart = relative_error(wanted, found) if wanted.shape == found.shape else float("inf")
    return compare_traces(
        pairs,
        traced.reference.trace,
        traced.reference.again,
        trace,
        prompt=traced.prompt if traced.rows is None else traced.rows,
        steps=traced.steps,
        outputs=apart,
        bearing=traced.reference.bearing,
    )


def where_check(where: Where, *, modality: str, runtime: str, case: str, noise: str) -> Check:
    """The row: how far the modules are apart, and the first that computes something else.

    It explains and is not gated: what counts is what the outputs say.
    """
    outs = [step for step in where.steps if step.side == "out"]
    if not outs:
        return Check(
            name=NAME,
            modality=modality,
            runtime=runtime,
            verdict="info",
            note="no module of the two sides could be paired",
        )
    worst = max(step.error / step.floor for step in where.steps)
    told = where.first.text() if where.first is not None else "no module parts from the reference"
    metrics: dict[str, float | int | str] = {"compared": len(where.steps), "noise": noise}
    if where.first is not None:
        metrics |= {"first": where.first.mlx, "error": where.first.error}
    series = {"error": [s.error for s in outs], "noise": [s.floor for s in outs]}
    if any(step.decode is not None for step in outs):
        series["single tokens"] = [s.error if s.decode is None else s.decode for s in outs]
    return Check(
        name=NAME,
        modality=modality,
        runtime=runtime,
        value=worst if where.first is not None else min(worst, FACTOR),
        threshold=FACTOR,
        verdict="info",
        note=f"{told}; errors in units of the reference's own noise ({noise})",
        metrics=metrics,
        cases=(CaseResult(case, worst, {}, series, [s.mlx for s in outs]),),
    )

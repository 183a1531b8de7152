"""``--mtp``: the further-token layers of a release as a drafter checkpoint of their own.

What a stock runtime takes for its drafter, and what it does to it, is followed on headers as for
``--map runtime``; so the drafter is planned, streamed, quantized and checked like any output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Drop, Layout, Mount
from converter.errors import PlanError
from converter.naming import DRAFTER
from converter.plan import Options, Plan, build_plan
from converter.plan.match import Match
from converter.runtime_map import check_reload, headers_of, rules_of
from converter.source import Source
from quant.recipe import CALIBRATED


def drafter_folder(target: Path) -> Path:
    """Where the drafter of the output ``target`` goes."""
    return target.with_name(target.name + DRAFTER)


def plan_drafter(
    source: Source,
    plan: Plan,
    *,
    draft: Plan | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan of the drafter beside ``plan``; PlanError where there is none to be had.

    ``draft`` is what ``plan`` was before formats were chosen for a size: the drafter of that is
    recorded as this one's draft, which is what can be known of it without weights.
    """
    if draft is not None:
        before = plan_drafter(source, draft, origin=origin)
        return replace(plan_drafter(source, plan, origin=origin), draft=before.hash)
    match = _drafter(source, plan)
    drafted = build_plan(source, match, _recipe(plan.options), origin=origin)
    check_reload(drafted, match.arch.runtimes)
    return drafted


def _drafter(source: Source, plan: Plan) -> Match:
    from validate.runtime import RuntimeRefusal
    from validate.trace import trace_drafter

    config = {k: v for k, v in plan.config.items() if not k.startswith("quantization")}
    try:
        try:
            traced, drafted = trace_drafter(config, headers_of(source))
        except RuntimeRefusal:  # Qwen3-Next's settings are read in the release's spelling alone
            traced, drafted = trace_drafter(source.config, headers_of(source))
    except RuntimeRefusal as refusal:
        raise PlanError([f"--mtp: {refusal}"]) from refusal
    problems = traced.problems()
    if problems:
        raise PlanError([f"--mtp: {problem}" for problem in problems])
    rules = rules_of(source, traced)
    text = (
        f"a drafter for {plan.model_type}, taken from the release by {traced.title}; mlx-vlm loads "
        "it with --draft-model beside the model"
    )

    def tensors(root: Mount, facts: Facts, layout: Layout) -> None:
        del facts, layout
        root.out.rules += rules

    def spelled(given: dict[str, Any], facts: Facts) -> dict[str, Any]:
        del given
        facts.note(text)
        return dict(drafted)

    layout = Layout("drafter", {})
    arch = ArchMap(
        model_type=str(drafted["model_type"]),
        tensors=tensors,
        config=spelled,
        layouts=(layout,),
        runtimes=("mlx-vlm",),
        parts=(traced.title,),
        origin={"by": "runtime", "runtime": traced.runtime, "version": traced.version}
        | {"drafter_of": plan.model_type},
    )
    left = f"the drafter of {traced.title} reads the model's own table in its place"
    drops = tuple(Drop(name, left, source.tensors[name].shape) for name in traced.unused)
    return Match(arch, layout, rules, drops, ())


def _recipe(options: Options) -> Options:
    """The model's recipe, without what only the reference's own layers can serve."""
    quant = options.quant
    if quant is not None and quant.method in CALIBRATED:
        quant = replace(quant, method="search")
    return Options(dtype=options.dtype, quant=quant)

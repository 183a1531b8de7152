"""The first stage: twin, then headers. What cannot be converted ends here, within seconds."""

from __future__ import annotations

from functools import partial
from typing import Any

from converter.batch.believed import believed
from converter.batch.failures import classify
from converter.batch.orders import Answer, Order, Part
from converter.batch.published import find_published
from converter.batch.recipes import digest
from converter.errors import GateError, PlanError, UsageError
from converter.execute.parts import most_parts
from converter.hub import HubSnapshot, download, resolve_revision
from converter.pipeline import Planned, Request, plan_request
from converter.plan import Plan
from converter.twin_proof import judge_twin
from converter.ui import memory_estimate

PROOF_BYTES_PER_PARAMETER = 8
"""The reference and the runtime hold the model in float32 each."""
_BASE_BYTES = 1_000_000_000
"""Interpreter and libraries of a proof."""


def examine(order: Order) -> Answer:
    """Judge the release's twin, plan every job, and find what is published already.

    Raises what speaks against the release as a whole.
    """
    snapshot = resolve_revision(order.repo, revision=order.commit)
    _require_access(snapshot, order)
    config = _config(snapshot, order)
    answer = Answer()
    if any(part.policy.twin for part in order.parts):
        _judge_twin(config, order, answer)
    plans = _plans(order, answer)
    weights = output = memory = parameters = 0
    for part, plan in plans:
        address = find_published(part.target, plan.hash, order.folder / "remote")
        facts: dict[str, Any] = {
            "plan": plan.hash,
            "model_type": plan.model_type,
            "output_bytes": plan.output_bytes,
            "bits_per_weight": round(plan.bits_per_weight, 4),
            "parameters": plan.parameters,
        }
        answer.facts[part.job] = facts
        if address is not None:
            answer.published[part.job] = address.url
            facts |= address.facts
            continue
        weights = sum(file.size for file in snapshot.files)
        output += plan.output_bytes
        parameters = max(parameters, plan.parameters)
        memory = max(memory, memory_estimate(plan, order.workers))
    answer.needs = {
        "disk": weights + output + 4 * parameters,  # a float32 reference of one output at a time
        "memory": max(memory, PROOF_BYTES_PER_PARAMETER * parameters + _BASE_BYTES),
        "convert": memory,
    }
    for facts in answer.facts.values():
        facts["needs"] = {name: answer.needs[name] for name in ("disk", "memory")}
    todo = [plan for part, plan in plans if part.job not in answer.published]
    if todo and not any(plan.options.calibration or plan.options.targeted for plan in todo):
        answer.cuts = most_parts(todo)
    return answer


def _require_access(snapshot: HubSnapshot, order: Order) -> None:
    """A gate that nothing of this release can pass is said before anything is fetched."""
    if snapshot.gated and not any(p.policy.private or p.policy.allow_gated for p in order.parts):
        raise GateError(
            f"{order.repo}: is gated; publishing conversions of it needs allow_gated (its licence "
            "permits that) or private = true"
        )


def _config(snapshot: HubSnapshot, order: Order) -> dict[str, Any]:
    """The release's config.json; PlanError where there is none or no map for its type."""
    from converter.plan.match import find_map
    from converter.source.strict_json import parse_object

    if "config.json" not in snapshot.by_path:
        raise PlanError([f"{order.repo}: has no config.json; it is not a transformers release"])
    folder = download(snapshot, ["config.json"], cache_dir=order.cache)
    config = parse_object((folder / "config.json").read_bytes(), "config.json")
    find_map(config)
    return dict(config)


def _judge_twin(config: dict[str, Any], order: Order, answer: Answer) -> None:
    """GateError when a tiny checkpoint of this config does not compute what torch computes."""
    key = digest(config)
    known = order.twins.get(key)
    if known is None:
        known = judge_twin(config, order.folder / "twin", workers=order.workers)
        answer.twin = (key, *known)
    verdict, text = known
    if verdict == "fail":
        raise GateError(f"a twin of {order.repo} does not compute what torch computes: {text}")


def _plans(order: Order, answer: Answer) -> list[tuple[Part, Plan]]:
    """Plans of all jobs; a job whose own recipe does not fit is put into ``answer.failed``."""
    try:
        planned = believed(order.repo, lambda: _plan(order, order.parts))
        return list(zip(order.parts, planned.plans, strict=True))
    except (PlanError, UsageError):
        if len(order.parts) == 1:
            raise
    plans = []
    for part in order.parts:
        try:
            planned = believed(order.repo, partial(_plan, order, (part,)))
            plans.append((part, planned.plans[0]))
        except (PlanError, UsageError) as error:
            answer.failed[part.job] = classify(error)
    return plans


def _plan(order: Order, parts: tuple[Part, ...]) -> Planned:
    return plan_request(
        Request(
            hf_path=order.repo,
            revision=order.commit,
            recipes=tuple(part.options for part in parts),
            cache=order.cache,
        )
    )

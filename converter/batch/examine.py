"""The first stage: twin, then headers. What cannot be converted ends here, within seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from converter.batch.believed import believed
from converter.batch.failures import classify
from converter.batch.needs import needs_of, output_bytes, proof_bytes
from converter.batch.orders import Answer, Order, Part, together
from converter.batch.published import published_of
from converter.batch.recipes import digest
from converter.errors import GateError, PlanError, UsageError
from converter.execute.parts import most_parts
from converter.hub import HubSnapshot, download, resolve_revision
from converter.pipeline import Planned, Request, plan_request
from converter.plan import Plan
from converter.release import Release, open_release
from converter.twin_proof import judge_twin


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
    reading = _plans(order, answer)
    todo: list[Plan] = []
    for part, plan, drafter in reading.plans:
        facts: dict[str, Any] = {
            "model_type": plan.model_type,
            "output_bytes": output_bytes(plan),
            "bits_per_weight": round(8 * output_bytes(plan) / max(1, plan.parameters), 4),
            "parameters": plan.parameters,
        }
        answer.facts[part.job] = facts
        part = replace(part, plan=plan.hash, drafter_plan=drafter.hash if drafter else None)
        if not plan.options.targeted:  # else this is a draft, and its output's plan another
            facts |= {"plan": plan.hash, "bits_per_weight": round(plan.bits_per_weight, 4)}
            facts |= {"drafter_plan": drafter.hash} if drafter else {}
        there = published_of(order, part)
        output = there[part.target]
        if output is None or None in there.values():
            todo += [plan] if drafter is None else [plan, drafter]
        else:
            answer.published[part.job] = output.url
            facts |= output.facts
    answer.needs = needs_of(
        todo,
        proof=reading.proof,
        source_bytes=sum(file.size for file in snapshot.files),
        fused=any(part.asked.adapter is not None for part in order.parts),
        workers=order.workers,
    )
    for facts in answer.facts.values():
        facts["needs"] = answer.needs
    whole = any(part.asked.mtp for part in order.parts)
    whole |= any(plan.options.calibration or plan.options.targeted for plan in todo)
    if todo and not whole:
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


@dataclass(slots=True)
class _Reading:
    """What one reading of the headers comes to."""

    plans: list[tuple[Part, Plan, Plan | None]] = field(default_factory=list)
    """With that of the drafter, where one is asked for."""
    refused: dict[int, PlanError | UsageError] = field(default_factory=dict)
    """By job."""
    proof: int = 0
    """Bytes of memory that a proof needs."""

    def add(self, parts: Sequence[Part], planned: Planned) -> None:
        """Take the plans of some jobs over."""
        drafters = planned.drafters or (None,) * len(parts)
        self.plans += zip(parts, planned.plans, drafters, strict=True)
        self.proof = max(self.proof, proof_bytes(planned.source))


class _RefusedError(PlanError):
    """Some jobs are refused by a reading of the headers, which is still to be believed."""

    def __init__(self, reading: _Reading) -> None:
        super().__init__(f"{job}: {error}" for job, error in sorted(reading.refused.items()))
        self.reading = reading


def _plans(order: Order, answer: Answer) -> _Reading:
    """Plans of all jobs; one that does not fit is put into ``answer.failed``."""
    try:
        return believed(order.repo, partial(_read, order))
    except _RefusedError as error:
        refused = error.reading.refused
        answer.failed |= {job: classify(why) for job, why in refused.items()}
        return error.reading


def _read(order: Order) -> _Reading:
    """All jobs planned from one reading of the headers; _RefusedError where some do not fit."""
    release = open_release(order.repo, revision=order.commit, cache=order.cache)
    reading = _Reading()
    for group in together(order.parts):
        try:
            reading.add(group, _planned(order, group, release))
        except (PlanError, UsageError):
            if len(order.parts) == 1:
                raise
            for part in group:
                try:
                    reading.add((part,), _planned(order, (part,), release))
                except (PlanError, UsageError) as error:
                    reading.refused[part.job] = error
    if reading.refused:
        raise _RefusedError(reading)
    return reading


def _planned(order: Order, parts: tuple[Part, ...], release: Release) -> Planned:
    request = Request(
        hf_path=order.repo,
        revision=order.commit,
        recipes=tuple(part.asked.options for part in parts),
        adapter_path=parts[0].asked.checked_adapter(),
        mtp=parts[0].asked.mtp,
    )
    return plan_request(request, release=release, measure=False)

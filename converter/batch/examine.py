"""The first stage: twin, then headers. What cannot be converted ends here, within seconds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from converter.batch.believed import believed
from converter.batch.failures import classify
from converter.batch.needs import needs_of
from converter.batch.orders import Answer, Order, Part
from converter.batch.published import find_published
from converter.batch.recipes import digest
from converter.errors import GateError, PlanError, UsageError
from converter.execute.parts import most_parts
from converter.hub import HubSnapshot, download, resolve_revision
from converter.pipeline import Request, plan_request
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
    plans, shapes = _plans(order, answer)
    todo: list[Plan] = []
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
        if address is None:
            todo.append(plan)
        else:
            answer.published[part.job] = address.url
            facts |= address.facts
    answer.needs = needs_of(
        todo,
        shapes,
        source_bytes=sum(file.size for file in snapshot.files),
        workers=order.workers,
    )
    for facts in answer.facts.values():
        facts["needs"] = answer.needs
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


@dataclass(frozen=True, slots=True)
class _Reading:
    """What one reading of the headers comes to: plans, refusals by job, the tensors' shapes."""

    plans: list[tuple[Part, Plan]]
    refused: dict[int, PlanError | UsageError]
    shapes: dict[str, tuple[int, ...]]


class _RefusedError(PlanError):
    """Some jobs are refused by a reading of the headers, which is still to be believed."""

    def __init__(self, reading: _Reading) -> None:
        super().__init__(f"{job}: {error}" for job, error in sorted(reading.refused.items()))
        self.reading = reading


def _plans(
    order: Order, answer: Answer
) -> tuple[list[tuple[Part, Plan]], dict[str, tuple[int, ...]]]:
    """Plans of all jobs, and the shapes of the plain release's tensors.

    A job that does not fit is put into ``answer.failed``.
    """
    try:
        reading = believed(order.repo, partial(_read, order))
    except _RefusedError as error:
        reading = error.reading
        answer.failed |= {job: classify(why) for job, why in reading.refused.items()}
    return reading.plans, reading.shapes


def _read(order: Order) -> _Reading:
    """All jobs planned from one reading of the headers; _RefusedError where some do not fit."""
    release = open_release(order.repo, revision=order.commit, cache=order.cache)
    try:
        return _planned(order, order.parts, release)
    except (PlanError, UsageError):
        if len(order.parts) == 1:
            raise
    plans: list[tuple[Part, Plan]] = []
    refused: dict[int, PlanError | UsageError] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for part in order.parts:
        try:
            one = _planned(order, (part,), release)
        except (PlanError, UsageError) as error:
            refused[part.job] = error
        else:
            plans += one.plans
            shapes = one.shapes
    whole = _Reading(plans, refused, shapes)
    if refused:
        raise _RefusedError(whole)
    return whole


def _planned(order: Order, parts: tuple[Part, ...], release: Release) -> _Reading:
    recipes = tuple(part.options for part in parts)
    request = Request(hf_path=order.repo, revision=order.commit, recipes=recipes)
    planned = plan_request(request, release=release)
    shapes = {name: info.shape for name, info in planned.source.tensors.items()}
    return _Reading(list(zip(parts, planned.plans, strict=True)), {}, shapes)

"""How far a claimed release has come: which stage each of its jobs needs next."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from converter.batch.claims import Claim, Task
from converter.batch.orders import Answer, Order, Part
from converter.batch.recipes import Asked, Policy

NEXT = {
    "examine": "fetch",
    "fetch": "convert",
    "convert": "prove",
    "prove": "publish",
    "accept": "publish",
}
"""The stage after a stage; the last ones have none. Who asks for it, has ``accept`` between."""
_ALONE = ("accept", "prove")
_TOGETHER = ("examine", "fetch", "convert")
"""Stages that all jobs of a release go through as one."""


@dataclass(frozen=True, slots=True)
class Step:
    """A stage that may begin, for some jobs."""

    stage: str
    parts: tuple[Part, ...]


def parts_of(tasks: Sequence[Task]) -> tuple[Part, ...]:
    """Jobs as parts of an order."""
    return tuple(
        Part(
            job=task.id,
            variant=task.variant,
            target=task.target,
            asked=Asked.from_json(task.recipe),
            policy=Policy(**task.policy),
            plan=task.facts.get("plan"),
            drafter_plan=task.facts.get("drafter_plan"),
        )
        for task in tasks
    )


class InHand:
    """A claimed release on its way through the stages; nothing here outlives the process."""

    def __init__(self, claim: Claim, order: Order) -> None:
        self.claim = claim
        self.order = order
        self.needs: dict[str, int] = {}
        self.cuts = 1
        self.cut = False
        """Whether the conversion has been offered in pieces."""
        self._parts = {part.job: part for part in order.parts}
        self._next = {task.id: "card" if task.kind == "card" else "examine" for task in claim.tasks}
        self._busy: set[int] = set()

    @property
    def name(self) -> str:
        """The release as log lines name it."""
        return f"{self.claim.repo}@{self.claim.commit[:8]}"

    def ready(self) -> Iterator[Step]:
        """The steps that may begin now, the furthest first."""
        for stage in ("publish", "card"):
            for job in self._waiting(stage):
                yield Step(stage, (self._parts[job],))
        if not any(self._next[job] in _ALONE for job in self._busy):
            alone = [(stage, job) for stage in _ALONE for job in self._waiting(stage)]
            for stage, job in alone[:1]:  # one reference at a time was counted
                yield Step(stage, (self._parts[job],))
        for stage in _TOGETHER:
            if jobs := self._waiting(stage):
                yield Step(stage, tuple(self._parts[job] for job in jobs))

    def _waiting(self, stage: str) -> list[int]:
        return [job for job, due in self._next.items() if due == stage and job not in self._busy]

    def busy(self, step: Step) -> None:
        """The step's stage has begun."""
        self._busy |= {part.job for part in step.parts}

    def settled(self, step: Step, answer: Answer) -> None:
        """The step's stage has ended: its jobs move on, or leave."""
        if answer.needs:
            self.needs, self.cuts = answer.needs, answer.cuts
        for part in step.parts:
            self._busy.discard(part.job)
            if part.job in {**answer.failed, **answer.published} or step.stage not in NEXT:
                del self._next[part.job]
            else:
                asked = step.stage == "prove" and part.policy.accept is not None
                self._next[part.job] = "accept" if asked else NEXT[step.stage]
                facts = answer.facts.get(part.job, {})
                plan = facts.get("plan", part.plan)
                drafter = facts.get("drafter_plan", part.drafter_plan)
                self._parts[part.job] = replace(part, plan=plan, drafter_plan=drafter)

    def elsewhere(self, tags: Collection[str]) -> list[Part]:
        """Parts whose outputs are to be accepted by a worker with another tag than these."""
        return [
            part
            for job, part in self._parts.items()
            if self._next.get(job, "card") != "card" and part.policy.accept not in (None, *tags)
        ]

    def leave(self, part: Part) -> None:
        """Another worker does the rest of this job, from what the folder holds."""
        del self._next[part.job]

    def done(self) -> bool:
        """Whether every job has left."""
        return not self._next

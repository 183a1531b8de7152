"""The local engine: releases claimed from the ledger, their stages run in child processes.

One thread looks at everything: what children say, which stage of which release is next, and
whether the machine has room for it. Downloads, conversions and uploads have slots of their own,
so that they overlap; what the engine knows beyond the ledger may be lost at any moment.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Final

from converter.batch import budget
from converter.batch.budget import bytes_in
from converter.batch.child import WARM, Child, context, start
from converter.batch.claims import Claim, LeaseLostError, Used
from converter.batch.failures import Failure
from converter.batch.ledger import Ledger
from converter.batch.needs import CONVERT, DISK, MEMORY
from converter.batch.orders import Answer, Order, Part
from converter.batch.pieces import pieces_of
from converter.batch.piecework import STAGE as PIECE_STAGE
from converter.batch.piecework import PieceWork
from converter.batch.progress import InHand, Step, parts_of
from converter.batch.sweep import folder_name, is_wanted
from converter.batch.watchlist import Budgets

TICK_S: Final = 0.2
GRACE_S: Final = 60.0
_SLOT: Final = dict.fromkeys(("examine", "convert", "prove", "accept"), "jobs") | {
    "fetch": "downloads",
    "publish": "uploads",
    "card": "uploads",
}
_FIRST: Final = ("publish", "card", "examine", "fetch", "accept", "prove", "convert")
"""Which stage gets a free slot: what ends a job, then what keeps the network busy."""
_FINISHING: Final = ("publish", "card")
_LARGE: Final = ("convert", "prove", "accept")
"""Stages whose memory is counted."""
Stages = Mapping[str, Callable[[Order], Answer]]


@dataclass(slots=True)
class Outcome:
    """What an engine's run came to."""

    published: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    """Jobs that were given up, for now or for good, with state, class and reason."""
    stages: Counter[str] = field(default_factory=Counter)
    stopped: bool = False


class Engine:
    """Works through a ledger on this machine until nothing is due."""

    def __init__(
        self,
        ledger: Ledger,
        folder: Path,
        *,
        budgets: Budgets,
        workers: int,
        stages: Stages,
        say: Callable[[str], None],
        preload: Sequence[str] = WARM,
        shared: bool = False,
        split: int | None = None,
    ) -> None:
        """``folder`` holds the work; ``stages`` is what the children do; ``say`` takes lines.

        ``preload`` names the modules that children find loaded. ``shared`` says that other
        workers have the same ``folder``; releases of ``split`` bytes are converted with them.
        """
        self.ledger = ledger
        self.folder = folder
        self.budgets = budgets
        self.workers = workers
        self.stages = stages
        self.say = say
        self.outcome = Outcome()
        self.stopping = 0
        self._hands: dict[int, InHand] = {}
        self._children: list[tuple[Child, InHand, Step]] = []
        self._context = context(preload)
        self.shared = shared
        self.split = split
        self._disk = budget.disk(folder, budgets.disk)
        self._memory = budget.memory(budgets.memory)
        self._piecework = PieceWork(
            ledger,
            self._folder_of,
            work=stages[PIECE_STAGE],
            context=self._context,
            workers=workers,
            memory=self._memory,
            say=say,
        )
        self._twins = ledger.twins()
        self._beat = time.monotonic()
        self._stopped_at = 0.0

    def stop(self) -> None:
        """Begin nothing more; uploads may end, the rest is given back. Twice: give all back."""
        self.stopping += 1

    def run(self) -> Outcome:
        """Work until nothing is due within the ledger's patience, or until stopped."""
        try:
            while self._turn():
                pass
        finally:
            for child, _, _ in self._children:
                child.kill()
            self._piecework.give_back()
            for hand in list(self._hands.values()):
                self._drop(hand)
        self.outcome.stopped = bool(self.stopping)
        return self.outcome

    def _turn(self) -> bool:
        self._listen()
        self._keep_leases()
        if self.stopping:
            return self._wind_down()
        self._claim()
        self._begin()
        if self._children or self._piecework.running or self._hands:
            self._sleep(TICK_S)
            return True
        return self._rest()

    def _rest(self) -> bool:
        """Nothing is in hand: wait for what will be due soon, or end."""
        due = self.ledger.next_due()
        if due is None or due > self.ledger.retries.patience:
            return False
        self._sleep(min(due, 1.0))
        return True

    def _wind_down(self) -> bool:
        self._stopped_at = self._stopped_at or time.monotonic()
        self._piecework.give_back()
        late = self.stopping > 1 or time.monotonic() - self._stopped_at > GRACE_S
        for child, hand, _ in list(self._children):
            if late or child.stage not in _FINISHING:
                self.say(f"{hand.name}: {child.stage} is given back")
                child.kill()
        self._children = [c for c in self._children if not late and c[0].stage in _FINISHING]
        self._sleep(TICK_S if self._children else 0.0)
        return bool(self._children)

    def _sleep(self, seconds: float) -> None:
        watched = [c.process.sentinel for c, _, _ in self._children]
        watched += [c.process.sentinel for c, _ in self._piecework.running]
        if watched:
            wait(watched, timeout=seconds)
        elif seconds:
            time.sleep(seconds)

    def _keep_leases(self) -> None:
        if time.monotonic() - self._beat < self.ledger.retries.lease / 4:
            return
        self._beat = time.monotonic()
        self._piecework.keep()
        if self._hands:
            for lost in self.ledger.heartbeat([hand.claim for hand in self._hands.values()]):
                self._abandon(self._hands[lost])

    def _abandon(self, hand: InHand) -> None:
        """Another worker has the release: stop working on it and write nothing more."""
        self.say(f"{hand.name}: the lease has passed to another worker")
        for child, owner, _ in self._children:
            if owner is hand:
                child.kill()
        self._children = [entry for entry in self._children if entry[1] is not hand]
        self._forget(hand)

    def _claim(self) -> None:
        while len(self._hands) < self.limit:
            claim = self.ledger.claim(self._hands)
            if claim is None:
                break
            self._take(claim)

    def _help(self) -> None:
        """Look for a piece of another worker's release, where a slot is left for it."""
        if self.shared and self._slot_free(PIECE_STAGE):
            self._piecework.look(None)

    @property
    def limit(self) -> int:
        """How many releases may be in hand at once."""
        return self.budgets.jobs + self.budgets.downloads + self.budgets.uploads

    def _take(self, claim: Claim) -> None:
        hand = InHand(claim, self._order(claim))
        self._hands[claim.release] = hand
        self.say(f"{hand.name}: {len(claim.tasks)} variants are due")
        if not self.shared:  # nothing that is made here could be carried to another worker
            self._hand_over(hand, hand.elsewhere(self.ledger.tags))

    def _hand_over(self, hand: InHand, parts: Sequence[Part]) -> None:
        """Leave jobs to a worker with the tag that their acceptance needs."""
        try:
            for part in parts:
                tag = str(part.policy.accept)
                text = self.ledger.hand_over(hand.claim, part.job, tag)
                hand.leave(part)
                self._note(hand, part.target, "waiting", Failure("worker", text))
        except LeaseLostError:
            self._abandon(hand)

    def _folder_of(self, repo: str, commit: str) -> Path:
        return self.folder / folder_name(repo, commit)

    def _order(self, claim: Claim) -> Order:
        return Order(
            repo=claim.repo,
            commit=claim.commit,
            folder=self._folder_of(claim.repo, claim.commit),
            parts=parts_of(claim.tasks),
            workers=self.workers,
            bandwidth=None
            if self.budgets.bandwidth is None
            else self.budgets.bandwidth / self.budgets.downloads,
        )

    def _begin(self) -> None:
        ready = [(hand, step) for hand in self._hands.values() for step in hand.ready()]
        for hand, step in sorted(ready, key=lambda pair: _FIRST.index(pair[1].stage)):
            held = hand.claim.release in self._hands
            able = step.stage != "accept" or step.parts[0].policy.accept in self.ledger.tags
            if held and not able:
                self._hand_over(hand, step.parts)
            elif held and step.stage == "convert" and self._with_others(hand, step):
                continue
            elif held and self._slot_free(step.stage) and self._room(hand, step):
                self._start(hand, step)
        self._help()
        self._piecework.begin(partial(self._slot_free, PIECE_STAGE))
        for hand in [hand for hand in self._hands.values() if hand.done()]:
            self._drop(hand)

    def _slot_free(self, stage: str) -> bool:
        slot = _SLOT[stage]
        used = sum(_SLOT[child.stage] == slot for child, _, _ in self._children)
        used += len(self._piecework.running) if slot == _SLOT[PIECE_STAGE] else 0
        return used < int(getattr(self.budgets, slot))

    def _with_others(self, hand: InHand, step: Step) -> bool:
        """Whether a conversion is in pieces, with some left that a worker has or will take.

        When none is left, the same stage finds everything made, and finishes the outputs.
        """
        if self.split is None or hand.claim.weight_bytes < self.split or hand.cuts < 2:
            return False
        try:
            if not hand.cut:
                jobs = [part.job for part in step.parts]
                count = pieces_of(hand.claim.weight_bytes, hand.cuts)
                memory = hand.needs.get(CONVERT, 0)
                self._piecework.pieces.cut(hand.claim, jobs, count, memory=memory)
                hand.cut = True
                self.say(f"{hand.name}: convert in {count} pieces")
            return bool(self._piecework.pieces.left(hand.claim))
        except LeaseLostError:
            self._abandon(hand)
            return True

    def _room(self, hand: InHand, step: Step) -> bool:
        """Whether disk and memory can be set aside; what could never be is a failure."""
        key: object
        if step.stage == "fetch":
            resource, need = self._disk, hand.needs.get(DISK, 0)
            key, there = hand.claim.release, bytes_in(hand.order.folder)
            if (why := self._memory.refusal(hand.needs.get(MEMORY, 0))) is not None:
                return self._refuse(hand, step, why)  # before anything is downloaded
        elif step.stage in _LARGE:
            named = CONVERT if step.stage == "convert" else MEMORY
            resource, need = self._memory, hand.needs.get(named, 0)
            key, there = _key(hand, step), 0
        else:
            return True
        if resource.reserve(key, need, there=there):
            return True
        why = resource.refusal(need, there=there)
        return self._refuse(hand, step, why) if why else False

    def _refuse(self, hand: InHand, step: Step, why: str) -> bool:
        failure = Failure("resources", f"{hand.claim.repo}: {why}")
        self._settle(hand, step, Used(started=time.time(), ended=time.time()), failure)
        return False

    def _start(self, hand: InHand, step: Step) -> None:
        try:
            self.ledger.entered(hand.claim, [part.job for part in step.parts], step.stage)
        except LeaseLostError:
            self._abandon(hand)
            return
        hand.order.folder.mkdir(parents=True, exist_ok=True)
        order = replace(hand.order, parts=step.parts, twins=self._twins)
        self.outcome.stages[step.stage] += 1
        self.say(f"{hand.name}: {step.stage} {' '.join(part.variant for part in step.parts)}")
        child = start(step.stage, order, self.stages[step.stage], self._context)
        self._children.append((child, hand, step))
        hand.busy(step)

    def _listen(self) -> None:
        self._piecework.listen()
        for entry in list(self._children):
            if entry not in self._children:  # its release was abandoned a moment ago
                continue
            child, hand, step = entry
            ended = child.ended(partial(self._quote, hand.name))
            if ended is None:
                continue
            self._children.remove(entry)
            if step.stage in _LARGE:
                self._memory.free(_key(hand, step))
            size = ended.bytes if isinstance(ended, Answer) else None
            used = Used(
                started=child.started, ended=time.time(), peak_memory=child.peak_memory, bytes=size
            )
            self._settle(hand, step, used, ended)

    def _quote(self, name: str, line: str) -> None:
        self.say(f"{name} | {line}")

    def _settle(self, hand: InHand, step: Step, used: Used, ended: Answer | Failure) -> None:
        """Write what a stage came to, and move its jobs on."""
        if isinstance(ended, Failure):
            ended = Answer(failed={part.job: ended for part in step.parts})
        try:
            if ended.twin is not None:
                self.ledger.judged_twin(*ended.twin)
                self._twins[ended.twin[0]] = ended.twin[1:]
            for part in step.parts:
                facts = ended.facts.get(part.job)
                failure = ended.failed.get(part.job)
                if failure is not None:
                    state = self.ledger.failed(
                        hand.claim, part.job, step.stage, used, failure, facts=facts
                    )
                    self._note(hand, part.target, state, failure)
                    continue
                url = ended.published.get(part.job)
                self.ledger.passed(
                    hand.claim,
                    part.job,
                    step.stage,
                    used,
                    facts=(facts or {}) | ({} if url is None else {"address": url}),
                    published=url is not None,
                )
                if url is not None:
                    told = {"target": part.target, "repo": hand.claim.repo, "address": url}
                    self.outcome.published.append(told | {"stage": step.stage})
                    self.say(f"{hand.name}: published {url}")
        except LeaseLostError:
            self._abandon(hand)
            return
        hand.settled(step, ended)
        if hand.cut and step.stage == "convert" and not ended.failed:
            self._clear_pieces(hand)

    def _note(self, hand: InHand, target: str, state: str, failure: Failure) -> None:
        told = {"target": target, "repo": hand.claim.repo, "commit": hand.claim.commit}
        told |= {"state": state, "class": failure.kind, "reason": failure.text}
        self.outcome.failed.append(told)
        self.say(f"{hand.name}: {target} is {state} ({failure.kind}): {failure.text}")

    def _drop(self, hand: InHand) -> None:
        """Give a release back; folder and pieces stay for jobs that will be tried again."""
        if hand.done():
            with contextlib.suppress(LeaseLostError):
                pieces = self._piecework.pieces
                # Where one is at work the next sweep finds the folder; its worker stops soon.
                if not is_wanted(self.ledger, hand.claim) and not pieces.clear(hand.claim):
                    shutil.rmtree(hand.order.folder, ignore_errors=True)
        self.ledger.give_back(hand.claim)
        self._forget(hand)

    def _clear_pieces(self, hand: InHand) -> None:
        """The outputs are whole, and so are their pieces."""
        with contextlib.suppress(LeaseLostError):
            self._piecework.pieces.clear(hand.claim)
        hand.cut = False

    def _forget(self, hand: InHand) -> None:
        self._hands.pop(hand.claim.release, None)
        self._disk.free(hand.claim.release)
        for stage in _LARGE:
            for part in hand.order.parts:
                self._memory.free(_key(hand, Step(stage, (part,))))


def _key(hand: InHand, step: Step) -> tuple[str, int, int]:
    """What a stage's memory is set aside under: the end of one frees nobody else's."""
    return step.stage, hand.claim.release, step.parts[0].job

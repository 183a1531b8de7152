"""The fleet engine: Dask's scheduler hands what is due to workers, who claim it in the ledger.

Tasks name a release or a piece by its number, and nothing else: no path, no recipe, no secret.
What became of it is read from the ledger, so a scheduler, a worker or this process may be lost at
any moment; what is still due is handed out again.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any, Final

from converter.batch.catalogue import Catalogue
from converter.batch.claims import Due, Used
from converter.batch.dask import Scheduler, asked, distributed, fits, is_ours, tags_of
from converter.batch.engine import Outcome
from converter.batch.failures import Failure
from converter.batch.fleet_worker import PIECE, RELEASE, work_on
from converter.batch.ledger import Ledger
from converter.batch.needs import DISK, MEMORY, guessed
from converter.batch.pieces import Pieces
from converter.errors import ConvertError
from converter.ui import size_text

TURN_S: Final = 0.5
CONNECT_S: Final = 5.0
ANSWER_S: Final = 5.0
UNFIT_S: Final = 30.0
"""How long a worker that is large enough may be away, as all are when the scheduler restarts."""
_LONGEST_REST_S: Final = 60.0
_PIECE_REST_S: Final = 2.0
"""A worker that has no slot for a piece will soon have one."""
Key = tuple[str, int]
Workers = Mapping[str, Mapping[str, float]]
"""The resources of workers, by address."""


@dataclass(slots=True)
class _Rest:
    """When something that a worker could not claim is handed out again."""

    until: float
    wait: float


@dataclass(frozen=True, slots=True)
class _Given:
    """A task that was handed out, and the resources that it asks for."""

    future: Any
    wanted: Mapping[str, float]


class Fleet:
    """Hands out a ledger's work until nothing is due."""

    def __init__(
        self,
        ledger: Ledger,
        scheduler: Scheduler,
        *,
        shared: bool,
        say: Callable[[str], None],
    ) -> None:
        """``shared`` says that an output can be carried on by another worker."""
        self.ledger = ledger
        self.catalogue = Catalogue(ledger)
        self.pieces = Pieces(ledger)
        self.scheduler = scheduler
        self.shared = shared
        self.say = say
        self.stopping = 0
        self._client: Any = None
        self._lost_at = time.monotonic()
        self._given: dict[Key, _Given] = {}
        self._rests: dict[Key, _Rest] = {}
        self._unfit: dict[int, float] = {}
        """Since when no worker has been large enough for a release."""
        self._jobs: set[int] = set()
        self._tags: dict[str, float] = {}
        """When a worker with a tag was last there."""
        self._silent = False
        self._manned_at = time.monotonic()
        self._strangers = 0

    def stop(self) -> None:
        """Hand out nothing more; workers finish what they have."""
        self.stopping += 1

    def run(self) -> Outcome:
        """Hand out until nothing is due within the ledger's patience, or until stopped."""
        try:
            while self._turn():
                time.sleep(TURN_S)
        finally:
            self._disconnect()
        return self._outcome()

    def _turn(self) -> bool:
        if self.stopping:
            return False
        if not self._connected():
            return True
        workers = self._workers()
        if workers:
            self._manned_at = time.monotonic()
        self._collect(workers)
        self._know_tags(workers)
        self._hand_out(workers)
        if self._given:
            return True
        due = self.ledger.next_due()
        if due is None or due > self.ledger.retries.patience:
            return self._others_at_work()
        self._require_workers()
        return True

    def _know_tags(self, workers: Workers) -> None:
        """What waits for a tag is due while a worker has it, or may soon be back with it."""
        now = time.monotonic()
        self._tags |= dict.fromkeys((t for one in workers.values() for t in tags_of(one)), now)
        self._tags = {tag: seen for tag, seen in self._tags.items() if now - seen <= UNFIT_S}
        self.ledger.tags = frozenset(self._tags)

    def _require_workers(self) -> None:
        """ConvertError when for as long as a retry is waited for nobody has been there to work."""
        away = time.monotonic() - self._manned_at > self.ledger.retries.patience
        if away and not self._others_at_work():
            raise ConvertError(
                f"{self.scheduler.address}: has had no worker; start one with `convert batch "
                "worker`. What is due is left to the next run"
            )

    def _connected(self) -> bool:
        """Whether there is a scheduler; one that is away is waited for as long as a retry is."""
        if self._client is not None and self._client.status == "running":
            return True
        self._disconnect()
        try:
            self._client = distributed().Client(
                self.scheduler.address,
                security=self.scheduler.security(),
                timeout=CONNECT_S,
                set_as_default=False,
            )
        except (OSError, TimeoutError) as error:
            if time.monotonic() - self._lost_at > self.ledger.retries.patience:
                raise ConvertError(
                    f"{self.scheduler.address}: no scheduler answers; start one with "
                    "`dask scheduler`"
                ) from error
            if not self._silent:
                self.say(f"{self.scheduler.address}: the scheduler is away")
            self._silent = True
            return False
        self._silent = False
        self.say(f"{self.scheduler.address}: {len(self._workers())} workers")
        return True

    def _disconnect(self) -> None:
        if self._client is not None:
            self._lost_at = time.monotonic()
            for given in self._given.values():
                given.future.release()
            self._client.close(timeout=5)
        self._client = None
        self._given.clear()

    def _workers(self) -> dict[str, dict[str, float]]:
        """The resources of every worker of ours that the scheduler knows, by address."""
        known = self._client.scheduler_info(n_workers=-1)["workers"]
        every = {address: dict(one.get("resources") or {}) for address, one in known.items()}
        ours = {address: one for address, one in every.items() if is_ours(one)}
        if len(every) - len(ours) > self._strangers:
            count = len(every) - len(ours)
            self.say(
                f"{self.scheduler.address}: {count} workers are not of `convert batch worker` and "
                "are handed nothing"
            )
        self._strangers = len(every) - len(ours)
        return ours

    def _collect(self, workers: Workers) -> None:
        """Let go of what has ended, however it did: the ledger knows what it came to.

        So is what waits for a worker that has left, and is judged anew.
        """
        for key, given in list(self._given.items()):
            if given.future.status == "pending":
                if not _taken_by_one(given.wanted, workers):
                    del self._given[key]
                    given.future.release()
                continue
            del self._given[key]
            if _was_free(given.future):
                self._rests.pop(key, None)
            else:  # somebody else has it, or the worker was lost while its lease goes on
                most = _LONGEST_REST_S if key[0] == RELEASE else _PIECE_REST_S
                wait = min(2 * self._rests[key].wait, most) if key in self._rests else 1
                self._rests[key] = _Rest(time.monotonic() + wait, wait)
            given.future.release()

    def _hand_out(self, workers: Workers) -> None:
        if not workers:
            return
        unfit, now = {}, time.monotonic()
        there = {None, *(tag for one in workers.values() for tag in tags_of(one))}
        for due in self.ledger.due():
            self._jobs |= {task.id for task in due.tasks}
            if self._resting((RELEASE, due.release)):
                continue
            if there.isdisjoint(task.needs for task in due.tasks):
                continue  # who could do any of it is away
            wanted, planned = self._wanted(due, workers)
            if not _taken_by_one(wanted, workers):
                if planned:
                    unfit[due.release] = since = self._unfit.get(due.release, now)
                    if now - since >= UNFIT_S:
                        self._refuse(due, wanted, workers)
                    continue
                wanted |= {MEMORY: 0.0, DISK: 0.0}  # somebody has to plan it, to know
            self._submit((RELEASE, due.release), due.repo, due.commit, wanted)
        self._unfit = unfit
        for one in self.pieces.open():
            wanted = asked(memory=one.memory, disk=0, tag=None)
            if not self._resting((PIECE, one.id)) and _taken_by_one(wanted, workers):
                self._submit((PIECE, one.id), one.repo, one.commit, wanted)

    def _resting(self, key: Key) -> bool:
        rest = self._rests.get(key)
        return key in self._given or (rest is not None and time.monotonic() < rest.until)

    def _wanted(self, due: Due, workers: Workers) -> tuple[dict[str, float], bool]:
        """Memory, disk and tag that a release needs, and whether that is known from its plans."""
        tasks = [task for task in due.tasks if task.kind != "card"]  # a card needs nothing
        planned = [task.facts["needs"] for task in tasks if "needs" in task.facts]
        if planned:
            needs = {name: max(int(one[name]) for one in planned) for name in (MEMORY, DISK)}
        else:
            needs = guessed(due.weight_bytes, len(tasks)) if tasks else {MEMORY: 0, DISK: 0}
        tags = {task.needs for task in tasks} - {None}
        if not self.shared:
            tags |= {task.policy.get("accept") for task in tasks} - {None}
        there = {tag for one in workers.values() for tag in tags_of(one)}
        tag = min((str(tag) for tag in tags if tag in there), default=None)
        return asked(memory=needs[MEMORY], disk=needs[DISK], tag=tag), bool(planned)

    def _submit(self, key: Key, repo: str, commit: str, wanted: dict[str, float]) -> None:
        kind, number = key
        future = self._client.submit(
            work_on,
            kind,
            number,
            repo,
            commit,
            key=f"{kind}-{number}-{uuid.uuid4().hex[:8]}",
            pure=False,
            resources=wanted,
        )
        self._given[key] = _Given(future, wanted)

    def _refuse(self, due: Due, wanted: Mapping[str, float], workers: Workers) -> None:
        """Say in the ledger that no worker is large enough; cards, and what has no plan, go on."""
        claim = self.ledger.claim(only=due.release)
        if claim is None:
            return
        tags = wanted.keys() - {MEMORY, DISK}
        able = [one for one in workers.values() if tags <= one.keys()]
        most = {name: max(one[name] for one in able) for name in (MEMORY, DISK)}
        lacks = [
            f"{size_text(int(wanted[name]))} of {name} where the largest worker has "
            f"{size_text(int(most[name]))}"
            for name in most
            if wanted[name] > most[name]
        ]
        both = " and ".join(f"{size_text(int(wanted[name]))} of {name}" for name in most)
        needs = " and ".join(lacks) or f"{both} on one worker"
        failure = Failure("resources", f"{claim.repo}: needs {needs}")
        used = Used(started=time.time(), ended=time.time())
        for task in claim.tasks:
            if task.kind != "card" and "needs" in task.facts:
                self.ledger.failed(claim, task.id, "fetch", used, failure)
        self.ledger.give_back(claim)
        self.say(failure.text)

    def _others_at_work(self) -> bool:
        """Whether a worker has something of this run in hand that no task stands for any more."""
        return any(e.running for e in self.catalogue.entries() if e.job.id in self._jobs)

    def _outcome(self) -> Outcome:
        """What became of everything that was handed out, by the ledger."""
        outcome = Outcome(stopped=bool(self.stopping))
        for entry in self.catalogue.entries():
            job = entry.job
            if job.id not in self._jobs:
                continue
            if job.state == "published":
                told = {"target": job.target, "repo": entry.release.repo}
                outcome.published.append(told | {"address": job.facts.get("address")})
            elif job.error is not None:
                outcome.failed.append(entry.failure())
        return outcome


def _taken_by_one(wanted: Mapping[str, float], workers: Workers) -> bool:
    """Whether some worker could do a task, if not now then when it is idle."""
    return any(fits(wanted, one) for one in workers.values())


def _was_free(future: Any) -> bool:
    """Whether the worker that a task was handed to got the claim, as far as its answer arrived."""
    try:
        return future.status == "finished" and bool(future.result(timeout=ANSWER_S))
    except (OSError, TimeoutError, CancelledError):  # the worker that holds the answer has gone
        return False
